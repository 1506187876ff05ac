"""Improved consistency training (Song & Dhariwal 2023)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lcsc_opt.sampling.consistency import noise_levels
from lcsc_opt.training.recipes.base import Batch, ConsistencyRecipe, Count, Finite, Positive, column


class Ict(ConsistencyRecipe):
    """Student and teacher are one network, compared by the pseudo-Huber loss: Eq. 7 and Table 1.

    The paper's 80 for ``sigma_max`` and 1280 for ``last_discretization`` are for 32×32 images and 400,000 steps.

    Attributes:
        first_discretization: s0, intervals between noise levels at the start.
        last_discretization: s1, those at the end.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
    """

    name: ClassVar[str] = "ict"
    curriculum: ClassVar[bool] = True

    first_discretization: Count = 10
    last_discretization: Count = 160
    noise_mean: Finite = -1.1
    noise_std: Positive = 2.0

    def loss(self, batch: Batch) -> Tensor:
        """Eq. 7: E d(f(x + sigma_{i+1} z, sigma_{i+1}), f(x + sigma_i z, sigma_i)) / (sigma_{i+1} - sigma_i)."""
        low, high, _ = self.draw_interval(batch)
        z, function = batch.normal(), self.function(batch)
        with torch.no_grad():
            target = function(batch.images + column(low) * z, low)
        student = function(batch.images + column(high) * z, high)
        return (pseudo_huber(student - target) / (high - low)).mean()

    def discretization(self, step: int, steps: int) -> int:
        """N(k) - 1, the number of intervals between noise levels at a step: it doubles on a schedule."""
        first, last = self.first_discretization, self.last_discretization
        every = max(int(steps / (math.log2(last // first) + 1)), 1)
        return int(min(first * 2 ** (step // every), last))

    def levels(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels ``[n + 1]``, increasing, and the chances ``[n]`` of the intervals between them at a step.

        The chances are those of a lognormal distribution; levels below the first and above the last are not counted.
        """
        count = self.discretization(step, steps)
        levels = noise_levels(count + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        quantiles = torch.erf((levels.log() - self.noise_mean) / (math.sqrt(2) * self.noise_std))
        return levels, quantiles.diff() / 2

    def draw_interval(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``[N]`` lower and ``[N]`` upper ends of the images' intervals, and the indices ``[N]`` of these."""
        levels, chances = self.levels(batch.step, batch.steps)
        device = batch.images.device
        levels = levels.float().to(device)
        interval = torch.multinomial(chances.to(device), len(batch.images), replacement=True, generator=batch.generator)
        return levels[interval], levels[interval + 1], interval


def pseudo_huber(difference: Tensor, scale: float = 0.00054) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: sqrt(|x|^2 + c^2) - c with c = ``scale`` sqrt(CHW) (Song & Dhariwal, Sec. 3.3)."""
    c = scale * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + c * c).sqrt() - c
