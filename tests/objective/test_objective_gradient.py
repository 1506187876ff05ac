"""The gradient of the loss in the coefficients: against central finite differences of the loss itself."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.base.records import SEARCH, Candidate, Noise
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import Reference, Scores
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import (
    ConsistencyFunction,
    ConsistencySampler,
    DiffusersSampler,
    EdmDenoiser,
    FunctionSampler,
    HeunSampler,
    HeunSchedule,
    ImageNoise,
    NetworkSettings,
    build_scheduler,
)
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

SHAPE = (1, 4, 4)
STEPS = (10, 20, 30, 40, 50)
EMA = ema_coefficients(STEPS, 0.95)
NOISE = ImageNoise(3)
COMMON: dict[str, Any] = {"image_shape": SHAPE, "noise": NOISE, "settings": NetworkSettings("cpu")}


class Network(nn.Module):
    """Its images stay inside [-1, 1]; ``scale`` is a buffer that is merged with the weights, ``count`` is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.25, generator=generator)
        self.register_buffer("scale", torch.rand(1, 1, 1, 1, generator=generator) + 0.5)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: Tensor, times: Tensor, class_labels: Tensor | None = None) -> Tensor:
        level = (1 + times.to(x.dtype).abs()).rsqrt()[:, None, None, None]
        return 0.7 * torch.tanh(self.last(torch.tanh(self.first(x * level + level * self.scale))))


class InMemory:
    """Checkpoints that are merged in float64."""

    steps, sha256, touched, layer_groups = STEPS, "memory", False, None

    def __init__(self) -> None:
        self.states = [Network(seed).double().state_dict() for seed in range(len(STEPS))]

    @property
    def varying(self) -> frozenset[str]:
        return frozenset(self.states[0])

    def verify(self) -> None: ...

    def merge(self, coefficients: Any) -> dict[str, Tensor]:
        merged = {}
        for name, last in self.states[-1].items():
            parts = [float(a) * state[name] for a, state in zip(coefficients, self.states, strict=True)]
            merged[name] = sum(parts) if last.is_floating_point() else last
        return merged  # type: ignore[return-value]

    def in_rows(self, rule: Any) -> InMemory:
        raise NotImplementedError

    def gram(self) -> np.ndarray:
        raise NotImplementedError

    def project(self, gradients: Mapping[str, Tensor]) -> np.ndarray:
        return np.array([sum(float((state[n] * g).sum()) for n, g in gradients.items()) for state in self.states])


class Features:
    """Smooth and not linear, in the images' own dtype."""

    name, dimension = "smooth", 6

    def __init__(self) -> None:
        self.matrix = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.matrix.to(images.dtype))


def consistency(network: nn.Module, *sigmas: float, **changes: Any) -> ConsistencySampler:
    return ConsistencySampler(ConsistencyFunction(network), sigmas=sigmas, **{**COMMON, **changes})


def diffusers(network: nn.Module, name: Any, steps: int) -> DiffusersSampler:
    return DiffusersSampler(network, build_scheduler(name, {"prediction_type": "sample"}), steps=steps, **COMMON)


def one_call(model: nn.Module, noise: Tensor) -> Tensor:
    return model(noise, torch.ones(len(noise)))


def function(network: nn.Module, sample: Callable[..., Tensor] = one_call) -> FunctionSampler:
    return FunctionSampler(network, sample, nfe=1, **COMMON)


SAMPLERS: dict[str, Callable[[nn.Module], Any]] = {
    "consistency in one step": lambda network: consistency(network, 10.0),
    "consistency in three steps": lambda network: consistency(network, 10.0, 2.0, 0.5),
    "DDIM": lambda network: diffusers(network, "ddim", 4),
    "DPM-Solver++": lambda network: diffusers(network, "dpm-solver++", 5),
    "Heun": lambda network: HeunSampler(EdmDenoiser(network), schedule=HeunSchedule(steps=3, sigma_max=3.0), **COMMON),
    "a function": function,
}


