"""Consistency models: the preconditioned consistency function, and its noise levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lcsc_opt.sampling.base import network_output

SONG_NOISE = 250.0
"""Factor of ln(sigma) in a network's noise input, Song et al. 2023."""

EDM_NOISE = 0.25
"""Factor of ln(sigma) in a network's noise input, Karras et al. 2022."""


class ConsistencyFunction(nn.Module):
    """f(x, sigma) = c_skip x + c_out F(c_in x, c_noise), which is the identity at ``sigma_min``.

    Song et al. 2023, Eq. 5 and Appendix C: c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2),
    c_out = sigma_data (sigma - sigma_min) / sqrt(sigma_data^2 + sigma^2), and, as in EDM (Karras et al. 2022),
    c_in = 1 / sqrt(sigma^2 + sigma_data^2), c_noise = 1000 / 4 ln(sigma). With ``sigma_min`` 0 it is EDM's denoiser.

    Args:
        network: F.
        sigma_data: the data's standard deviation.
        sigma_min: where the function is the identity.
        noise_scale: factor of ln(sigma) in c_noise; EDM has 1 / 4.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        noise_scale: float = SONG_NOISE,
    ) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.noise_scale = noise_scale

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Noisy images ``x`` ``[N, C, H, W]`` at noise levels ``sigma`` ``[N]`` → images ``[N, C, H, W]``."""
        s = sigma[:, None, None, None]
        variance = self.sigma_data**2
        c_skip = variance / ((s - self.sigma_min) ** 2 + variance)
        c_out = self.sigma_data * (s - self.sigma_min) * (s**2 + variance).rsqrt()
        c_in = (s**2 + variance).rsqrt()
        c_noise = self.noise_scale * sigma.log()
        return c_skip * x + c_out * network_output(self.network, c_in * x, c_noise)


def noise_levels(count: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """``[count]`` float64 noise levels from ``sigma_min`` up to ``sigma_max`` (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    low = sigma_min ** (1 / rho)
    high = sigma_max ** (1 / rho)
    levels: Tensor = (low + ramp * (high - low)) ** rho
    return levels
