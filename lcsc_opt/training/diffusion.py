"""Denoising diffusion training (Ho et al. 2020), leaving a trajectory of checkpoints behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.sampling.consistency import network_output
from lcsc_opt.training.on_demand import Training, train, training_key
from lcsc_opt.trajectory import Trajectory

RECIPE = "diffusion 1"  # raise it when the same settings would train another model


@dataclasses.dataclass(frozen=True)
class DiffusionTraining(Training):
    """Settings of one training run: those of every recipe, and the noise schedule in diffusers' words.

    Attributes:
        timesteps: T, how many noise levels there are.
        beta_schedule: how noise grows with the timestep: ``linear`` as in Ho et al. 2020, or ``squaredcos_cap_v2``, the
            cosine of Nichol & Dhariwal 2021. With the cosine, first steps of DPM-Solver++ divide by almost zero.
    """

    timesteps: int = 1000
    beta_schedule: str = "linear"

    def key(self, network: str) -> str:
        """A name for the trajectory that these settings train with a network of this description."""
        return training_key(RECIPE, network, self)

    def schedule(self) -> dict[str, Any]:
        """The training's settings as keyword arguments of a scheduler of diffusers."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_schedule": self.beta_schedule,
            "prediction_type": "epsilon",
        }


class NoiseSchedule(Protocol):
    """The part of diffusers' training schedulers that a loss needs."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon`` (Ho et al. 2020, Eq. 4)."""
        ...


def diffusion_loss(
    network: nn.Module, images: Tensor, schedule: NoiseSchedule, timesteps: int, generator: torch.Generator
) -> Tensor:
    """One batch's loss: the mean squared error of the predicted noise (Ho et al. 2020, Eq. 14).

    Args:
        network: ``(x_t [N, C, H, W], t [N]) -> epsilon [N, C, H, W]``.
        images: ``[N, C, H, W]`` in [-1, 1].
        schedule: adds the noise.
        timesteps: T; t is drawn uniformly from 0 to T - 1.
        generator: of the timesteps and the noise.

    Returns:
        A scalar.
    """
    t = torch.randint(timesteps, (len(images),), generator=generator, device=images.device)
    epsilon = torch.randn(images.shape, generator=generator, device=images.device)
    return F.mse_loss(network_output(network, schedule.add_noise(images, epsilon, t), t), epsilon)


def train_diffusion(
    build_network: Callable[[], nn.Module],
    images: Tensor,
    *,
    training: DiffusionTraining,
    path: Path,
    description: str = "training",
) -> Trajectory:
    """The trajectory at ``path``, trained first if it does not exist; see :func:`on_demand.train`.

    Args:
        build_network: makes a network that predicts noise.
        images: ``[n, C, H, W]`` training images in [-1, 1].
        training: settings.
        path: of the trajectory.
        description: what the progress bar says.

    Raises:
        TrajectoryError: diffusers has no such noise schedule, the settings leave fewer than two checkpoints,
            the training diverged, or the path cannot be written.
    """
    schedule = noise_schedule(training)

    def loss(network: nn.Module, batch: Tensor, _step: int, generator: torch.Generator) -> Tensor:
        return diffusion_loss(network, batch, schedule, training.timesteps, generator)

    return train(build_network, images, training=training, loss=loss, path=path, description=description)


def noise_schedule(training: DiffusionTraining) -> NoiseSchedule:
    """The scheduler of diffusers that the training uses.

    Raises:
        TrajectoryError: diffusers does not know the schedule.
    """
    from diffusers import DDPMScheduler

    try:
        schedule: NoiseSchedule = cast("Any", DDPMScheduler)(**training.schedule())
    except NotImplementedError as error:
        raise TrajectoryError(f"beta_schedule: {error}; take 'squaredcos_cap_v2' or 'linear'") from error
    return schedule
