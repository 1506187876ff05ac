"""Samplers with a graph, against central finite differences in float64, and what they keep until the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.records import SEARCH
from lcsc_opt.sampling import (
    ClassLabels,
    DecoderSettings,
    DifferentiableSampler,
    DiffusersSampler,
    EdmDenoiser,
    FunctionSampler,
    HeunSampler,
    HeunSchedule,
    ImageNoise,
    LatentDecoder,
    NetworkSettings,
    SchedulerSettings,
    build_scheduler,
)
from lcsc_opt.sampling.base import ModuleWeights
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.sampling.diffusers_sampler import SCHEDULERS
from tests.sampling.consistency_sampler import ConsistencySampler

SHAPE = (1, 4, 4)
CPU = NetworkSettings(device="cpu")
IMAGES = 3


class Smooth(nn.Module):
    """A network whose images stay inside [-1, 1], called as every sampler calls one."""

    def __init__(self, width: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.classes = nn.Embedding(3, width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3 / math.sqrt(width), generator=generator)

    def forward(self, x: Tensor, times: Tensor, class_labels: Tensor | None = None) -> Tensor:
        scale = (1 + times.to(x.dtype).abs()).rsqrt()[:, None, None, None]
        hidden = self.first(x * scale + scale)
        if class_labels is not None:
            rows = (
                class_labels.to(x.dtype) @ self.classes.weight if class_labels.ndim == 2 else self.classes(class_labels)
            )
            hidden = hidden + rows[:, :, None, None]
        return 0.7 * torch.tanh(self.last(torch.tanh(hidden)))


def consistency(network: nn.Module, *sigmas: float, settings: NetworkSettings = CPU) -> ConsistencySampler:
    function, noise = ConsistencyFunction(network), ImageNoise(0, SHAPE)
    return ConsistencySampler(function, sigmas=sigmas, noise=noise, settings=settings)


def diffusers(
    network: nn.Module, name: Any, steps: int = 4, *, guided: bool = False, step: Any = None, **options: Any
) -> Any:
    config = {"prediction_type": "v_prediction" if name == "euler-ancestral" else "sample"}
    noise = ImageNoise(0, SHAPE, ClassLabels(2, "balanced", (1.5, 2)) if guided else None)
    scheduler = build_scheduler(name, {} if name == "consistency" else config)
    schedule = SchedulerSettings(steps=steps, step=step or {})
    return DiffusersSampler(network, scheduler, schedule, noise=noise, **{"settings": CPU, **options})


def heun(network: nn.Module, steps: int = 3, **options: Any) -> HeunSampler:
    schedule = HeunSchedule(steps=steps, sigma_max=3.0)
    denoiser = EdmDenoiser(network, label_dim=3, **options)
    noise = ImageNoise(0, SHAPE, ClassLabels(3, "balanced"))
    return HeunSampler(denoiser, schedule=schedule, noise=noise, settings=CPU)


def two_steps(model: nn.Module, noise: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """A user's own sampler."""
    first = model(noise, torch.ones(len(noise)))
    return model(first + 0.1 * draw(1), torch.zeros(len(noise)))


def function(network: nn.Module) -> FunctionSampler:
    return FunctionSampler(network, two_steps, nfe=2, noise=ImageNoise(0, SHAPE), settings=CPU)


BUILD: dict[str, Callable[[nn.Module], Any]] = {
    "consistency in one step": lambda network: consistency(network, 10.0),
    "consistency in three steps": lambda network: consistency(network, 10.0, 2.0, 0.5),
    "DDIM": lambda network: diffusers(network, "ddim"),
    "DDIM with guidance": lambda network: diffusers(network, "ddim", guided=True),
    "DDIM with noise": lambda network: diffusers(network, "ddim", step={"eta": 0.7}),
    "DPM-Solver++": lambda network: diffusers(network, "dpm-solver++", 5),
    "DPM-Solver++ with guidance": lambda network: diffusers(network, "dpm-solver++", 5, guided=True),
    "Heun": heun,
    "Heun with autoguidance": lambda network: heun(network, guide=Smooth(seed=9).double(), guidance=1.4),
    "a function": function,
}


def objective(sampler: Any) -> Tensor:
    """A smooth function of the images."""
    images = sampler.sample(SEARCH, 0, IMAGES)
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)
    return (weights * images + images.square()).sum()


def gradient(sampler: DifferentiableSampler, names: Any) -> dict[str, Tensor]:
    with sampler.weights.differentiable(names) as leaves:
        found = torch.autograd.grad(objective(sampler), tuple(leaves.values()), allow_unused=True)
    return {name: part for name, part in zip(leaves, found, strict=True) if part is not None}


