"""Song et al. 2023, Algorithm 1, written from the paper: what samplers of the library are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcsc_opt.base.records import Noise
from lcsc_opt.sampling import ImageNoise, NetworkSettings
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.sampling.network import NetworkSampler


class ConsistencySampler(NetworkSampler):
    """From ``sigmas[0]`` to an image, then noise and denoise at each further level."""

    def __init__(
        self,
        function: ConsistencyFunction,
        *,
        sigmas: Sequence[float],
        noise: ImageNoise,
        settings: NetworkSettings | None = None,
    ) -> None:
        super().__init__(function, settings, trained=function.network, noise=noise)
        self.function = function
        self.sigmas = tuple(sigmas)
        self.nfe = len(self.sigmas)
        self.recomputed = self.nfe - 1

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        images: Tensor | None = None
        for draw, sigma in enumerate(self.sigmas):
            z = self.noise.batch(noise, start, stop, draw=draw)
            z = z.to(self._network.device, self._network.dtype)
            noisy = sigma * z
            if images is not None:
                noisy = images.clamp(-1, 1) + (sigma**2 - self.function.sigma_min**2) ** 0.5 * z
            images = self._network(noisy, torch.full_like(z[:, 0, 0, 0], sigma), recompute=draw < self.nfe - 1)
        assert images is not None
        return images

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "sampler": "consistency", "sigmas": list(self.sigmas)}
