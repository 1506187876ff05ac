"""Improved consistency training (Song & Dhariwal 2023), leaving a trajectory of checkpoints behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.training.on_demand import Training, train, training_key
from lcsc_opt.trajectory import Trajectory

RECIPE = 1  # raise it when the same settings would train another model


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(Training):
    """Settings of one training run: those of every recipe, and the noise levels.

    Names as in Song & Dhariwal 2023, Table 1. ``sigma_max`` and ``last_discretization`` are 80 and 1,280 there, for
    32×32 images and 400,000 steps. They are 20 and 160 here, for 8×8 images and thousands of steps.

    Attributes:
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
        sigma_data: the data's standard deviation, for preconditioning.
        first_discretization: s0 of the curriculum, noise levels at the start.
        last_discretization: s1, noise levels at the end.
        noise_mean: P_mean of the lognormal distribution of noise levels.
        noise_std: P_std of it.
    """

    sigma_min: float = 0.002
    sigma_max: float = 20.0
    sigma_data: float = 0.5
    first_discretization: int = 10
    last_discretization: int = 160
    noise_mean: float = -1.1
    noise_std: float = 2.0

    def key(self, network: str) -> str:
        """A name for the trajectory that these settings train with a network of this description."""
        return training_key(RECIPE, network, self)

    def levels(self, step: int) -> tuple[Tensor, Tensor]:
        """Noise levels ``[n + 1]``, increasing, and the chances ``[n]`` of the intervals between them at a step."""
        count = discretization(step, self)
        levels = noise_levels(count + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return levels, interval_probabilities(levels, self)


def discretization(step: int, training: ConsistencyTraining) -> int:
    """N(k) - 1, the number of intervals between noise levels at a step: it doubles on a schedule."""
    first, last = training.first_discretization, training.last_discretization
    every = max(int(training.steps / (math.log2(last // first) + 1)), 1)
    return int(min(first * 2 ** (step // every), last))


def interval_probabilities(levels: Tensor, training: ConsistencyTraining) -> Tensor:
    """``[n]`` chance of each interval between ``[n + 1]`` noise levels under a lognormal distribution.

    The sum is below one: levels below the first and above the last are not counted.
    """
    quantiles = torch.erf((levels.log() - training.noise_mean) / (math.sqrt(2) * training.noise_std))
    return quantiles.diff() / 2


def pseudo_huber(difference: Tensor, scale: float = 0.00054) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: sqrt(|x|^2 + c^2) - c with c = ``scale`` sqrt(CHW) (Song & Dhariwal, Sec. 3.3)."""
    c = scale * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + c * c).sqrt() - c


def consistency_loss(
    function: ConsistencyFunction, images: Tensor, levels: Tensor, weights: Tensor, generator: torch.Generator
) -> Tensor:
    """One batch's loss (Eq. 7): the student at an interval's upper end, the teacher (the same network) at its lower.

    Args:
        function: student and teacher.
        images: ``[N, C, H, W]``.
        levels: ``[n + 1]`` noise levels, increasing.
        weights: ``[n]`` probabilities of the intervals.
        generator: of the noise.

    Returns:
        A scalar.
    """
    levels, device = levels.float().to(images.device), images.device
    interval = torch.multinomial(weights.to(device), len(images), replacement=True, generator=generator)
    low, high = levels[interval], levels[interval + 1]
    z = torch.randn(images.shape, generator=generator, device=device)
    with torch.no_grad():
        target = function(images + low[:, None, None, None] * z, low)
    student = function(images + high[:, None, None, None] * z, high)
    return (pseudo_huber(student - target) / (high - low)).mean()


def train_consistency(
    build_network: Callable[[], nn.Module],
    images: Tensor,
    *,
    training: ConsistencyTraining,
    path: Path,
    description: str = "training",
) -> Trajectory:
    """The trajectory at ``path``, trained first if it does not exist; see :func:`on_demand.train`.

    Args:
        build_network: makes the network that :class:`ConsistencyFunction` preconditions.
        images: ``[n, C, H, W]`` training images in [-1, 1].
        training: settings.
        path: of the trajectory.
        description: what the progress bar says.

    Raises:
        TrajectoryError: the settings leave fewer than two checkpoints, the training diverged, or the path
            cannot be written.
    """

    def loss(network: nn.Module, batch: Tensor, step: int, generator: torch.Generator) -> Tensor:
        function = ConsistencyFunction(network, sigma_data=training.sigma_data, sigma_min=training.sigma_min)
        return consistency_loss(function, batch, *training.levels(step), generator)

    return train(build_network, images, training=training, loss=loss, path=path, description=description)
