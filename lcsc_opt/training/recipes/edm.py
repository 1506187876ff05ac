"""EDM: a denoiser, preconditioned (Karras et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lcsc_opt.sampling.consistency import EDM_NOISE, ConsistencyFunction
from lcsc_opt.training.recipes.base import Batch, Finite, Kind, Positive, Recipe, column


class Edm(Recipe):
    """The weighted squared error of the denoised image, Eq. 2 and Table 1, last column.

    Attributes:
        sigma_min: lowest noise level of sampling.
        sigma_max: highest noise level of sampling; 80 is made for 32×32 images and larger.
        sigma_data: the data's standard deviation.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
    """

    name: ClassVar[str] = "edm"
    kind: ClassVar[Kind] = "edm"
    begins_from: ClassVar[tuple[Kind, ...]] = ("edm",)
    noise_scale: ClassVar[float] = EDM_NOISE

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5
    noise_mean: Finite = -1.2
    noise_std: Positive = 1.2

    def loss(self, batch: Batch) -> Tensor:
        """E lambda(sigma) |D(y + n; sigma) - y|^2, ln(sigma) ~ N(P_mean, P_std^2)."""
        sigma = (batch.normal_each() * self.noise_std + self.noise_mean).exp()
        function = denoiser(batch, self.sigma_data)
        denoised = function(batch.images + column(sigma) * batch.normal(), sigma)
        weight = column(denoising_weight(sigma, self.sigma_data))
        loss: Tensor = (weight * (denoised - batch.images).square()).mean()
        return loss

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ between EDM's noise levels, Eq. 5."""
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
            "rho": 7.0,
        }


def denoiser(batch: Batch, sigma_data: float) -> ConsistencyFunction:
    """D(x; sigma), Eq. 7 with the coefficients of Table 1: a consistency function whose boundary is at no noise."""
    return ConsistencyFunction(batch.network, sigma_data=sigma_data, sigma_min=0.0, noise_scale=batch.noise_scale)


def denoising_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Table 1), for ``[N]`` noise levels."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