def build(sampler: Any, trajectory: Any = None, *, loss: Any = "fid", **changes: Any) -> MergeSampleScore:
    settings = {"images": 50, "batch_size": 16, **changes}
    images = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    scores = Scores({"inception": Reference.of_features(Features(), Features()(images).numpy())}, loss=loss)
    return MergeSampleScore(InMemory() if trajectory is None else trajectory, sampler, scores, **settings)


def gradient(objective: MergeSampleScore) -> np.ndarray:
    found = objective.evaluate(Candidate(EMA), gradient=True).gradient
    assert found is not None
    return found


def directions(count: int = 2) -> list[np.ndarray]:
    drawn = np.random.default_rng(0).normal(size=(count, len(STEPS)))
    return list(drawn - drawn.mean(axis=1, keepdims=True))  # coefficients go on to sum to one


def difference(objective: MergeSampleScore, direction: np.ndarray, step: float) -> float:
    return (objective(EMA + step * direction) - objective(EMA - step * direction)) / (2 * step)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' DPM-Solver++ rounds to float32 in every step, which differences would see."""
    from diffusers.schedulers import scheduling_dpmsolver_multistep as module

    monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gradient_is_the_finite_difference_of_the_loss(name: str) -> None:
    objective = build(SAMPLERS[name](Network().double()), gradient_batch_size=7)
    found = gradient(objective)
    assert (found.shape, found.dtype) == ((len(STEPS),), np.float64)
    for direction in directions():
        assert found @ direction == pytest.approx(difference(objective, direction, 1e-5), rel=1e-5)
        assert abs(found @ direction) > 1e-2


@pytest.mark.parametrize("loss", ["kid", {"fid": 1.0, "kid": 0.5}])
def test_other_losses_have_their_own_gradient(loss: Any) -> None:
    objective = build(SAMPLERS["consistency in one step"](Network().double()), loss=loss)
    found = gradient(objective)
    for direction in directions():
        # kid itself compares in float32
        assert found @ direction == pytest.approx(difference(objective, direction, 1e-3), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 7}, {"gradient_batch_size": 3}, {"batch_size": 49}, {"batch_size": 1000}],
)
def test_batches_change_nothing(changes: dict[str, Any]) -> None:
    sampler = SAMPLERS["consistency in three steps"](Network().double())
    expected = build(sampler).evaluate(Candidate(EMA), gradient=True)
    found = build(sampler, **changes).evaluate(Candidate(EMA), gradient=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-9)  # type: ignore[arg-type]


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    with TrajectoryWriter(tmp_path / "run.trajectory") as writer:
        for seed, step in enumerate(STEPS):
            writer.append(step, Network(seed).state_dict())
    return Trajectory.open(tmp_path / "run.trajectory")


