"""A reward in the loss: its sign, its guard, and what reports have then."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.extractors.by_name import PUBLISHED
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import MetricName
from tests.metrics.examples import (
    Pixels,
    build_scores,
    images,
    pixels,
    reference,
    score,
    suite,
    write_folder,
)


def bright(images: Tensor) -> Tensor:
    return images.square().mean(dim=(1, 2, 3))


def rewards(**functions: Any) -> dict[str, Reference]:
    return {name: Reference(Reward(name, function)) for name, function in functions.items()}


def made(**settings: Any) -> MetricSuite:
    return suite(
        {"inception": reference(), **rewards(reward=bright, held_out_reward=lambda x: x[:, 0, 0, 0])}, **settings
    )


@pytest.mark.parametrize("weight", [-2, 2])
def test_a_reward_is_raised_whether_its_weight_has_a_minus_or_not(weight: float) -> None:
    loss, metrics = score(made(loss={"reward": weight, "fid": 1}))
    assert list(metrics) == ["fid", "reward"]
    assert metrics["reward"] == pytest.approx(float(bright(images()).mean()), rel=1e-6)
    assert loss == pytest.approx(metrics["fid"] - 2 * metrics["reward"])
    assert list(score(made())[1]) == ["fid", "reward"], "it is reported where the loss has none"


@pytest.mark.parametrize("loss", [{"reward": -1, "near": 1}, {"reward": -1, "fid": 0}, "reward"])
def test_a_reward_needs_a_distance_between_distributions(loss: Any) -> None:
    assert MetricName("reward", "reward") in Loss.parse({"reward": -1, "fid": 1}).weights
    with pytest.raises(MetricError, match="add a distance between distributions"):
        Loss.parse(loss)


def test_the_parts_of_a_loss_with_a_reward_are_compared_one_by_one() -> None:
    assert made(loss={"reward": -1, "fid": 0.1}).signs.items() >= {("fid", 1), ("reward", -1), ("held_out_reward", -1)}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Functions of a user, real images, and pixels in place of Inception."""
    module: Any = types.ModuleType("own_rewards")
    module.bright, module.other = bright, lambda images: -bright(images)
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    monkeypatch.setitem(PUBLISHED, "inception", Mock(side_effect=lambda *_, **__: Pixels()))
    real = write_folder(tmp_path / "real", pixels(30, 4, 4, channels=1)[..., 0])
    names = {"reward": "own_rewards:bright", "held_out_reward": "own_rewards:other"}
    return {**names, "reference": str(real), "cache": tmp_path / "cache"}


@pytest.mark.parametrize("held_out_metrics", [None, [], ["near"]])
def test_reports_have_recall_and_the_unsearched_reward_whatever_else_is_named(
    own: dict[str, Any], held_out_metrics: Any
) -> None:
    scores = build_scores(loss={"reward": -1, "fid": 1}, held_out_metrics=held_out_metrics, **own)
    assert list(score(scores)[1]) == ["fid", "reward"]
    found = score(scores, held_out=True)[1]
    assert {"recall", "precision", "held_out_reward", "reward", "fid"} <= found.keys()
    assert found["held_out_reward"] == -found["reward"]
