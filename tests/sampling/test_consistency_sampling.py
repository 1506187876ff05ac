"""The consistency function and sampler: their equations, and diffusers' scheduler as reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH
from lcsc_opt.sampling import ConsistencyFunction, ConsistencySampler, ImageNoise, noise_levels
from lcsc_opt.sampling.consistency import EDM_NOISE

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
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def diffusers_scheduler(**config: Any) -> Any:
    from diffusers.schedulers import scheduling_consistency_models

    return scheduling_consistency_models.CMStochasticIterativeScheduler(**config)


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


@given(st.integers(2, 100))
def test_noise_levels_agree_with_diffusers(count: int) -> None:
    scheduler = diffusers_scheduler(num_train_timesteps=count, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    found = noise_levels(count, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    assert found.flip(0).tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-9)


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
    network.calls.clear()
    model = sampler(*sigmas, network=network)
    torch.testing.assert_close(model.sample(SEARCH, 0, 6), x.float().clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert len(network.calls) == model.nfe == 3


def test_every_setting_that_changes_images_changes_the_fingerprint() -> None:
    base = sampler(80.0)
    others = [
        sampler(80.0, 1.0),
        sampler(40.0),
        sampler(80.0, noise_seed=1),
        sampler(80.0, sigma_data=0.6),
        sampler(80.0, sigma_min=0.01),
        sampler(80.0, noise_scale=EDM_NOISE),
    ]
    for other in others:
        assert not torch.equal(other.sample(SEARCH, 0, 4), base.sample(SEARCH, 0, 4))
        assert other.describe() != base.describe()
    assert sampler(80).describe() == base.describe()


@pytest.mark.parametrize("sigmas", [[], [80.0, 0.001], [float("nan")]])
def test_levels_below_the_identity_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ObjectiveError, match=r"sigmas: expected .* got (an empty list|0\.001|nan)$"):
        ConsistencySampler(ConsistencyFunction(ToyNetwork()), image_shape=SHAPE, sigmas=sigmas, noise=ImageNoise(0))
