"""Denoising diffusion (Ho et al. 2020)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

from torch import Tensor

from lcsc_opt.training.diffusion import DiffusionTraining, NoiseSchedule, diffusion_loss, noise_schedule
from lcsc_opt.training.recipes.base import Batch, Count, Kind, Recipe


class Ddpm(Recipe):
    """The mean squared error of the predicted noise, Eq. 14 (L_simple).

    Attributes:
        timesteps: T.
        beta_schedule: ``linear`` (Sec. 4), or the cosine of Nichol & Dhariwal 2021.
    """

    name: ClassVar[str] = "ddpm"
    kind: ClassVar[Kind] = "ddpm"
    begins_from: ClassVar[tuple[Kind, ...]] = ("ddpm",)
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "Adam"

    timesteps: Count = 1000
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"

    def loss(self, batch: Batch) -> Tensor:
        """Eq. 14: E |epsilon - epsilon_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, t)|^2."""
        schedule = _schedule(self._training())
        return diffusion_loss(batch.network, batch.images, schedule, self.timesteps, batch.generator)

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ on the schedule of the training."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            **self._training().schedule(),
        }

    def _training(self) -> DiffusionTraining:
        return DiffusionTraining(timesteps=self.timesteps, beta_schedule=self.beta_schedule)


@functools.lru_cache(maxsize=8)
def _schedule(training: DiffusionTraining) -> NoiseSchedule:
    """Made once, not in every step."""
    return noise_schedule(training)
