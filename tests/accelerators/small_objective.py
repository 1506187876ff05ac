"""A small network, and what is computed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


SAMPLED: list[tuple[bool, int]] = []  # of each batch, whether it has a graph, and how many images


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    SAMPLED.append((torch.is_grad_enabled(), len(noise)))
    return torch.tanh(model(noise))


def largest_batches() -> tuple[int, int]:
    """Images in the largest batch without a graph, and with one, since this was called last."""
    largest = [
        max([images for has_graph, images in SAMPLED if has_graph is which], default=0) for which in (False, True)
    ]
    SAMPLED.clear()
    return largest[0], largest[1]


def score(model: nn.Module, draw: Draw) -> Tensor:
    """How large its answers to random images are."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(draw.seed))
    return model(images.to(next(model.parameters()).device)).square().mean()
