"""Guidance: classifier-free, in an interval, and away from a weak model (autoguidance)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH
from lcsc_opt.sampling import (
    Autoguidance,
    ClassLabels,
    DiffusersSampler,
    EdmDenoiser,
    ImageNoise,
    RawOutput,
    build_scheduler,
)
from tests.sampling.test_gradient_sampling import CPU, SHAPE, Smooth, diffusers, gradient, heun, objective

EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 3.0}


def images(sampler: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = sampler.sample(SEARCH, 0, 3)
    return made


def test_guidance_acts_in_its_interval_only() -> None:
    """DDIM's four steps are at 0.75, 0.5, 0.25 and 0 of the training; a step outside has half of the calls."""
    network = Smooth().double()
    sampler = diffusers(network, "ddim", guided=True)
    everywhere = images(sampler)
    assert (sampler.nfe, sampler.recomputed) == (8, 6)
    outside = diffusers(network, "ddim", guided=True, guidance_interval=(0.6, 0.7))
    nowhere = images(outside)
    assert (outside.nfe, outside.recomputed) == (4, 3)
    conditional = ClassLabels(2, "balanced", noise=ImageNoise(0))
    torch.testing.assert_close(nowhere, images(diffusers(network, "ddim", labels=conditional)))
    inside = diffusers(network, "ddim", guided=True, guidance_interval=(0.2, 0.6))
    between = images(inside)
    assert (inside.nfe, inside.recomputed) == (6, 5)
    for other in (everywhere, nowhere):
        assert (between - other).abs().max() > 1e-4
    assert inside.describe() != sampler.describe()


def test_schedulers_of_edm_have_no_interval_in_shares_of_timesteps() -> None:
    with pytest.raises(ObjectiveError, match=r"guidance_interval: EDM\w+ has no timesteps"):
        DiffusersSampler(
            RawOutput(EdmDenoiser(Smooth().double()), sigma_data=0.5),
            build_scheduler(None, EDM),
            steps=4,
            image_shape=SHAPE,
            noise=ImageNoise(0),
            labels=ClassLabels(2, "balanced", noise=ImageNoise(0), guidance=(1.5, 2)),
            settings=CPU,
            guidance_interval=(0.2, 0.6),
        )


def test_the_interval_of_edm_is_between_noise_levels() -> None:
    network = Smooth().double()
    guide = Smooth(seed=9).double()
    plain = images(heun(network))
    guided = heun(network, guide=guide, guidance=1.6)
    everywhere = images(guided)
    above_all = heun(network, guide=guide, guidance=1.6, interval=(10.0, math.inf))  # the levels begin at 3
    torch.testing.assert_close(images(above_all), plain)
    low = heun(network, guide=guide, guidance=1.6, interval=(0.0, 1.0))
    below = images(low)
    assert low.describe() != guided.describe()
    for other in (everywhere, plain):
        assert (below - other).abs().max() > 1e-4


def autoguided(network: Smooth, weak: Smooth, scale: float) -> Any:
    module = Autoguidance(network, weak, guidance=scale)
    return diffusers(module, "ddim", trained=network, calls=module.calls)


def test_autoguidance_leads_away_from_the_weak_model() -> None:
    network = Smooth().double()
    weak = Smooth(seed=5).double()
    torch.testing.assert_close(images(autoguided(network, weak, 1.0)), images(diffusers(network, "ddim")))
    torch.testing.assert_close(images(autoguided(network, weak, 0.0)), images(diffusers(weak, "ddim")))
    sampler = autoguided(network, weak, 1.0)
    assert sampler.nfe == 8
    beyond = images(autoguided(network, weak, 2.5))
    assert (beyond - images(sampler)).abs().max() > 1e-4
    assert autoguided(network, Smooth(seed=6).double(), 1.0).describe() != sampler.describe()


def test_the_weak_model_gets_no_merged_weights() -> None:
    network = Smooth().double()
    weak = Smooth(seed=5).double()
    sampler = autoguided(network, weak, 2.0)
    sampler.load(Smooth(seed=7).double().state_dict())
    torch.testing.assert_close(images(sampler), images(autoguided(Smooth(seed=7).double(), weak, 2.0)))


def test_the_gradient_of_autoguidance_is_the_finite_difference() -> None:
    network = Smooth().double()
    sampler = autoguided(network, Smooth(seed=5).double(), 1.7)
    names = list(network.state_dict())
    found = gradient(sampler, names)
    assert set(found) == {name for name in names if name != "classes.weight"}
    direction = {name: torch.randn(part.shape, dtype=part.dtype) for name, part in found.items()}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def moved(step: float) -> float:
        sampler.load({name: value + step * direction.get(name, 0.0) for name, value in before.items()})
        with torch.no_grad():
            return float(objective(sampler))

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    product = sum(float((found[name] * direction[name]).sum()) for name in found)
    assert product == pytest.approx(difference, rel=1e-5)
