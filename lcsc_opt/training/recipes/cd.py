"""Consistency distillation (Song et al. 2023, Alg. 2)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.sampling.consistency import noise_levels
from lcsc_opt.training.recipes.base import (
    Batch,
    Denoiser,
    Kind,
    Positive,
    Recipe,
    column,
    consistency_scheduler,
)
from lcsc_opt.training.recipes.ct import consistency_function, squared_l2, uniform_interval


class Cd(Recipe):
    """The student at the upper of two noise levels, its moving average where the teacher leads to at the lower one.

    Attributes:
        sigma_min: epsilon, the lowest noise level.
        sigma_max: T, the highest one; the paper has 80.
        sigma_data: the data's standard deviation.
        levels: N, noise levels; 18 on CIFAR-10, 40 on ImageNet.
        rate: mu, of the target's moving average.
    """

    name: ClassVar[str] = "cd"
    kind: ClassVar[Kind] = "consistency"
    begins_from: ClassVar[tuple[Kind, ...]] = ("edm", "consistency")
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "RAdam"
    needs: ClassVar[Literal["teacher", "from"] | None] = "teacher"

    sigma_min: Positive = 0.002
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5
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
            target = consistency_function(batch, self, target=True)(heun_step(batch.teacher, noisy, high, low), low)
        return squared_l2(consistency_function(batch, self)(noisy, high) - target)

    def target_rate(self, step: int, steps: int) -> float:  # noqa: ARG002
        """Mu."""
        return self.rate

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling."""
        return consistency_scheduler(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)

    @property
    def sampler(self) -> dict[str, Any]:
        """One step."""
        return {"steps": 1}


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
