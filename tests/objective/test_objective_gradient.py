"""The gradient of the loss in the coefficients: against central finite differences of the loss itself."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.base.records import Candidate, Noise
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import Reference
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import FunctionSampler, ImageNoise, NetworkSettings
from lcsc_opt.sampling.base import ModuleWeights
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.metrics.examples import suite
from tests.sampling.test_gradient_sampling import BUILD, CPU, SHAPE, Smooth, consistency, function, two_steps

STEPS = (10, 20, 30, 40, 50)
EMA = ema_coefficients(STEPS, 0.95)
SAMPLERS = ("consistency in three steps", "DDIM", "Heun", "a function")


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """In float64, in which differences are those of the derivative."""
    with TrajectoryWriter(tmp_path_factory.mktemp("gradient") / "run.trajectory") as writer:
        for seed, step in enumerate(STEPS):
            writer.append(step, Smooth(seed=seed).double().state_dict())
    return Trajectory.open(writer.path)


class Features:
    """Smooth and not linear, in the images' own dtype."""

    name, dimension = "smooth", 6

    def __init__(self) -> None:
        self.matrix = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.matrix.to(images.dtype))


def build(
    trajectory: Trajectory, sampler: Any, *, loss: Any = "fid", extractor: str = "inception", **changes: Any
) -> MergeSampleScore:
    settings = {"images": 50, "batch_size": 16, **changes}
    images = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    scores = suite({extractor: Reference.of_features(Features(), Features()(images).numpy())}, loss=loss)
    return MergeSampleScore(trajectory, sampler, scores, **settings)


def gradient(objective: MergeSampleScore) -> np.ndarray:
    found = objective.evaluate(Candidate(EMA, gradient=True)).gradient
    assert found is not None
    return found


def directions(count: int = 2) -> list[np.ndarray]:
    drawn = np.random.default_rng(0).normal(size=(count, len(STEPS)))
    return list(drawn - drawn.mean(axis=1, keepdims=True))  # coefficients go on to sum to one


