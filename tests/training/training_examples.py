"""A toy network, toy data, and the shortest runs of every recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.training.consistency import ConsistencyTraining, train_consistency
from lcsc_opt.training.diffusion import DiffusionTraining, train_diffusion
from lcsc_opt.trajectory import Trajectory


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.level = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        level = self.level(c_noise[:, None].float() / 1000)
        hidden = self.norm(self.first(x)) + level[:, :, None, None]
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


def training_images() -> Tensor:
    """Bright or dark squares."""
    signs = torch.randint(2, (64, 1, 1, 1), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    return signs * torch.full((64, 1, 4, 4), 0.5)


IMAGES = training_images()
TINY_CONSISTENCY = ConsistencyTraining(steps=20, checkpoint_every=4, batch_size=8, last_discretization=40)
TINY_DIFFUSION = DiffusionTraining(steps=20, checkpoint_every=4, batch_size=8)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its shortest run."""

    train_function: Callable[..., Trajectory]
    tiny: Any

    def train(self, path: Path, *, build: Callable[[], nn.Module] = ToyNetwork, **changes: Any) -> Trajectory:
        training = dataclasses.replace(self.tiny, **changes)
        return self.train_function(build, IMAGES, training=training, path=path)


RECIPES = {
    "consistency": Recipe(train_consistency, TINY_CONSISTENCY),
    "diffusion": Recipe(train_diffusion, TINY_DIFFUSION),
}
