"""Models as folders: how they were trained is told by their scheduler, and any diffusion model is a denoiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.sampling import DiffusersFolder
from lcsc_opt.training.models import TrainedModel
from tests.unet_examples import unet

BETAS = {"num_train_timesteps": 200, "beta_schedule": "linear"}


class Knowing(nn.Module):
    """Predicts perfectly for images that are all 0.3."""

    def __init__(self, predicts: str) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.predicts, self.kept = predicts, DDPMScheduler(**BETAS).alphas_cumprod

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        kept = self.kept[t.round().long()][:, None, None, None]
        noise = (x - kept.sqrt() * 0.3) / (1 - kept).sqrt()
        if self.predicts == "epsilon":
            return noise
        if self.predicts == "sample":
            return torch.full_like(x, 0.3)
        return kept.sqrt() * noise - (1 - kept).sqrt() * 0.3  # Salimans & Ho 2022


def denoiser(network: nn.Module, **config: Any) -> Any:
    folder = DiffusersFolder(Path(), {}, {**BETAS, **config})
    return TrainedModel(folder, network, "ddpm").denoiser()


def written(folder: Path, scheduler: dict[str, Any], scale: float = 1.0) -> TrainedModel:
    TrainedModel.write_config(folder, unet(0), scheduler, scale)
    TrainedModel.write_weights(folder, unet(0))
    return TrainedModel.read(folder, "--teacher")


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_a_network_of_betas_is_a_denoiser_at_any_of_its_noise_levels(predicts: str) -> None:
    made = denoiser(Knowing(predicts), prediction_type=predicts)
    t = torch.tensor([0, 1, 20, 150, 199])
    sigma = made.levels[t]
    x = 0.3 + sigma[:, None, None, None] * torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(x, sigma), torch.full_like(x, 0.3), atol=2e-3, rtol=0)


def test_noise_levels_between_two_timesteps_are_told_as_numbers_between() -> None:
    told: list[Tensor] = []

    class Recording(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            told.append(t)
            return x

    made = denoiser(Recording())
    levels = made.levels
    between = (levels[10] * levels[11]).sqrt()
    made(torch.zeros(4, 1, 2, 2), torch.stack([levels[10], between, levels[199] * 2, levels[0] / 2]))
    assert told[0].tolist() == pytest.approx([10, 10.5, 199, 0], abs=1e-3)


def test_an_edm_model_is_the_denoiser_of_its_scheduler(tmp_path: Path) -> None:
    model, network = written(tmp_path, {"_class_name": "EDMEulerScheduler", "sigma_data": 0.4}), unet(0)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    s = 1.7
    with torch.no_grad():
        found = model.denoiser()(x, torch.full((2,), s))
        norm = math.sqrt(s**2 + 0.16)
        raw = network(x / norm, torch.full((2,), math.log(s) / 4)).sample
    torch.testing.assert_close(found, 0.16 / norm**2 * x + s * 0.4 / norm * raw)
    assert model.kind == "edm"
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ({"_class_name": "DDPMScheduler"}, "ddpm"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"}, "ddpm"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "edm"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "consistency"),
    ],
)
def test_a_scheduler_tells_how_a_model_was_trained(tmp_path: Path, scheduler: Any, kind: str) -> None:
    assert written(tmp_path, scheduler).kind == kind


def test_a_consistency_model_knows_its_noise_and_is_no_teacher(tmp_path: Path) -> None:
    model = written(tmp_path, {"_class_name": "CMStochasticIterativeScheduler"}, 0.001)
    assert (model.folder.timestep_scale, model.noise_scale) == (0.001, 0.25)
    assert "timestep_scale" not in (model.folder.scheduler or {})
    with pytest.raises(TrainingError, match="is a consistency model; expected a diffusion model"):
        model.denoiser()