def difference(objective: MergeSampleScore, direction: np.ndarray, step: float, **asked: Any) -> float:
    ahead, behind = (objective.evaluate(Candidate(EMA + sign * step * direction, **asked)).loss for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gradient_is_the_finite_difference_of_the_loss(name: str, trajectory: Trajectory) -> None:
    objective = build(trajectory, BUILD[name](Smooth().double()), gradient_batch_size=7)
    found = gradient(objective)
    assert (found.shape, found.dtype) == ((len(STEPS),), np.float64)
    for direction in directions():
        assert found @ direction == pytest.approx(difference(objective, direction, 1e-5), rel=1e-5)
        assert abs(found @ direction) > 1e-2


@pytest.mark.parametrize("images", [6, 50, 51])
def test_a_step_follows_the_loss_without_the_bias_of_its_few_images(images: int, trajectory: Trajectory) -> None:
    objective = build(trajectory, function(Smooth().double()), gradient_batch_size=7)
    asked = {"images": images, "unbiased": True}
    step = objective.evaluate(Candidate(EMA, **asked, gradient=True))  # type: ignore[arg-type]
    assert step.gradient is not None
    assert step.loss < objective.evaluate(Candidate(EMA, images=images)).loss
    for direction in directions():
        assert step.gradient @ direction == pytest.approx(difference(objective, direction, 1e-5, **asked), rel=1e-5)


@pytest.mark.parametrize("loss", ["kid", {"fid": 1.0, "kid": 0.5}])
def test_other_losses_have_their_own_gradient(loss: Any, trajectory: Trajectory) -> None:
    objective = build(trajectory, function(Smooth().double()), loss=loss)
    found = gradient(objective)
    for direction in directions():
        # kid itself compares in float32
        assert found @ direction == pytest.approx(difference(objective, direction, 1e-3), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_loss_and_metrics_are_those_of_a_plain_evaluation(name: str, trajectory: Trajectory) -> None:
    objective = build(trajectory, BUILD[name](Smooth()))
    for candidate in (Candidate(EMA, images=12), Candidate(EMA, noise=Noise("search", 5))):
        plain = objective.evaluate(candidate)
        found = objective.evaluate(dataclasses.replace(candidate, gradient=True))
        assert plain.gradient is None
        assert found.loss == pytest.approx(plain.loss, rel=1e-9)
        assert found.metrics == pytest.approx(plain.metrics, rel=1e-9)
        assert objective.evaluate(candidate).loss == plain.loss  # bit for bit what it was before


def peak_of_saved(objective: MergeSampleScore, images: int) -> int:
    """The most bytes of activations that were kept for a backward pass at one time."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peaks = [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)
            peaks.append(sum(held.tensor.nbytes for held in alive))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        objective.evaluate(Candidate(EMA, images=images, gradient=True))
    assert not alive
    return max(peaks)


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_is_that_of_one_batch(name: str, trajectory: Trajectory) -> None:
    objective = build(trajectory, BUILD[name](Smooth().double()), batch_size=10)
    assert peak_of_saved(objective, 100) == peak_of_saved(objective, 10) > 0


def test_small_gradients_survive_half_precision(trajectory: Trajectory) -> None:
    """A weight of the loss far below one must not make numbers of the backward pass zero."""
    dtypes: Any = ("fp32", "fp16")
    samplers = [
        consistency(Smooth(), 10.0, 2.0, settings=NetworkSettings(device="cpu", dtype=dtype)) for dtype in dtypes
    ]
    found = [gradient(build(trajectory, sampler, loss={"fid": 1e-6})) for sampler in samplers]
    exact, half = (one - one.mean() for one in found)
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.02


class OwnSampler:
    """A sampler that knows nothing of gradients."""

    nfe = 1

    def load(self, weights: Mapping[str, Tensor]) -> None: ...

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        return ImageNoise(0, SHAPE).batch(noise, start, stop).clamp(-1, 1)

    def describe(self) -> dict[str, object]:
        return {}


def test_an_objective_that_cannot_says_why(trajectory: Trajectory) -> None:
    for objective, reason in (
        (build(trajectory, consistency(Smooth(), 9.0), loss={"precision": 1.0}), "precision.*no gradient"),
        (build(trajectory, OwnSampler()), "OwnSampler samples without a graph"),
    ):
        with pytest.raises(ObjectiveError, match=reason) as caught:
            gradient(objective)
        assert str(caught.value) == f"a gradient was asked for, and {objective.why_no_gradient()}"


def test_a_function_that_cuts_the_graph_is_refused_once_a_gradient_is_wanted(trajectory: Trajectory) -> None:
    cut, noise = torch.no_grad()(two_steps), ImageNoise(0, SHAPE)
    sampler = FunctionSampler(Smooth().double(), cut, nfe=2, noise=noise, settings=CPU)
    objective = build(trajectory, sampler)
    assert math.isfinite(objective(EMA))
    with pytest.raises(ObjectiveError, match=r"the images of .* have no autograd graph"):
        gradient(objective)


def test_a_sampler_that_fails_before_anything_was_evaluated_is_one_line(trajectory: Trajectory) -> None:
    class Failing(OwnSampler):
        def __init__(self) -> None:
            self.weights = ModuleWeights(Smooth())
            self.recomputed = 0

        def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
            raise IndexError("index out of range\nin self")

    with pytest.raises(ObjectiveError, match="sampling raised IndexError: index out of range in self"):
        build(trajectory, Failing(), loss="fid@own:features", extractor="own:features").why_no_gradient()


class Kinked(Smooth):
    """Its images are finite, their derivatives are not."""

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        output = super().forward(*inputs, **options)
        return output + (output - output.detach()).abs().sqrt()


def test_memory_that_is_not_there_and_gradients_that_are_not_finite_fail(
    monkeypatch: pytest.MonkeyPatch, trajectory: Trajectory, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = build(trajectory, function(Smooth().double()))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", full)
        with pytest.raises(torch.OutOfMemoryError):
            gradient(objective)
        with pytest.raises(torch.OutOfMemoryError):
            gradient(build(trajectory, function(Smooth().double()), batch_size="auto"))
    assert capsys.readouterr().err.split()[-4] == "1"
    with pytest.raises(MetricError, match="the gradient is not finite"):
        gradient(build(trajectory, function(Kinked().double())))
