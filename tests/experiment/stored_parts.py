"""A small network with its sampler and features, for studies that are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS = (10, 20, 30, 40, 50, 60)


class Network(nn.Module):
    """Two layers that turn noise into images of 1 × 4 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(8, 16)

    def forward(self, noise: Tensor) -> Tensor:
        """``[N, 1, 4, 4]`` → images of the same shape in [-1, 1]."""
        hidden = torch.tanh(self.first(noise.flatten(1)))
        return torch.tanh(self.second(hidden)).reshape(noise.shape)


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """One call of the model."""
    images: Tensor = model(noise)
    return images


class Means:
    """Eight sums of pixels as features."""

    name = "means"
    dimension = 8

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, 4, 4]`` → ``[B, 8]``."""
        return images[:, 0].reshape(len(images), 8, 2).sum(dim=2)


class Rows:
    """Four sums of pixels as features."""

    name = "rows"
    dimension = 4

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, 4, 4]`` → ``[B, 4]``."""
        return images[:, 0].sum(dim=2)


def write_checkpoints(folder: Path) -> None:
    """The same bits on every machine: weights are fractions of integers."""
    folder.mkdir()
    for step in STEPS:
        weights = {}
        for name, tensor in Network().state_dict().items():
            numbers = torch.arange(tensor.numel(), dtype=torch.int64)
            mixed = (numbers * 7919 + step * 104_729 + len(name) * 15_485_863) % 257
            weights[name] = ((mixed - 128) / 256).reshape(tensor.shape).float()
        save_file(weights, folder / f"model-{step:06d}.safetensors")


def write_images(folder: Path) -> None:
    """Real images: 40 PNG files of 4 × 4 pixels."""
    folder.mkdir()
    for number in range(40):
        pixels = (np.arange(16) * 31 + number * 97 + (np.arange(16) * number) % 53) % 256
        Image.fromarray(pixels.astype(np.uint8).reshape(4, 4)).save(folder / f"{number:02d}.png")
