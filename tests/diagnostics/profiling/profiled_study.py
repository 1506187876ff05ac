"""A study over images that takes milliseconds, with every setting of sampling: any network, one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.objectives import image_objectives

SIDE, WIDTH = 8, 6
STEPS = (10, 20, 30, 40, 50)
MODULE = f"""
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, {WIDTH}, 3, padding=1), nn.SiLU(), nn.Conv2d({WIDTH}, 1, 3, padding=1))

def sample(model, noise):
    return torch.tanh(model(noise))

class Means(nn.Module):
    name, dimension = "means", 4

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

def make_extractor():
    return Means()
"""
OPERATIONS = 2 * 2 * SIDE**2 * WIDTH * 9  # of the two convolutions for one image


def state_dict(step: int) -> dict[str, Tensor]:
    """Weights of the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        first, last = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 1, 3, padding=1)
    return {
        **{f"0.{name}": tensor for name, tensor in first.state_dict().items()},
        **{f"2.{name}": tensor for name, tensor in last.state_dict().items()},
    }


def write_image_study(
    folder: Path, *, optimizers: Any = ("EMAGrid", "LCSC"), pipeline: Any = "auto", **settings: Any
) -> Path:
    """Checkpoints, the module, the reference and the study file."""
    (folder / "profiled_model.py").write_text(MODULE)
    (folder / "checkpoints").mkdir()
    for step in STEPS:
        weights = {name: tensor.contiguous() for name, tensor in state_dict(step).items()}
        save_file(weights, folder / "checkpoints" / f"model{step:06d}.safetensors")
    shared = image_objectives.settings(
        folder,
        loss="fid@profiled_model:make_extractor",
        checkpoints="checkpoints",
        model="profiled_model:network",
        sampler="profiled_model:sample",
        image_shape=[1, SIDE, SIDE],
    )
    study = {
        "name": "tiny",
        "objective": {"file": "torch_module.py", "settings": {**shared, **settings}},
        "optimizers": list(optimizers),
        "budget": {"evaluations": 30},
        "seeds": [0, 1],
        "pipeline": pipeline,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
