"""Improved training of latent consistency models, sLCT (Dao et al. 2025).

The abstract names the techniques; the numbers beyond it are those of the authors' published experiments
(github.com/quandao10/LCT): c as a function of how many noise levels there are, the lowest quarter of these, and the
weight 5 of the diffusion loss.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lcsc_opt.training.recipes.base import Batch, NonNegative, column
from lcsc_opt.training.recipes.edm import denoising_weight
from lcsc_opt.training.recipes.flow import optimal_coupling
from lcsc_opt.training.recipes.ict import Ict

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Slct(Ict):
    """Improved consistency training with a loss that bears the outliers of latents.

    Attributes:
        diffusion_share: of the noise levels, the lowest ones, at which the image itself is a second target.
        diffusion_weight: of that loss.
        coupling: of noise and images in a batch.
    """

    name: ClassVar[str] = "slct"
    latent: ClassVar[bool] = True

    diffusion_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    diffusion_weight: NonNegative = 5.0
    coupling: Literal["optimal-transport", "independent"] = "optimal-transport"

    def loss(self, batch: Batch) -> Tensor:
        """The Cauchy loss of iCT's difference, and the diffusion loss of the student where there is little noise."""
        low, high, interval = self.draw_interval(batch)
        count = self.discretization(batch.step, batch.steps)
        noise = batch.normal()
        if self.coupling == "optimal-transport":
            noise = optimal_coupling(noise, batch.images)
        function = self.function(batch)
        with torch.no_grad():
            target = function(batch.images + column(low) * noise, low)
        student = function(batch.images + column(high) * noise, high)
        consistency = (cauchy(student - target, self.robustness(count)) / (high - low)).mean()
        early = interval < math.floor(self.diffusion_share * count)
        errors = denoising_weight(high, self.sigma_data) * (student - batch.images).square().flatten(1).mean(1)
        diffusion = (errors * early).sum() / early.sum().clamp(min=1)
        total: Tensor = consistency + self.diffusion_weight * diffusion
        return total

    def robustness(self, count: int) -> float:
        """The Cauchy loss's c of n noise levels: exp(-1.15 ln(n) - 0.85); at the first n that of iCT, 0.0345."""
        if count <= self.first_discretization:
            return 0.00054 * math.sqrt(4 * 32 * 32)  # of the latents of 256×256 images
        return math.exp(-1.15 * math.log(count) - 0.85)

    def prepare(self, network: nn.Module) -> None:
        """Non-scaling layer normalization: the scales are one, and stay so."""
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, NORMS) and weight is not None:
                with torch.no_grad():
                    weight.fill_(1.0)
                weight.requires_grad_(requires_grad=False)

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling; latents have no bounds to clip to."""
        return {**super().scheduler(), "clip_denoised": False}

    @property
    def network_options(self) -> dict[str, Any]:
        """One group of channels: group normalization is then layer normalization."""
        return {"norm_num_groups": 1}


def cauchy(difference: Tensor, c: float) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: ln(1 + m / (2 c^2)) of the mean square m, which knows no size of the latents."""
    return torch.log1p(difference.flatten(1).square().mean(1) / (2 * c * c))
