"""A distance between sets of features, and features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def energy(samples: Tensor, real: Tensor) -> Tensor:
    """The energy distance (Székely and Rizzo 2013) of ``[N, D]`` and ``[M, D]`` features."""
    across = torch.cdist(samples, real).mean()
    within = torch.cdist(samples, samples).mean() + torch.cdist(real, real).mean()
    return 2 * across - within


energy.differentiable = True  # type: ignore[attr-defined]


class Patches:
    """The mean grey of the four quarters of an image."""

    name = "patches-1"
    dimension = 4

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, 4]``."""
        return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)
