from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, SEARCH
from lcsc_opt.sampling import FunctionSampler, ImageNoise, NetworkSettings

SHAPE = (1, 4, 4)
NOISE = ImageNoise(0, SHAPE)


def make(function: Callable[..., Any], **changes: Any) -> FunctionSampler:
    model = nn.Conv2d(1, 1, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)  # type: ignore[arg-type]
    settings = {"nfe": 2, "settings": NetworkSettings(device="cpu"), **changes}
    return FunctionSampler(model, function, noise=NOISE, **settings)


def test_images_are_what_the_function_makes_of_the_noise() -> None:
    def sample(model: nn.Module, noise: Tensor, scale: float = 1.0) -> Tensor:
        noise *= scale  # a function may write to its noise
        return model(noise)

    sampler = make(sample, options={"scale": 0.4})
    expected = (0.2 * NOISE.batch(SEARCH, 3, 9)).clamp(-1, 1)
    for _ in range(2):
        assert torch.allclose(sampler.sample(SEARCH, 3, 9), expected)
    sampler.load({"weight": torch.full((1, 1, 1, 1), -0.5), "bias": torch.zeros(1)})
    assert torch.allclose(sampler.sample(SEARCH, 3, 9), -expected)
    assert sampler.nfe == 2


def test_the_functions_own_random_numbers_are_those_of_the_images() -> None:
    sampler = make(lambda model, noise: model(noise) + 0.1 * torch.randn_like(noise))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    images = sampler.sample(SEARCH, 0, 5)
    assert torch.equal(torch.get_rng_state(), state), "the caller's are not used up"
    torch.randn(3)
    assert torch.equal(sampler.sample(SEARCH, 0, 5), images)
    own = [sampler.sample(noise, 0, 5) - 0.5 * NOISE.batch(noise, 0, 5) for noise in (SEARCH, HELD_OUT)]
    assert not torch.allclose(own[0], own[1]), "another group of noise has others"


