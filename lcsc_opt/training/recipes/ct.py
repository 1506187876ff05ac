"""Consistency training (Song et al. 2023, Alg. 3)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lcsc_opt.sampling.consistency import noise_levels
from lcsc_opt.training.recipes.base import Batch, ConsistencyRecipe, Count, column


class Ct(ConsistencyRecipe):
    """The student at the upper of two noise levels, its moving average at the lower one, with the same noise.

    The paper's 150 for ``last_levels`` and 0.9 for ``first_rate`` are for 800,000 steps: an average of the last 700 of
    them at the end, which in a training of a few hundred steps is the network that it began with.

    Attributes:
        first_levels: s0, noise levels at the start.
        last_levels: s1, noise levels at the end.
        first_rate: mu_0, rate of the target's moving average at the start.
    """

    name: ClassVar[str] = "ct"
    curriculum: ClassVar[bool] = True

    first_levels: Annotated[int, Field(ge=2)] = 2
    last_levels: Count = 20
    first_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def loss(self, batch: Batch) -> Tensor:
        """E |f(x + t_{n+1} z, t_{n+1}) - f^-(x + t_n z, t_n)|^2 with n uniform, lambda = 1 and the squared l2 norm."""
        levels = noise_levels(
            self.level_count(batch.step, batch.steps), sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )
        low, high = uniform_interval(levels, batch)
        z = batch.normal()
        student = self.function(batch)
        with torch.no_grad():
            target = self.function(batch, target=True)(batch.images + column(low) * z, low)
        return squared_l2(student(batch.images + column(high) * z, high) - target)

    def level_count(self, step: int, steps: int) -> int:
        """N(k) of Appendix C: ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1."""
        first, last = self.first_levels, self.last_levels
        return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1

    def target_rate(self, step: int, steps: int) -> float:
        """mu(k) of Appendix C: exp(s0 ln(mu_0) / N(k))."""
        return math.exp(self.first_levels * math.log(self.first_rate) / self.level_count(step, steps))


def uniform_interval(levels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """``[N]`` lower and ``[N]`` upper ends of intervals between ``[n]`` levels, each as likely as any other."""
    levels = levels.float().to(batch.images.device)
    size = (len(batch.images),)
    lower = torch.randint(len(levels) - 1, size, generator=batch.generator, device=batch.images.device)
    return levels[lower], levels[lower + 1]


def squared_l2(difference: Tensor) -> Tensor:
    """The mean over the batch of the squared l2 norms of ``[N, C, H, W]``."""
    return difference.flatten(1).square().sum(1).mean()
