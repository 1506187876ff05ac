"""Models as folders: how they were trained is told by their scheduler, and one of EDM is a denoiser."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.training.models import TrainedModel
from tests.unet_examples import unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of a network."""
    made = tmp_path_factory.mktemp("model")
    TrainedModel.write_weights(made, unet(0))
    return made


def written(folder: Path, scheduler: dict[str, Any]) -> TrainedModel:
    TrainedModel.write_config(folder, unet(0), scheduler, 1.0)
    return TrainedModel.read(folder, "--teacher")


def test_an_edm_model_is_the_denoiser_of_its_scheduler(folder: Path) -> None:
    model, network = written(folder, {"_class_name": "EDMEulerScheduler", "sigma_data": 0.4}), unet(0)
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
def test_a_scheduler_tells_how_a_model_was_trained(folder: Path, scheduler: Any, kind: str) -> None:
    assert written(folder, scheduler).kind == kind


def test_the_network_may_be_any_component_whose_configuration_is_found(folder: Path, tmp_path: Path) -> None:
    written(folder, {"_class_name": "EDMEulerScheduler"})
    shutil.copytree(folder / "unet", tmp_path / "transformer")
    shutil.copytree(folder / "scheduler", tmp_path / "scheduler")
    for place in (tmp_path, tmp_path / "transformer" / "config.json"):
        read = TrainedModel.read(place, "--from")
        torch.testing.assert_close(read.network.state_dict(), unet(0).state_dict())
