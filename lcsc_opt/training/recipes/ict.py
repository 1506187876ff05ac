"""Improved consistency training (Song & Dhariwal 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.training.consistency import (
    ConsistencyTraining,
    consistency_loss,
    discretization,
    interval_probabilities,
)
from lcsc_opt.training.recipes.base import Batch, Count, Finite, Kind, Positive, Recipe, consistency_scheduler


class Ict(Recipe):
    """Student and teacher are one network, compared by the pseudo-Huber loss: Eq. 7 and Table 1.

    The paper's 80 for ``sigma_max`` and 1280 for ``last_discretization`` are for 32×32 images and 400,000 steps.

    Attributes:
        sigma_min: lowest noise level.
        sigma_max: highest one.
        sigma_data: the data's standard deviation.
        first_discretization: s0, noise levels at the start.
        last_discretization: s1, noise levels at the end.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
    """

    name: ClassVar[str] = "ict"
    kind: ClassVar[Kind] = "consistency"
    begins_from: ClassVar[tuple[Kind, ...]] = ("consistency", "edm")
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "RAdam"
    curriculum: ClassVar[bool] = True

    sigma_min: Positive = 0.002
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5
    first_discretization: Count = 10
    last_discretization: Count = 160
    noise_mean: Finite = -1.1
    noise_std: Positive = 2.0

    def loss(self, batch: Batch) -> Tensor:
        """Eq. 7: E d(f(x + sigma_{i+1} z, sigma_{i+1}), f(x + sigma_i z, sigma_i)) / (sigma_{i+1} - sigma_i)."""
        function = ConsistencyFunction(
            batch.network, sigma_data=self.sigma_data, sigma_min=self.sigma_min, noise_scale=batch.noise_scale
        )
        levels, weights = self.levels(batch.step, batch.steps)
        return consistency_loss(function, batch.images, levels, weights, batch.generator)

    def levels(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels ``[n + 1]``, increasing, and the chances ``[n]`` of the intervals between them at a step."""
        training = ConsistencyTraining(
            steps=steps,
            first_discretization=self.first_discretization,
            last_discretization=self.last_discretization,
            noise_mean=self.noise_mean,
            noise_std=self.noise_std,
        )
        count = discretization(step, training)
        levels = noise_levels(count + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return levels, interval_probabilities(levels, training)

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling."""
        return consistency_scheduler(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)

    @property
    def sampler(self) -> dict[str, Any]:
        """One step."""
        return {"steps": 1}
