"""An objective with a reward: told the prompts of each image, followed by its gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Noise
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from tests.metrics.examples import suite
from tests.objective.test_merge_sample_score import EMA, build, real


def objective(folder: Path, function: Callable[..., Any], **changes: Any) -> MergeSampleScore:
    scores = suite({"inception": real(), "reward": Reference(Reward("my:f", function))}, loss={"reward": -5, "fid": 1})
    return build(folder, scores, **changes)


def corner(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0].tanh()


def test_a_reward_without_a_graph_is_searched_without_a_gradient(tmp_path: Path) -> None:
    made = objective(tmp_path, lambda images: corner(images).detach().numpy())
    assert made(EMA) == pytest.approx(objective(tmp_path, corner)(EMA), rel=1e-6)
    with pytest.raises(ObjectiveError, match="asked for, and extractor my:f: its features have no graph"):
        made.evaluate(Candidate(EMA, gradient=True))


def test_each_image_is_scored_with_its_own_prompt_also_on_the_way_back(tmp_path: Path) -> None:
    seen: list[str] = []

    def prompted(images: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts)
        return corner(images) * torch.tensor([float(one) for one in prompts])

    def prompts_of(noise: Noise, start: int, stop: int) -> list[str]:
        return [str(index if noise.group == SEARCH.group else -1) for index in range(start, stop)]

    made = objective(tmp_path, prompted, images=20)
    made.sampler.prompts_of = prompts_of  # type: ignore[attr-defined]
    evaluation = made.evaluate(Candidate(EMA, gradient=True))
    assert sorted(map(int, set(seen))) == list(range(20))
    move = np.random.default_rng(0).standard_normal(len(EMA))
    move = 1e-3 * (move - move.mean())
    ahead, behind = (made.evaluate(Candidate(EMA + sign * move)).loss for sign in (1, -1))
    assert evaluation.gradient is not None
    assert (ahead - behind) / 2 == pytest.approx(float(evaluation.gradient @ move), rel=1e-2)
    seen.clear()
    made.evaluate(Candidate(EMA, noise=HELD_OUT))
    assert set(seen) == {"-1"}
