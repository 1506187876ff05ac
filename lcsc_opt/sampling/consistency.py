"""Consistency models: the preconditioned consistency function, and sampling in one or several steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings, network_output
from lcsc_opt.sampling.noise import ImageNoise

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


class ConsistencySampler(NetworkSampler):
    """Song et al. 2023, Algorithm 1: from ``sigmas[0]`` to an image, then noise and denoise at each further level.

    Args:
        function: the consistency function; its ``network`` gets the merged weights.
        sigmas: noise levels above ``function.sigma_min``, decreasing, one for each step; NFE is their number.
        image_shape, noise, settings: as of :class:`NetworkSampler`.

    Raises:
        ObjectiveError: there is no noise level, or one is below ``function.sigma_min``.
    """

    def __init__(
        self,
        function: ConsistencyFunction,
        *,
        image_shape: Sequence[int],
        sigmas: Sequence[float],
        noise: ImageNoise,
        settings: NetworkSettings | None = None,
    ) -> None:
        super().__init__(function, settings, trained=function.network, image_shape=image_shape, noise=noise)
        self.function = function
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        if not self.sigmas:
            raise ObjectiveError("sigmas: expected at least one noise level, got an empty list")
        for sigma in self.sigmas:
            if not sigma >= function.sigma_min:
                raise ObjectiveError(f"sigmas: expected at least sigma_min ({function.sigma_min:g}), got {sigma:g}")
        self.nfe = len(self.sigmas)
        self.recomputed = self.nfe - 1  # a backward pass repeats all calls but the last

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images, nominally in [-1, 1]."""
        device = self._network.device
        dtype = self._network.dtype
        images: Tensor | None = None
        for draw, sigma in enumerate(self.sigmas):
            z = self.noise.batch(noise, start, stop, self.image_shape, draw=draw).to(device, dtype)
            if images is None:
                noisy = sigma * z
            else:
                noisy = images + (sigma**2 - self.function.sigma_min**2) ** 0.5 * z
            level = torch.full((stop - start,), sigma, device=device, dtype=dtype)
            is_last = draw == len(self.sigmas) - 1
            images = self._network(noisy, level, again=not is_last)
            if not is_last:
                images = images.clamp(-1, 1)
        assert images is not None  # there is at least one level
        return images

    def describe(self) -> dict[str, object]:
        """Settings that change the images."""
        described = {
            **super().describe(),
            "sampler": "consistency",
            "sigmas": list(self.sigmas),
            "sigma_data": self.function.sigma_data,
            "sigma_min": self.function.sigma_min,
        }
        if self.function.noise_scale != SONG_NOISE:  # stored studies have no such entry
            described["noise_scale"] = self.function.noise_scale
        return described
