"""An objective that a worker imports quickly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.scorer import Draw
from tests.objectives.image_objectives import build


def small(device: str, folder: Path, **changes: Any) -> MergeSampleScore:
    """A network with a convolution and batch normalization, on 8×8 images; KID keeps all features, FID moments."""
    shared = {
        "image_shape": [1, 8, 8],
        "sampler": "tests.accelerators.small_objective:sample",
        "checkpoints": "model*.pt",
    }
    own = {"model": "tests.accelerators.small_objective:Network", "device": device}
    return build("torch_module.py", folder, **{**shared, **own, **changes})


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    return torch.tanh(model(noise))


def score(model: nn.Module, draw: Draw) -> Tensor:
    """How large its answers to random images are."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(draw.seed))
    return model(images.to(next(model.parameters()).device)).square().mean()


class WithDevice(Objective):
    """The loss of a small objective, and the number of the device that it was computed on."""

    steps, samples = (10, 20, 30), Samples(per_evaluation=24)

    def __init__(self, folder: Path) -> None:
        self.inner = small("auto", folder)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        found = self.inner.evaluate(candidate)
        name = torch.get_device_module(self.inner.device).get_device_name(self.inner.device)
        return dataclasses.replace(found, metrics={**found.metrics, "device": float(name.split()[-1])})

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()
