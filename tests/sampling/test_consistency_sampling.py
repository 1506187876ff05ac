"""The consistency function and sampler: their equations, and diffusers' scheduler as reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Noise
from lcsc_opt.sampling import ConsistencyFunction, ConsistencySampler, ImageNoise, Sampler, noise_levels

SHAPE = (1, 4, 4)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
levels = st.floats(0.0021, 80.0)


class ToyNetwork(nn.Module):
    """Mixes pixels, shifted by the noise level; keeps what it was called with."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), c_noise.detach().clone()))
        return self.linear(x.flatten(1) + c_noise[:, None] / 1000).view_as(x)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed))


def sampler(
    *sigmas: float, network: nn.Module | None = None, noise_seed: int = 0, **settings: Any
) -> ConsistencySampler:
    function = ConsistencyFunction(network or ToyNetwork(), **settings)
    return ConsistencySampler(function, image_shape=SHAPE, sigmas=sigmas or (80.0,), noise=ImageNoise(noise_seed))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def diffusers_scheduler(**config: Any) -> Any:
    from diffusers.schedulers import scheduling_consistency_models

    return scheduling_consistency_models.CMStochasticIterativeScheduler(**config)


# the consistency function


def test_it_is_the_identity_at_sigma_min() -> None:
    x = images(5)
    for sigma_min in (0.002, 0.01):
        function = ConsistencyFunction(ToyNetwork(), sigma_min=sigma_min)
        assert torch.equal(function(x, torch.full((5,), sigma_min)), x)


