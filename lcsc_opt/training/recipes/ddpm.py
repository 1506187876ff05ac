"""Denoising diffusion (Ho et al. 2020)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.sampling.consistency import network_output
from lcsc_opt.training.recipes.base import Batch, Count, Kind, Recipe


class Ddpm(Recipe):
    """The mean squared error of the predicted noise, Eq. 14 (L_simple).

    Attributes:
        timesteps: T.
        beta_schedule: ``linear`` (Sec. 4), or the cosine of Nichol & Dhariwal 2021, with which the first steps of
            DPM-Solver++ divide by almost zero.
    """

    name: ClassVar[str] = "ddpm"
    kind: ClassVar[Kind] = "ddpm"
    begins_from: ClassVar[tuple[Kind, ...]] = ("ddpm",)

    timesteps: Count = 1000
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"

    def loss(self, batch: Batch) -> Tensor:
        """E |epsilon - epsilon_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, t)|^2, t uniform."""
        images = batch.images
        t = torch.randint(self.timesteps, (len(images),), generator=batch.generator, device=images.device)
        epsilon = batch.normal()
        noisy = _noise_schedule(self.timesteps, self.beta_schedule).add_noise(images, epsilon, t)
        return F.mse_loss(network_output(batch.network, noisy, t), epsilon)

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ on the schedule of the training."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "num_train_timesteps": self.timesteps,
            "beta_schedule": self.beta_schedule,
            "prediction_type": "epsilon",
        }


@functools.lru_cache(maxsize=8)
def _noise_schedule(timesteps: int, beta_schedule: str) -> Any:
    """The scheduler of diffusers that adds the noise (Eq. 4), made once and not in every step."""
    from diffusers import DDPMScheduler

    return cast("Any", DDPMScheduler)(num_train_timesteps=timesteps, beta_schedule=beta_schedule)
