"""Text-to-image pipelines with a graph: through scheduler, guidance and decoder to the weights of the U-Net."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.records import SEARCH
from lcsc_opt.sampling import DifferentiableSampler, ImageNoise
from lcsc_opt.sampling.network import NetworkSettings
from lcsc_opt.sampling.text_to_image import LatentDiffusionSampler, load_pipeline
from tests import tiny_pipelines

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipeline")
    tiny_pipelines.stable_diffusion(place).save_pretrained(place / "saved")
    return place / "saved"


def sampler(folder: Path, **changes: Any) -> LatentDiffusionSampler:
    pipeline = load_pipeline(str(folder), NetworkSettings(device="cpu"))
    chosen = {"component": "unet", "prompts": ("a cat", "the dog"), "noise": ImageNoise(3), "steps": 2, **changes}
    return LatentDiffusionSampler(pipeline, **chosen)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_gradient_is_the_directional_derivative(folder: Path, guidance_scale: float) -> None:
    made = sampler(folder, guidance_scale=guidance_scale)
    assert isinstance(made, DifferentiableSampler)
    unet = made.denoiser
    with torch.no_grad():
        plain = made.sample(SEARCH, 0, 2)
    with made.weights.differentiable(unet.state_dict().keys()) as leaves:
        images = made.sample(SEARCH, 0, 2)
        found = torch.autograd.grad(images.square().mean(), tuple(leaves.values()), allow_unused=True)
    torch.testing.assert_close(images.detach(), plain, rtol=0, atol=1e-5)  # attention has another kernel with a graph
    gradients = {name: part for name, part in zip(leaves, found, strict=True) if part is not None}
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradients.values()))
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def ahead(step: float) -> float:
        made.load({n: w + step * gradients[n] / norm if n in gradients else w for n, w in weights.items()})
        with torch.no_grad():
            return float(made.sample(SEARCH, 0, 2).double().square().mean())

    step = 2e-2
    assert (ahead(step) - ahead(-step)) / (2 * step) == pytest.approx(norm, rel=2e-2)
    modules = (part for part in made.pipeline.components.values() if isinstance(part, torch.nn.Module))
    assert all(parameter.grad is None for part in modules for parameter in part.parameters())
    assert "forward" not in vars(unet)


def test_a_lora_says_that_it_has_none(folder: Path) -> None:
    pytest.importorskip("peft")
    made = sampler(folder, component="lora")
    assert made.weights.why_no_gradient(()) == "the gradient of a LoRA in a pipeline is not known"
