from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.sampling import EdmDenoiser, HeunSampler, HeunSchedule, ImageNoise, NetworkSettings

SHAPE = (1, 4, 4)
NOISE = ImageNoise(3, SHAPE)


class Gaussian(nn.Module):
    """The exact denoiser of data that is normal: D = mean + spread^2 / (spread^2 + sigma^2) (x − mean)."""

    def __init__(self, mean: float = 0.2, spread: float = 0.15) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.spread = nn.Parameter(torch.tensor(spread))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        mean = self.mean if class_labels is None else self.mean * class_labels.argmax(1)[:, None, None, None]
        return mean + self.spread**2 / (self.spread**2 + s**2) * (x - mean)


PARTS: Any = {"noise": NOISE, "settings": NetworkSettings(device="cpu")}


def heun(network: nn.Module | None = None, **schedule: Any) -> HeunSampler:
    denoiser = network if isinstance(network, EdmDenoiser) else EdmDenoiser(network or Gaussian())
    return HeunSampler(denoiser, schedule=HeunSchedule(**schedule), **PARTS)


@torch.inference_mode()
def images(sampler: Any, noise: Noise = SEARCH, start: int = 0, stop: int = 200) -> Tensor:
    return sampler.sample(noise, start, stop)


def test_heun_is_the_one_of_diffusers() -> None:
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(use_karras_sigmas=True, prediction_type="epsilon")
    scheduler.set_timesteps(9)
    levels = scheduler.sigmas.unique().flip(0).tolist()
    sampler = heun(steps=9, sigma_max=levels[0], sigma_min=levels[-2])
    assert sampler.schedule.levels() == pytest.approx(levels, rel=1e-5)
    x = levels[0] * NOISE.batch(SEARCH, 0, 200)
    network, calls = Gaussian(), 0
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        derivative = (x - network(x, sigma.expand(200))) / sigma
        x = scheduler.step(derivative, timestep, x).prev_sample.detach()
        calls += 1
    assert calls == sampler.nfe == 17
    assert (images(sampler) - x.clamp(-1, 1)).abs().max() < 1e-5


def test_a_network_that_knows_some_noise_levels_gets_only_these() -> None:
    seen: list[float] = []

    class Rounding(Gaussian):
        def round_sigma(self, sigma: Tensor) -> Tensor:
            return sigma.log2().round().exp2()

        def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
            seen.extend(sigma.tolist())
            return super().forward(x, sigma)

    images(heun(Rounding(), steps=6, sigma_min=0.01, sigma_max=30.0), stop=1)
    assert len(seen) == 11
    assert all(math.log2(sigma).is_integer() for sigma in seen)


def test_guidance_leads_away_from_the_guide() -> None:
    """Of two normal distributions of the same spread, guided D is that of mean_guide + guidance (mean − mean_guide)."""
    denoiser = EdmDenoiser(Gaussian(0.2, 0.05), guide=Gaussian(0.1, 0.05), guidance=3.0)
    sampler = heun(denoiser, steps=30)
    assert float(images(sampler).mean()) == pytest.approx(0.4, abs=0.01)
    sampler.load(Gaussian(0.3, 0.05).state_dict())  # into the network, not into its guide
    assert float(images(sampler).mean()) == pytest.approx(0.7, abs=0.01)
