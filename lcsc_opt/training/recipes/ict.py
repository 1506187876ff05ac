"""Improved consistency training (Song & Dhariwal 2023)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lcsc_opt.training.consistency import ConsistencyTraining, consistency_loss
from lcsc_opt.training.recipes.base import Batch, ConsistencyRecipe, Count, Finite, Positive


class Ict(ConsistencyRecipe):
    """Student and teacher are one network, compared by the pseudo-Huber loss: Eq. 7 and Table 1.

    The paper's 80 for ``sigma_max`` and 1280 for ``last_discretization`` are for 32×32 images and 400,000 steps.

    Attributes:
        first_discretization: s0, noise levels at the start.
        last_discretization: s1, noise levels at the end.
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
        levels, weights = self.levels(batch.step, batch.steps)
        return consistency_loss(self.function(batch), batch.images, levels, weights, batch.generator)

    def levels(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels ``[n + 1]``, increasing, and the chances ``[n]`` of the intervals between them at a step."""
        return ConsistencyTraining(steps=steps, **self.model_dump(include=set(Ict.model_fields))).levels(step)
