"""The consistency function and its noise levels: their equations, and diffusers' scheduler as reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels

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
