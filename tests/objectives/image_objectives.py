"""What tests of objectives over images share: an extractor, a reference, and the questions that all of them answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore

PIXELS = "fid@tests.objectives.image_objectives:make_extractor"


@dataclasses.dataclass
class Means:
    """Features that are the means of 2×2 parts of an image: 4 a channel."""

    name: str = "tests-means"
    dimension: int = 4

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def make_extractor() -> Means:
    """Named in studies as ``tests.objectives.image_objectives:make_extractor``."""
    return Means()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings that every objective over images takes, with a reference in ``folder``."""
    reference = folder / "reference.npz"
    if not reference.exists():
        features = np.random.default_rng(0).normal(0.1, 0.2, (200, 4))
        np.savez(reference, mu=features.mean(0), sigma=np.cov(features.T))
    shared = {"loss": PIXELS, "reference": "reference.npz", "images": 24, "batch_size": 10, "device": "cpu"}
    return {**shared, **changes}


def build(file: str, folder: Path, **changes: Any) -> MergeSampleScore:
    """The shipped objective, as a study file in ``folder`` gets it."""
    objective = load_objective(ObjectiveSpec(file=file, settings=settings(folder, **changes)), BuildContext(folder))
    assert isinstance(objective, MergeSampleScore)
    return objective


def combined(coefficients: np.ndarray, networks: list[Any]) -> dict[str, Tensor]:
    """The merged weights of networks, added one after the other."""
    states = [network.state_dict() for network in networks]
    return {
        name: torch.stack([float(a) * state[name] for a, state in zip(coefficients, states, strict=True)]).sum(0)
        for name in states[0]
    }


def one_line(kind: type[Exception], message: str, made: Callable[[], Any]) -> None:
    """It raises such an error, with a message of one line."""
    with pytest.raises(kind, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)


def check(objective: MergeSampleScore) -> None:
    """It evaluates twice to the same, on other noise to something else, and says what it is in JSON."""
    coefficients = ema_coefficients(objective.steps, 0.99)
    first = objective.evaluate(Candidate(coefficients, noise=SEARCH))
    assert np.isfinite(first.loss)
    assert first.metrics == {PIXELS: first.loss}
    assert first.cost.model_calls == 24 * objective.sampler.nfe
    other = coefficients[::-1].copy()
    assert objective.evaluate(Candidate(other)).loss != first.loss
    assert objective.evaluate(Candidate(coefficients)).loss == first.loss
    assert objective.evaluate(Candidate(coefficients, noise=HELD_OUT)).loss != first.loss
    apart = torch.cat([objective.images(coefficients, SEARCH, count)[-1:] for count in (3, 11, 24)])
    assert torch.allclose(apart, objective.images(coefficients, SEARCH, 24)[[2, 10, 23]], atol=1e-4)
    assert objective.describe() == json.loads(json.dumps(objective.describe()))