def check_directions(sampler: Any, network: nn.Module, *, step: float, tolerance: float) -> None:
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = gradient(sampler, set(weights))

    def at(step: float) -> float:
        sampler.load({name: tensor + step * direction[name] for name, tensor in weights.items()})
        with torch.no_grad():
            return float(objective(sampler))

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = {
            n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for n, t in weights.items()
        }
        derivative = sum(float((part * direction[name]).sum()) for name, part in found.items())
        assert derivative == pytest.approx((at(step) - at(-step)) / (2 * step), rel=tolerance)
        assert abs(derivative) > 1e-3  # there is something to compare


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' DPM-Solver++ rounds to float32 in every step, which differences would see."""
    from diffusers.schedulers import scheduling_dpmsolver_multistep as module

    wide = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(module, "torch", wide)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", BUILD)
def test_the_gradient_is_the_finite_difference(name: str) -> None:
    network = Smooth().double()
    sampler = BUILD[name](network)
    assert isinstance(sampler, DifferentiableSampler)
    check_directions(sampler, network, step=1e-6, tolerance=2e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_the_graph(name: str) -> None:
    network = Smooth()
    check_directions(diffusers(network, name), network, step=3e-3, tolerance=0.02)


@pytest.mark.parametrize("name", BUILD)
def test_images_are_the_same_with_a_graph_and_nothing_is_left_behind(name: str) -> None:
    network = Smooth().double()
    network.last.requires_grad_(requires_grad=False)
    sampler = BUILD[name](network)
    before = {n: p.requires_grad for n, p in network.named_parameters()}
    state = {n: p.clone() for n, p in network.state_dict().items()}
    with torch.inference_mode():  # what is kept from it serves a graph, too
        expected = sampler.sample(SEARCH, 0, IMAGES)
    with sampler.weights.differentiable({"first.weight"}):
        images = sampler.sample(SEARCH, 0, IMAGES)
    assert images.requires_grad
    assert torch.equal(images, expected)
    first = gradient(sampler, set(state))
    assert {"first.weight", "last.weight"} <= first.keys()
    assert {n: p.requires_grad for n, p in network.named_parameters()} == before
    assert all(p.grad is None for p in network.parameters())
    assert "forward" not in vars(network)
    assert all(torch.equal(p, state[n]) for n, p in network.state_dict().items())
    held = [*vars(getattr(sampler, "scheduler", sampler)).values()]
    flat = [item for value in held for item in (value if isinstance(value, list) else [value])]
    assert not any(item.requires_grad for item in flat if isinstance(item, Tensor))
    second = gradient(sampler, set(state))
    assert all(torch.equal(part, second[n]) for n, part in first.items())


@pytest.mark.parametrize("name", BUILD)
def test_calls_are_counted_as_they_are_made(name: str) -> None:
    network = Smooth().double()
    sampler = BUILD[name](network)
    with torch.no_grad():
        sampler.sample(SEARCH, 0, 1)  # some samplers take their first images twice
        network.forward = counting = Mock(side_effect=network.forward)  # type: ignore[method-assign]
        sampler.sample(SEARCH, 0, 1)
    plain = counting.call_count
    gradient(sampler, {"first.weight"})
    of_a_call = sampler.nfe / plain  # guidance takes two in one
    assert (counting.call_count - 2 * plain) * of_a_call == sampler.recomputed


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 3, 2, stride=2)
        nn.init.uniform_(self.up.weight, generator=torch.Generator().manual_seed(0))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.tanh(self.up(latents)))


def test_the_gradient_goes_through_a_decoder_that_has_none_itself() -> None:
    network = Smooth().double()
    scaling: Any = {"raw_mean": [0.1], "raw_std": [1.5], "final_std": 1.0, "low": -1.0, "batch_size": 2}
    decoder = LatentDecoder(Autoencoder(), DecoderSettings(autoencoder="", **scaling)).double()
    sampler = diffusers(network, "ddim", decoder=decoder)
    check_directions(sampler, network, step=1e-6, tolerance=2e-6)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())


class Entries(nn.Module):
    """Two names of one tensor, a buffer, an integer, and something that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.same = self.weight
        self.register_buffer("shift", torch.ones(2))
        self.register_buffer("count", torch.tensor(1))
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_leaves_are_the_named_floating_point_entries_each_once() -> None:
    module, rest = Entries(), nn.Linear(1, 1)
    with ModuleWeights(module, rest).differentiable({"weight", "same", "shift", "count"}) as leaves:
        assert list(leaves) == ["same", "shift"]  # the last name of a tensor, as loading leaves that one's value in it
        assert leaves["same"] is module.weight
        assert all(leaf.requires_grad for leaf in leaves.values())
        assert not any(parameter.requires_grad for parameter in rest.parameters())
    assert not module.shift.requires_grad
    assert all(parameter.requires_grad for parameter in rest.parameters())
    with ModuleWeights(module).differentiable({"shift"}) as leaves:
        assert list(leaves) == ["shift"]
        assert not module.weight.requires_grad


def test_statistics_of_a_batch_normalization_have_no_gradient() -> None:
    weights = ModuleWeights(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    reason = weights.why_no_gradient({"0.weight", "1.running_var"})
    assert reason == "torch has no gradient in a batch normalization's 1.running_var, which differs between candidates"
    assert weights.why_no_gradient({"0.weight", "1.weight", "1.num_batches_tracked"}) is None