@given(levels, st.floats(0.1, 2.0), st.integers(0, 1000))
def test_it_preconditions_as_song_et_al_write(sigma: float, sigma_data: float, seed: int) -> None:
    network, x = ToyNetwork(seed).double(), images(3, seed).double()
    found = ConsistencyFunction(network, sigma_data=sigma_data)(x, torch.full((3,), sigma, dtype=torch.float64))
    c_skip = sigma_data**2 / ((sigma - SIGMA_MIN) ** 2 + sigma_data**2)
    c_out = sigma_data * (sigma - SIGMA_MIN) / math.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    expected = c_skip * x + c_out * network(c_in * x, torch.full((3,), 1000 / 4 * math.log(sigma)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_every_image_has_its_own_level() -> None:
    function, x = ConsistencyFunction(ToyNetwork()), images(3)
    sigma = torch.tensor([0.002, 1.0, 80.0])
    apart = [function(x[i : i + 1], sigma[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(function(x, sigma), torch.cat(apart))


@given(levels)
def test_scalings_agree_with_diffusers(sigma: float) -> None:
    scheduler = diffusers_scheduler()
    network, x = ToyNetwork(), images(2)
    found = ConsistencyFunction(network)(x, torch.full((2,), sigma))
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma))
    scaled, c_noise = network.calls[-1]
    torch.testing.assert_close(scaled, x / (sigma**2 + 0.25) ** 0.5)
    assert c_noise.tolist() == pytest.approx([float(scheduler.sigma_to_t(sigma))] * 2, rel=1e-5, abs=1e-3)
    torch.testing.assert_close(found, c_skip * x + c_out * network(scaled, c_noise))


def test_a_network_of_diffusers_that_wraps_its_output_is_unwrapped() -> None:
    class Wrapped(ToyNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Any:
            class Output:
                sample = super(Wrapped, self).forward(x, c_noise)

            return Output()

    x, sigma = images(2), torch.ones(2)
    assert torch.equal(ConsistencyFunction(Wrapped())(x, sigma), ConsistencyFunction(ToyNetwork())(x, sigma))


# noise levels


@given(st.integers(2, 200), st.floats(1e-3, 0.1), st.floats(1.0, 100.0), st.floats(1.0, 10.0))
def test_noise_levels_follow_karras_et_al(count: int, low: float, high: float, rho: float) -> None:
    found = noise_levels(count, sigma_min=low, sigma_max=high, rho=rho)
    # Karras et al. 2022, Eq. 5, counts from the highest level down
    expected = [
        (high ** (1 / rho) + i / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(count)
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected[::-1], rel=1e-9)
    assert (found.diff() > 0).all()


@given(st.integers(2, 100))
def test_noise_levels_agree_with_diffusers(count: int) -> None:
    scheduler = diffusers_scheduler(num_train_timesteps=count, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    found = noise_levels(count, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    assert found.flip(0).tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-9)


# sampling


def test_one_step_is_one_call_on_noise_of_the_highest_level() -> None:
    network = ToyNetwork()
    one_step = sampler(80.0, network=network)
    z = ImageNoise(0).batch(SEARCH, 3, 9, SHAPE)
    expected = ConsistencyFunction(network)(80.0 * z, torch.full((6,), 80.0)).clamp(-1, 1)
    network.calls.clear()
    assert torch.equal(one_step.sample(SEARCH, 3, 9), expected)
    assert (len(network.calls), one_step.nfe) == (1, 1)


def test_several_steps_add_noise_and_denoise_again() -> None:
    network, sigma_min = ToyNetwork(), 0.3
    function, noise = ConsistencyFunction(network, sigma_min=sigma_min), ImageNoise(0)
    x = function(80.0 * noise.batch(SEARCH, 0, 4, SHAPE, draw=0), torch.full((4,), 80.0))
    for draw, sigma in ((1, 5.0), (2, 0.5)):
        z = noise.batch(SEARCH, 0, 4, SHAPE, draw=draw)
        x = function(x + math.sqrt(sigma**2 - sigma_min**2) * z, torch.full((4,), sigma))
    network.calls.clear()
    three_steps = sampler(80.0, 5.0, 0.5, network=network, sigma_min=sigma_min)
    torch.testing.assert_close(three_steps.sample(SEARCH, 0, 4), x.clamp(-1, 1))
    assert (len(network.calls), three_steps.nfe) == (3, 3)


def test_steps_of_one_image_have_independent_noise() -> None:
    class Zero(ToyNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return 0 * super().forward(x, c_noise)

    # with a network that gives zeros, what it is called with tells the noise of each step
    network = Zero()
    sampler(80.0, 20.0, 10.0, network=network).sample(SEARCH, 0, 500)
    inputs = torch.stack([x.flatten() for x, _ in network.calls])
    correlations = torch.corrcoef(inputs)[~torch.eye(3, dtype=torch.bool)]
    assert correlations.abs().max() < 5 / inputs.shape[1] ** 0.5


def test_several_steps_agree_with_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers_scheduler(num_train_timesteps=40, clip_denoised=False)
    scheduler.set_timesteps(timesteps=[30, 22, 0])
    sigmas = scheduler.sigmas[:-1].tolist()
    network, noise = ToyNetwork(), ImageNoise(0)
    draws = iter([noise.batch(SEARCH, 0, 6, SHAPE, draw=draw) for draw in (1, 2, 3)])

    from diffusers.schedulers import scheduling_consistency_models

    monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *_, **__: next(draws))
    x = sigmas[0] * noise.batch(SEARCH, 0, 6, SHAPE, draw=0)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.float().expand(6))
        x = scheduler.step(output, t, x).prev_sample
    found = sampler(*sigmas, network=network).sample(SEARCH, 0, 6)
    torch.testing.assert_close(found, x.float().clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigmas", [(80.0,), (80.0, 5.0)])
def test_an_image_depends_on_its_index_and_not_on_its_batch(sigmas: tuple[float, ...]) -> None:
    model = sampler(*sigmas)
    whole = model.sample(SEARCH, 0, 12)
    later = [model.sample(SEARCH, start, stop) for start, stop in ((7, 12), (0, 1), (1, 7))]
    torch.testing.assert_close(torch.cat([later[1], later[2], later[0]]), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.sample(SEARCH, 0, 12), whole)


@pytest.mark.parametrize("other", [HELD_OUT, Noise("search", 1)])
def test_another_group_of_noise_gives_other_images(other: Noise) -> None:
    model = sampler(80.0)
    assert not torch.isclose(model.sample(SEARCH, 0, 5), model.sample(other, 0, 5)).all(dim=(1, 2, 3)).any()


def test_images_are_within_range() -> None:
    network = ToyNetwork()
    network.linear.weight.mul_(100)
    found = sampler(80.0, network=network).sample(SEARCH, 0, 20)
    assert found.shape == (20, *SHAPE)
    assert (found.min(), found.max()) == (-1, 1)


def test_the_sampler_puts_the_network_into_evaluation() -> None:
    class Dropping(ToyNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x, c_noise), training=self.training)

    assert torch.equal(sampler(network=Dropping()).sample(SEARCH, 0, 3), sampler().sample(SEARCH, 0, 3))


def test_a_sampler_is_a_sampler() -> None:
    model: Sampler = sampler(80.0, 1.0)  # mypy's question, and that nothing is missing when it runs
    assert {name for name in vars(Sampler) if not name.startswith("_")} <= set(dir(model))


# weights and settings


def test_loaded_weights_are_those_that_sample() -> None:
    model, other = sampler(network=ToyNetwork(0)), sampler(network=ToyNetwork(1))
    assert not torch.equal(model.sample(SEARCH, 0, 3), other.sample(SEARCH, 0, 3))
    model.load(ToyNetwork(1).state_dict())
    assert torch.equal(model.sample(SEARCH, 0, 3), other.sample(SEARCH, 0, 3))


def test_loading_copies() -> None:
    weights = {name: tensor.clone() for name, tensor in ToyNetwork(1).state_dict().items()}
    model = sampler()
    model.load(weights)
    before = model.sample(SEARCH, 0, 3)
    weights["linear.weight"].zero_()
    assert torch.equal(model.sample(SEARCH, 0, 3), before)


class Weights:
    right: ClassVar[dict[str, Tensor]] = dict(ToyNetwork().state_dict())


@pytest.mark.parametrize(
    "weights",
    [
        {"linear.weight": Weights.right["linear.weight"]},
        {**Weights.right, "more": torch.zeros(1)},
        {**Weights.right, "linear.bias": torch.zeros(3)},
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_one_line(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ObjectiveError, match="the trajectory's weights do not fit the network: ") as caught:
        sampler().load(weights)
    assert "\n" not in str(caught.value)
    assert "linear.bias" in str(caught.value) or "more" in str(caught.value)


@pytest.mark.parametrize("sigmas", [[], [1.0, 1.0], [1.0, 2.0]])
def test_noise_levels_have_to_decrease(sigmas: list[float]) -> None:
    with pytest.raises(ObjectiveError, match=r"^sigmas: expected at least one noise level, decreasing"):
        ConsistencySampler(ConsistencyFunction(ToyNetwork()), image_shape=SHAPE, sigmas=sigmas, noise=ImageNoise(0))


@pytest.mark.parametrize("lowest", [0.002, 0.001, 0.0, -1.0])
def test_noise_levels_are_above_the_lowest_of_the_function(lowest: float) -> None:
    with pytest.raises(ObjectiveError, match=r"^sigmas: expected levels above 0\.002, got"):
        sampler(80.0, lowest)


def test_every_setting_that_changes_images_changes_the_fingerprint() -> None:
    base = sampler(80.0)
    others = [
        sampler(80.0, 1.0),
        sampler(40.0),
        sampler(80.0, noise_seed=1),
        sampler(80.0, sigma_data=0.6),
        sampler(80.0, sigma_min=0.01),
    ]
    for other in others:
        assert not torch.equal(other.sample(SEARCH, 0, 4), base.sample(SEARCH, 0, 4))
        assert other.describe() != base.describe()
    assert sampler(80).describe() == base.describe()
