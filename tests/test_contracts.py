"""Everything of ours keeps the contracts, and the check of objectives sees what breaks one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.experiment.api import load_objective
from lcsc_opt.objective import CoefficientFunction, Objective
from lcsc_opt.objective.contract import Samples
from lcsc_opt.optimizers.registry import OURS
from tests.contracts import check_checkpoint, check_extractor, check_objective, check_optimizer, check_storage
from tests.evaluation.staged_examples import Stages
from tests.model_studies import write_model_study

STEPS = (10, 20, 30, 40)
TARGET = np.array([0.4, -0.3, 0.2, 0.7])


# objectives


class Sampled(Objective):
    """A loss whose noise belongs to an image's index."""

    steps = STEPS
    samples = Samples(per_evaluation=12)

    def describe(self) -> dict[str, Any]:
        return {"kind": "sampled"}

    def why_no_gradient(self) -> str | None:
        return None

    def evaluate(self, candidate: Candidate) -> Evaluation:
        count = candidate.images or self.samples.per_evaluation
        seed = {"search": 1, "held-out": 2}[candidate.noise.group]
        noise = np.random.default_rng(seed).standard_normal((50, 4))[:count] * 0.1
        apart = candidate.coefficients - TARGET + noise
        derivative = 2 * apart.mean(axis=0) if candidate.gradient else None
        return Evaluation(float(np.square(apart).sum(axis=1).mean()), cost=Cost(images=count), gradient=derivative)


def test_our_objectives_keep_the_contract(workplace: Path) -> None:
    check_objective(Sampled)
    check_objective(NoisyStages)
    check_objective(lambda: CoefficientFunction(lambda a: float(np.square(a - TARGET).sum()), STEPS, name="square"))
    study_file = write_model_study(workplace)
    check_objective(lambda: load_objective(study_file))


class NoisyStages(Stages):
    """Noise is added to the loss."""

    def score(self, candidate: Candidate, parts: Any) -> Any:
        evaluation, back = super().score(candidate, parts)
        return dataclasses.replace(evaluation, loss=evaluation.loss + len(candidate.noise.group)), back


counted = itertools.count()


class Changed(Sampled):
    """Another evaluation than that of the objective; without a gradient it keeps its own."""

    def __init__(self, field: str, change: Callable[[Any], Any]) -> None:
        self.field = field
        self.change = change

    def evaluate(self, candidate: Candidate) -> Evaluation:
        evaluation = super().evaluate(candidate)
        value = getattr(evaluation, self.field)
        if value is None:
            return evaluation
        return dataclasses.replace(evaluation, **{self.field: self.change(value)})


class IgnoringImages(Sampled):
    def evaluate(self, candidate: Candidate) -> Evaluation:
        return super().evaluate(dataclasses.replace(candidate, images=None))


class IgnoringNoise(Sampled):
    def evaluate(self, candidate: Candidate) -> Evaluation:
        return super().evaluate(Candidate(candidate.coefficients, candidate.images, gradient=candidate.gradient))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: Changed("loss", lambda loss: loss + next(counted)), "the same candidate has the loss"),
        (lambda: Changed("loss", lambda loss: float("nan")), "expected a finite number"),
        (lambda: Changed("cost", lambda cost: Cost()), "cost.images"),
        (lambda: Changed("gradient", lambda gradient: gradient[:3]), "a gradient of 4 numbers"),
        (lambda: Changed("gradient", lambda gradient: -gradient), "along a direction"),
        (IgnoringImages, "asked for"),
        (IgnoringNoise, "held-out noise"),
    ],
)
def test_an_objective_that_breaks_the_contract_is_told_where(objective: Callable[[], Objective], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_objective(objective)


# optimizers


@pytest.mark.parametrize("name", [*OURS, "CMA", "DE", "OnePlusOne", "PSO", "TwoPointsDE"])
def test_optimizers_keep_the_contract(name: str) -> None:
    if name != "Landscape":  # asks for the corners that a study gives it
        check_optimizer(name)


# extractors


class Small(nn.Module):
    """Features of a small network."""

    name = "small"
    dimension = 3

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 3 * 8 * 8, generator=generator) / 10

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight.T)


def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_extractors_keep_the_contract() -> None:
    check_extractor(Small(), images())


# checkpoint formats


@pytest.mark.parametrize("name", ["one.safetensors", "one.pt"])
def test_formats_keep_the_contract(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.randn(40, 30), "n": torch.tensor(3), "half": torch.ones(7).half()}
    path = tmp_path / f"model000300-{name}"
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    check_checkpoint(path, tensors, step=300)
    with pytest.raises(AssertionError, match="expected 301"):
        check_checkpoint(path, tensors, step=301)
    with pytest.raises(AssertionError, match=r"other tensors than were saved: more"):
        check_checkpoint(path, tensors | {"more": torch.ones(1)})
    with pytest.raises(AssertionError, match="w: other numbers"):
        check_checkpoint(path, tensors | {"w": tensors["w"] + 1})
    with pytest.raises(AssertionError, match=r"w: read as torch\.float32"):
        check_checkpoint(path, tensors | {"w": tensors["w"].double()})


# storages


@pytest.mark.usefixtures("impatient")
def test_sqlite_keeps_the_contract(url: str) -> None:
    check_storage(url)


@pytest.mark.usefixtures("impatient")
def test_postgresql_keeps_the_contract(postgresql_url: str) -> None:
    check_storage(postgresql_url)