def test_half_precision_reaches_the_network_inside_the_function() -> None:
    seen = []

    def sample(model: nn.Module, noise: Tensor) -> Tensor:
        images = model(noise)
        seen.append(images.dtype)
        return images

    assert (
        make(sample, settings=NetworkSettings(device="cpu", dtype="bf16")).sample(SEARCH, 0, 2).dtype == torch.float32
    )
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, noise: noise[:2], r"returned torch.float32 \[2, 1, 4, 4\]; expected .* \[5, C, H, W\]"),
        (lambda model, noise: [noise], "returned a list; expected a tensor"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        make(function).sample(SEARCH, 0, 5)


def test_a_function_that_takes_nfe_is_told_it() -> None:
    def sample(model: nn.Module, noise: Tensor, nfe: int = 9) -> Tensor:
        return torch.full_like(noise, nfe / 10)

    told, own = make(sample), make(sample, options={"nfe": 3})
    assert (told.nfe, float(told.sample(SEARCH, 0, 5).max())) == (2, pytest.approx(0.2))
    assert float(own.sample(SEARCH, 0, 5).max()) == pytest.approx(0.3)
    assert told.describe() != own.describe()


class Wrapped(nn.Module):
    """As denoising-diffusion-pytorch's ``GaussianDiffusion``, whose own ``forward`` is for the training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, 1)
        self.network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1))

    def draw(self, noise: Tensor) -> Tensor:
        for _ in range(4):
            noise = self.network(noise) + self.embedding.weight[0, 0]
        self.embedding(noise[:, 0, 0, :1])
        return noise


def test_calls_are_counted_if_nobody_says() -> None:
    def four(model: nn.Module, noise: Tensor) -> Tensor:
        return Wrapped.draw(model, noise)  # type: ignore[arg-type]

    def of_each_image(model: nn.Module, noise: Tensor) -> Tensor:
        return torch.cat([model.network(image[None]) for image in noise])

    def none(model: nn.Module, noise: Tensor) -> Tensor:
        return noise * model.embedding.weight

    found = []
    for network, function in ((Wrapped(), four), (Wrapped(), of_each_image), (Wrapped(), none)):
        sampler = FunctionSampler(network, function, noise=ImageNoise(0, SHAPE))
        found.append((sampler.nfe, sampler.recomputed))
    assert found == [(4, 4), (1, 0), (1, 0)]


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(1, 1, 1)

    def forward(self, t: float, x: Tensor) -> Tensor:
        return t * self.network(x)


def test_a_solver_may_look_at_the_parameters_of_the_network_s_forward() -> None:
    """As torchdyn's ``NeuralODE`` does, which calls a network without a time if it sees none."""

    def solve(model: nn.Module, noise: Tensor) -> Tensor:
        arguments = (0.5, noise) if "t" in inspect.getfullargspec(model.forward).args else (noise,)
        return model(*arguments)

    sampler = FunctionSampler(Velocity(), solve, noise=ImageNoise(0, SHAPE), nfe=2)
    assert sampler.why_no_graph() is None


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("nfe", [None, 2])
def test_a_network_or_a_part_of_it_may_be_torchscript(is_part: bool, nfe: int | None) -> None:
    def two(model: nn.Module, noise: Tensor) -> Tensor:
        return model(model(noise))

    network: Any = torch.jit.script(nn.Conv2d(1, 1, 1))
    if is_part:
        network = nn.Sequential(network)
    sampler = FunctionSampler(network, two, noise=ImageNoise(0, SHAPE), nfe=nfe)
    assert sampler.why_no_graph() is None
    assert sampler.sample(SEARCH, 0, 3).shape == (3, 1, 4, 4)


def test_a_device_without_memory_does_not_mean_that_there_is_no_graph() -> None:
    def sample(model: nn.Module, noise: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        make(sample).why_no_graph()


def test_a_function_that_cannot_have_a_graph_says_so() -> None:
    """Numpy refuses tensors with one, and a user's own script calls the function under no_grad."""

    def sample(model: nn.Module, noise: Tensor) -> Tensor:
        return torch.from_numpy(model(noise).numpy())

    sampler = make(sample)
    assert "with an autograd graph" in (sampler.why_no_graph() or "")
    with torch.no_grad():
        assert sampler.sample(SEARCH, 0, 3).shape == (3, *SHAPE)


def test_calls_of_a_compiled_network_are_counted() -> None:
    def three(model: nn.Module, noise: Tensor) -> Tensor:
        for _ in range(3):
            noise = model(noise)
        return noise

    network: Any = torch.compile(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), backend="eager")
    assert FunctionSampler(network, three, noise=ImageNoise(0, SHAPE)).nfe == 3


def _adapted(*, frozen: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    network: nn.Module = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    return network.requires_grad_(not frozen)


@pytest.mark.parametrize(
    "make_network",
    [
        lambda: _adapted(frozen=True),
        lambda: _adapted(frozen=False),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1)).requires_grad_(requires_grad=False),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)),
    ],
)
def test_images_have_a_graph_to_what_is_merged_whatever_was_frozen_when_it_was_loaded(
    make_network: Callable[[], nn.Module],
) -> None:
    network = make_network()
    sampler = FunctionSampler(network, lambda model, noise: torch.tanh(noise - model(noise)), noise=NOISE)
    required = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert sampler.why_no_graph() is None
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == required
    merged = {name for name, tensor in sampler.weights.state.items() if tensor.is_floating_point()}
    names = {name for name in merged if not name.endswith(("running_mean", "running_var"))}
    with sampler.weights.differentiable(names) as leaves:
        gradients = torch.autograd.grad(sampler.sample(SEARCH, 0, 2).sum(), list(leaves.values()))
    assert len(gradients) == len(names) > 0


def test_a_sampler_that_cuts_the_graph_is_still_told_so() -> None:
    sampler = FunctionSampler(_adapted(frozen=True), lambda model, noise: model(noise).detach(), noise=NOISE)
    assert "have no autograd graph" in (sampler.why_no_graph() or "")