@pytest.mark.parametrize("name", ["consistency in three steps", "DPM-Solver++"])
def test_a_packed_trajectory_in_float32_has_the_directional_derivative(name: str, trajectory: Trajectory) -> None:
    objective = build(SAMPLERS[name](Network()), trajectory)
    found = gradient(objective)
    downhill = found - found.mean()
    downhill /= np.linalg.norm(downhill)
    assert found @ downhill == pytest.approx(difference(objective, downhill, 2e-3), rel=5e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_loss_and_metrics_are_those_of_a_plain_evaluation(name: str, trajectory: Trajectory) -> None:
    objective = build(SAMPLERS[name](Network()), trajectory)
    for candidate in (Candidate(EMA), Candidate(EMA, images=12), Candidate(EMA, noise=Noise("search", 5))):
        plain = objective.evaluate(candidate)
        found = objective.evaluate(candidate, gradient=True)
        assert plain.gradient is None
        assert found.loss == pytest.approx(plain.loss, rel=1e-9)
        assert found.metrics == pytest.approx(plain.metrics, rel=1e-9)
        assert objective.evaluate(candidate).loss == plain.loss  # bit for bit what it was before


def test_nothing_is_left_in_the_network(trajectory: Trajectory) -> None:
    network = Network()
    objective = build(SAMPLERS["DDIM"](network), trajectory)
    network.last.requires_grad_(requires_grad=False)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    with torch.inference_mode():  # whatever the caller is in
        gradient(objective)
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.scale.requires_grad
    assert not torch.is_inference_mode_enabled()


class Counting(Network):
    calls = 0

    def forward(self, x: Tensor, times: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        return super().forward(x, times)


@pytest.mark.parametrize("name", ["consistency in three steps", "DDIM", "a function"])
@pytest.mark.parametrize(("batch_size", "sampled"), [(50, 50), (20, 90)])
def test_model_calls_are_those_that_were_made_and_two_for_each_back(name: str, batch_size: int, sampled: int) -> None:
    network = Counting().double()
    objective = build(SAMPLERS[name](network), batch_size=batch_size)
    objective.sampler.sample(SEARCH, 0, 2)
    for _ in range(4):  # at the first, second and fourth, a function is asked again for these images
        objective.sampler.load(network.state_dict())
    network.calls = 0
    objective.evaluate(Candidate(EMA))
    assert network.calls == 50 * objective.sampler.nfe
    network.calls = 0
    cost = objective.evaluate(Candidate(EMA), gradient=True).cost
    assert network.calls == sampled * objective.sampler.nfe + 50 * objective.sampler.recomputed  # type: ignore[attr-defined]
    assert cost.model_calls == network.calls + 2 * 50 * objective.sampler.nfe
    assert cost.images == 50
    parts = [cost.merge_seconds, cost.sample_seconds, cost.features_seconds, cost.metric_seconds]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= cost.seconds


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
        objective.evaluate(Candidate(EMA, images=images), gradient=True)
    assert not alive
    return max(peaks)


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_is_that_of_one_batch(name: str) -> None:
    objective = build(SAMPLERS[name](Network().double()), batch_size=10)
    assert peak_of_saved(objective, 100) == peak_of_saved(objective, 10) > 0


def test_small_gradients_survive_half_precision(trajectory: Trajectory) -> None:
    """A weight of the loss far below one must not make numbers of the backward pass zero."""
    dtypes: Any = ("fp32", "fp16")
    samplers = [consistency(Network(), 10.0, 2.0, settings=NetworkSettings("cpu", dtype=dtype)) for dtype in dtypes]
    found = [gradient(build(sampler, trajectory, loss={"fid": 1e-6})) for sampler in samplers]
    exact, half = (one - one.mean() for one in found)
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.02


class OwnSampler:
    """A sampler that knows nothing of gradients."""

    nfe = 1

    def load(self, weights: Mapping[str, Tensor]) -> None: ...

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        return NOISE.batch(noise, start, stop, SHAPE).clamp(-1, 1)

    def describe(self) -> dict[str, object]:
        return {}


def test_an_objective_that_cannot_says_why() -> None:
    for objective, reason in (
        (build(consistency(Network(), 9.0), loss={"precision": 1.0}), "precision.*no gradient"),
        (build(OwnSampler()), "OwnSampler samples without a graph"),
    ):
        with pytest.raises(ObjectiveError, match=reason) as caught:
            gradient(objective)
        assert str(caught.value) == f"a gradient was asked for, and {objective.why_no_gradient()}"


def test_a_function_that_cuts_the_graph_is_refused_once_a_gradient_is_wanted() -> None:
    objective = build(function(Network().double(), torch.no_grad()(one_call)))
    assert math.isfinite(objective(EMA))
    with pytest.raises(ObjectiveError, match="images have no graph back to the weights"):
        gradient(objective)


def test_memory_that_is_not_there_and_gradients_that_are_not_finite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build(function(Network().double()))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", full)
        with pytest.raises(ObjectiveError, match="set gradient_batch_size"):
            gradient(objective)
    monkeypatch.setattr(objective.trajectory, "project", lambda gradients: np.array([1.0, np.nan, 0, 0, 0]))
    with pytest.raises(MetricError, match="the gradient is not finite"):
        gradient(objective)
