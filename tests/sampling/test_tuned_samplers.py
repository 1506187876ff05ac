"""Numbers that are tuned: images are those of the same settings, and those of the settings come back."""

from __future__ import annotations

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

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOW_LEVELS = {
    "_class_name": "DPMSolverMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
}
EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}
DDIM = {"_class_name": "DDIMScheduler", "prediction_type": "sample"}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 3.0}


def scheduled(config: dict[str, Any], *, step: dict[str, Any] | None = None, **changes: Any) -> DiffusersSampler:
    network: Any = Smooth().double()
    if config is EDM:
        network = RawOutput(EdmDenoiser(network), sigma_data=0.5)
    scheduler = build_scheduler(None, config, changes)
    return DiffusersSampler(
        network, scheduler, steps=4, image_shape=SHAPE, noise=ImageNoise(0), step_options=step, settings=CPU
    )


def images(sampler: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = sampler.sample(SEARCH, 0, 3)
    return made


@pytest.mark.parametrize(
    ("config", "name", "value", "is_step"),
    [
        (FLOW, "shift", 3.0, False),
        (FLOW_LEVELS, "flow_shift", 3.0, False),
        (EDM, "sigma_min", 0.05, False),
        (EULER, "s_churn", 1.2, True),
        (DDIM, "eta", 0.6, True),
    ],
)
def test_a_tuned_number_gives_the_images_of_that_setting(
    config: dict[str, Any], name: str, value: float, is_step: bool
) -> None:
    sampler = scheduled(config)
    plain = images(sampler)
    described = sampler.describe()
    assert sampler.tunable[name].value != value
    sampler.tune({name: value})
    tuned = images(sampler)
    setting = {"step": {name: value}} if is_step else {name: value}
    torch.testing.assert_close(tuned, images(scheduled(config, **setting)), rtol=0, atol=0)
    assert (tuned - plain).abs().max() > 1e-3
    assert sampler.describe() == described
    sampler.tune({})
    torch.testing.assert_close(images(sampler), plain, rtol=0, atol=0)


def test_only_numbers_that_a_scheduler_uses_can_be_tuned() -> None:
    assert set(scheduled(FLOW).tunable) == {"shift"}  # its s_churn is an argument that it ignores
    assert set(scheduled(EULER).tunable) == {"s_churn"}
    assert set(scheduled({"_class_name": "DPMSolverMultistepScheduler"}).tunable) == set()
    assert set(diffusers(Smooth(), "dpm-solver++", guided=True).tunable) == {
        "guidance",
        "guidance_low",
        "guidance_high",
    }


def test_guidance_acts_in_its_interval_only() -> None:
    """DDIM's four steps are at 0.75, 0.5, 0.25 and 0 of the training; a step outside has half of the calls."""
    network = Smooth().double()
    sampler = diffusers(network, "ddim", guided=True)
    everywhere = images(sampler)
    assert (sampler.nfe, sampler.recomputed) == (8, 6)
    sampler.tune({"guidance_low": 0.6, "guidance_high": 0.7})
    nowhere = images(sampler)
    assert (sampler.nfe, sampler.recomputed) == (4, 3)
    conditional = ClassLabels(2, "balanced", noise=ImageNoise(0))
    torch.testing.assert_close(nowhere, images(diffusers(network, "ddim", labels=conditional)))
    sampler.tune({"guidance_low": 0.2, "guidance_high": 0.6})
    between = images(sampler)
    assert (sampler.nfe, sampler.recomputed) == (6, 5)
    for other in (everywhere, nowhere):
        assert (between - other).abs().max() > 1e-4
    of_settings = diffusers(network, "ddim", guided=True, guidance_interval=(0.2, 0.6))
    torch.testing.assert_close(between, images(of_settings), rtol=0, atol=0)
    assert of_settings.describe() != sampler.describe()


def test_schedulers_of_edm_have_no_interval_in_shares_of_timesteps() -> None:
    def guided(**options: Any) -> DiffusersSampler:
        labels = ClassLabels(2, "balanced", noise=ImageNoise(0), guidance=(1.5, 2))
        network: Any = RawOutput(EdmDenoiser(Smooth().double()), sigma_data=0.5)
        scheduler = build_scheduler(None, EDM)
        return DiffusersSampler(
            network,
            scheduler,
            steps=4,
            image_shape=SHAPE,
            noise=ImageNoise(0),
            labels=labels,
            settings=CPU,
            **options,
        )

    assert "guidance" in guided().tunable
    assert not {"guidance_low", "guidance_high"} & guided().tunable.keys()
    with pytest.raises(ObjectiveError, match=r"guidance_interval: EDM\w+ has no timesteps"):
        guided(guidance_interval=(0.2, 0.6))


def test_the_interval_of_edm_is_between_noise_levels() -> None:
    network = Smooth().double()
    guide = Smooth(seed=9).double()
    plain = images(heun(network))
    guided = heun(network, guide=guide, guidance=1.6)
    everywhere = images(guided)
    guided.tune({"guidance_low": 10.0})  # the levels begin at 3
    torch.testing.assert_close(images(guided), plain)
    guided.tune({"guidance_high": 1.0})
    below = images(guided)
    of_settings = heun(network, guide=guide, guidance=1.6, interval=(0.0, 1.0))
    torch.testing.assert_close(below, images(of_settings), rtol=0, atol=0)
    assert of_settings.describe() != guided.describe()
    for other in (everywhere, plain):
        assert (below - other).abs().max() > 1e-4
    guided.tune({})
    torch.testing.assert_close(images(guided), everywhere, rtol=0, atol=0)


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
    sampler.tune({"guidance": 2.5})
    torch.testing.assert_close(images(sampler), images(autoguided(network, weak, 2.5)), rtol=0, atol=0)
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
