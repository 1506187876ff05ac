"""Easy consistency tuning (Geng et al. 2024): a diffusion model that becomes a consistency model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lcsc_opt.training.recipes.base import (
    Batch,
    Count,
    Finite,
    Kind,
    NonNegative,
    Positive,
    Recipe,
    column,
    consistency_scheduler,
)
from lcsc_opt.training.recipes.edm import denoiser, denoising_weight
from lcsc_opt.training.recipes.ict import pseudo_huber


class Ect(Recipe):
    """The network at noise level t and, without a gradient, at r < t with the same noise; r nears t in stages.

    Where r is 0 the target is the image itself, and the loss that of a diffusion model: tuning begins there.

    Attributes:
        sigma_max: where sampling begins; training draws any level.
        sigma_data: the data's standard deviation.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
        shrink: q: the gap of r and t is divided by it at every stage.
        stages: equal parts of the training, the first with q^1; the number is ours.
        gap_height: k of n(t) = 1 + k sigmoid(-b t), how much wider the gap is at little noise.
        gap_slope: b.
        huber: c / sqrt(CHW) of the loss sqrt(|x|^2 + c^2) - c; 0.00054 is that of Song & Dhariwal 2023.
    """

    name: ClassVar[str] = "ect"
    kind: ClassVar[Kind] = "consistency"
    begins_from: ClassVar[tuple[Kind, ...]] = ("edm",)
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "RAdam"
    curriculum: ClassVar[bool] = True
    needs: ClassVar[Literal["teacher", "from"] | None] = "from"

    learning_rate: Positive = 3e-4
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5
    noise_mean: Finite = -1.1
    noise_std: Positive = 2.0
    shrink: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    stages: Count = 8
    gap_height: NonNegative = 8.0
    gap_slope: NonNegative = 1.0
    huber: Positive = 0.00054

    def loss(self, batch: Batch) -> Tensor:
        """E w(t) d(f(x + t e, t), sg f(x + r e, r)) with w(t) = 1 / t^2 + 1 / sigma_data^2."""
        t = (batch.normal_each() * self.noise_std + self.noise_mean).exp()
        r = self.lower_level(t, batch.step, batch.steps)
        noise = batch.normal()
        function = denoiser(batch, self.sigma_data)
        with torch.no_grad():
            level = torch.where(r > 0, r, t)  # any; it is not looked at
            before = function(batch.images + column(r) * noise, level)
            target = torch.where(column(r) > 0, before, batch.images)  # f(x, 0) = x
        difference = function(batch.images + column(t) * noise, t) - target
        loss: Tensor = (denoising_weight(t, self.sigma_data) * pseudo_huber(difference, self.huber)).mean()
        return loss

    def lower_level(self, t: Tensor, step: int, steps: int) -> Tensor:
        """R = t (1 - n(t) / q^a), at least 0, in stage a = 1, 2, ...: ``[N]`` → ``[N]``."""
        stage = 1 + step * self.stages // steps
        gap = (1 + self.gap_height * torch.sigmoid(-self.gap_slope * t)) / self.shrink**stage
        return (t * (1 - gap)).clamp(min=0)

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling, with the boundary at no noise."""
        return consistency_scheduler(sigma_min=0.0, sigma_max=self.sigma_max, sigma_data=self.sigma_data)

    @property
    def sampler(self) -> dict[str, Any]:
        """One step."""
        return {"steps": 1}
