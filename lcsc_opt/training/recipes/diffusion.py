"""Recipes of models that are sampled in many steps: DDPM, EDM and flow matching."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.settings import Count, Finite, Positive
from lcsc_opt.sampling.base import network_output
from lcsc_opt.sampling.consistency import EDM_NOISE
from lcsc_opt.training.recipes.base import Batch, TrainingRecipe, column

_FLOW_TIMESTEPS = 1000  # the timestep of a network of diffusers is 1000 times the share of noise


class Ddpm(TrainingRecipe):
    """Denoising diffusion: the mean squared error of the predicted noise (Ho et al. 2020, Eq. 14, L_simple).

    Attributes:
        timesteps: T.
        beta_schedule: ``linear`` (Sec. 4), or the cosine of Nichol & Dhariwal 2021, with which the first steps of
            DPM-Solver++ divide by almost zero.
    """

    name = "ddpm"
    kind = "ddpm"
    begins_from = ("ddpm",)

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
    """The scheduler of diffusers that adds the noise (Ho et al. 2020, Eq. 4), made once and not in every step."""
    return import_extra("diffusers").DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=beta_schedule)


class Edm(TrainingRecipe):
    """The weighted squared error of the denoised image (Karras et al. 2022, Eq. 2 and Table 1, last column).

    Attributes:
        sigma_min: lowest noise level of sampling.
        sigma_max: highest noise level of sampling; 80 is made for 32×32 images and larger.
        sigma_data: the data's standard deviation.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
    """

    name = "edm"
    kind = "edm"
    begins_from = ("edm",)
    noise_scale = EDM_NOISE

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5
    noise_mean: Finite = -1.2
    noise_std: Positive = 1.2

    def loss(self, batch: Batch) -> Tensor:
        """E lambda(sigma) |D(y + n; sigma) - y|^2, ln(sigma) ~ N(P_mean, P_std^2).

        lambda(sigma) is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        """
        normal = torch.randn(len(batch.images), generator=batch.generator, device=batch.images.device)
        sigma = (normal * self.noise_std + self.noise_mean).exp()
        denoised = batch.function(self.sigma_data)(batch.images + column(sigma) * batch.normal(), sigma)
        weight = column((sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2)
        loss: Tensor = (weight * (denoised - batch.images).square()).mean()
        return loss

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ between EDM's noise levels (Karras et al. 2022, Eq. 5, of which ``rho`` is 7)."""
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
            "rho": 7.0,
        }


class Flow(TrainingRecipe):
    """Flow matching: the velocity of straight paths between noise and images (Lipman et al. 2023).

    The share of noise is s = 1 - t of the paper, and the network's output is noise - image, minus its velocity: both as
    in diffusers' schedulers.
    """

    name = "flow"
    kind = "flow"
    begins_from = ("flow",)

    def loss(self, batch: Batch) -> Tensor:
        """E |v(x_t, t) - (x_1 - x_0)|^2, x_t = (1 - t) x_0 + t x_1 (Lipman et al. 2023, Eq. 23 with sigma_min 0)."""
        noise = batch.normal()
        share = torch.rand(len(noise), generator=batch.generator, device=noise.device)
        mixed = column(share) * noise + column(1 - share) * batch.images
        velocity = network_output(batch.network, mixed, _FLOW_TIMESTEPS * share)
        return (velocity - (noise - batch.images)).square().mean()

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ on the flow's levels."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
            "num_train_timesteps": _FLOW_TIMESTEPS,
        }
