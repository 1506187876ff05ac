"""Consistency distillation (Song et al. 2023, Alg. 2)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.sampling.consistency import noise_levels
from lcsc_opt.training.recipes.base import Batch, ConsistencyRecipe, Denoiser, Kind, column
from lcsc_opt.training.recipes.ct import squared_l2, uniform_interval


class Cd(ConsistencyRecipe):
    """The student at the upper of two noise levels, its moving average where the teacher leads to at the lower one.

    Attributes:
        levels: N, noise levels; 18 on CIFAR-10, 40 on ImageNet.
        rate: mu, of the target's moving average.
    """

    name: ClassVar[str] = "cd"
    begins_from: ClassVar[tuple[Kind, ...]] = ("edm", "consistency")
    needs: ClassVar[Literal["teacher", "from"] | None] = "teacher"

    levels: Annotated[int, Field(ge=2)] = 18
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.95

    def loss(self, batch: Batch) -> Tensor:
        """E |f(x_{t_{n+1}}, t_{n+1}) - f^-(x^phi_{t_n}, t_n)|^2 with n uniform, lambda = 1 and the squared l2 norm."""
        if batch.teacher is None:
            raise TrainingError("cd distils a diffusion model: name it with --teacher")
        levels = noise_levels(self.levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        low, high = uniform_interval(levels, batch)
        noisy = batch.images + column(high) * batch.normal()
        with torch.no_grad():
            target = self.function(batch, target=True)(heun_step(batch.teacher, noisy, high, low), low)
        return squared_l2(self.function(batch)(noisy, high) - target)

    def target_rate(self, step: int, steps: int) -> float:  # noqa: ARG002
        """Mu."""
        return self.rate


def heun_step(denoiser: Denoiser, x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """One step of Heun's method on dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, Alg. 1).

    Args:
        denoiser: D.
        x: ``[N, C, H, W]`` at the noise levels ``high``.
        high: ``[N]``.
        low: ``[N]``, above zero.

    Returns:
        ``[N, C, H, W]`` at the noise levels ``low``.
    """
    slope = (x - denoiser(x, high)) / column(high)
    euler = x + column(low - high) * slope
    end = (euler - denoiser(euler, low)) / column(low)
    return x + column(low - high) * (slope + end) / 2
