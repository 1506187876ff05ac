"""Half types and channels-last through every sampler: nearly the same images, and float32 outside of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.records import SEARCH
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
from tests.unet_examples import unet

SHAPE = (3, 8, 8)
NOISE = ImageNoise(0)


class Denoiser(nn.Module):
    """Called as EDM's networks are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.network(x / (1 + sigma[:, None, None, None]), sigma.log()).sample
        return images


def consistency(settings: NetworkSettings) -> Any:
    function = ConsistencyFunction(unet(channels=3))
    return ConsistencySampler(function, image_shape=SHAPE, sigmas=(5.0, 1.0), noise=NOISE, settings=settings)


def diffusers(name: Any) -> Callable[[NetworkSettings], Any]:
    def build(settings: NetworkSettings) -> Any:
        scheduler = build_scheduler(name, {})
        return DiffusersSampler(unet(channels=3), scheduler, steps=3, image_shape=SHAPE, noise=NOISE, settings=settings)

    return build


def heun(settings: NetworkSettings) -> Any:
    denoiser = EdmDenoiser(Denoiser(unet(channels=3)))
    schedule = HeunSchedule(steps=3, sigma_max=3.0)
    return HeunSampler(denoiser, schedule=schedule, image_shape=SHAPE, noise=NOISE, settings=settings)


def function(settings: NetworkSettings) -> Any:
    def sample(model: Any, noise: Tensor) -> Tensor:
        return torch.tanh(model(noise, torch.ones(len(noise))).sample)

    return FunctionSampler(unet(channels=3), sample, image_shape=SHAPE, nfe=1, noise=NOISE, settings=settings)


SAMPLERS: dict[str, Callable[[NetworkSettings], Any]] = {
    "consistency": consistency,
    "DDIM": diffusers("ddim"),
    "DPM-Solver++": diffusers("dpm-solver++"),
    "Heun": heun,
    "a function": function,
}


@torch.no_grad()
def sampled(name: str, **settings: Any) -> Tensor:
    images: Tensor = SAMPLERS[name](NetworkSettings("cpu", **settings)).sample(SEARCH, 0, 5)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    return images


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_types_and_channels_last_change_no_more_than_rounding(name: str) -> None:
    exact = sampled(name)
    assert exact.std() > 0.01

    def change(**settings: Any) -> float:
        return float((sampled(name, **settings) - exact).norm() / exact.norm())

    assert change(channels_last=True) < 1e-5
    assert 0 < change(dtype="bf16") < 0.05
    assert 0 < change(dtype="fp16", channels_last=True) < 0.01
