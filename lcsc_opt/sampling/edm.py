"""EDM and EDM2 networks (Karras et al. 2022, 2024): denoisers D(x; sigma), and Heun's method on them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcsc_opt.base.accelerator import has_float64
from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.consistency import noise_levels
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings
from lcsc_opt.sampling.noise import ImageNoise


class EdmDenoiser(nn.Module):
    """D(x; sigma), as a network called ``network(x, sigma, class_labels)``, with labels in one-hot rows.

    Args:
        network: gets the merged weights.
        label_dim: how many classes it has; 0 for an unconditional one.
        guide: another network; guidance leads the result away from it (Karras et al. 2024, autoguidance; a guide
            without classes gives classifier-free guidance).
        guidance: 1 is the network alone; D = D_guide + guidance (D_network − D_guide).
        config: what the networks were made with, for the study's fingerprint.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        label_dim: int = 0,
        guide: nn.Module | None = None,
        guidance: float = 1.0,
        config: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.guide = guide
        self.label_dim = label_dim
        self.guidance = guidance
        self.config: dict[str, object] = {"class": type(network).__name__, "guidance": None}
        if guide is not None:
            self.config["guidance"] = guidance
        self.config |= config or {}

    @property
    def calls(self) -> int:
        """How many networks are called for one D: with a guide, both."""
        if self.guide is None:
            return 1
        return 2

    def rounded(self, sigma: float) -> float:
        """The noise level nearest to ``sigma`` that the network knows. A network without ``round_sigma`` knows all."""
        round_sigma: Any = getattr(self.network, "round_sigma", None)
        if round_sigma is None:
            return sigma
        return float(round_sigma(torch.tensor(sigma, dtype=torch.float64)))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Noisy images ``[N, C, H, W]`` at noise levels ``[N]``, of classes ``[N]`` → images ``[N, C, H, W]``."""
        one_hot: Tensor | None = None
        if class_labels is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            one_hot = F.one_hot(class_labels, self.label_dim).to(dtype)
        denoised: Tensor = self.network(x, sigma, one_hot)
        if self.guide is None:
            return denoised
        denoised_by_guide: Tensor = self.guide(x, sigma, one_hot)
        return denoised_by_guide + self.guidance * (denoised - denoised_by_guide)


@dataclasses.dataclass(frozen=True)
class HeunSchedule:
    """Karras et al. 2022: the noise levels of Eq. 5.

    Attributes:
        steps: N; a network is called 2 N − 1 times.
        sigma_min: the last noise level before zero.
        sigma_max: the first noise level.
        rho: how much the levels crowd at the low end.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def levels(self) -> list[float]:
        """``[steps + 1]`` noise levels, decreasing to zero."""
        if self.steps == 1:  # where noise_levels would give sigma_min alone
            return [self.sigma_max, 0.0]
        rising = noise_levels(self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        return [*rising.flip(0).tolist(), 0.0]


class HeunSampler(NetworkSampler):
    """Heun's second-order method on dx/dsigma = (x − D(x; sigma)) / sigma (Karras et al. 2022, Algorithm 1).

    Args:
        denoiser: its ``network`` gets the merged weights.
        schedule: noise levels.
        noise, decoder, settings: as of :class:`NetworkSampler`.
    """

    def __init__(
        self,
        denoiser: EdmDenoiser,
        *,
        schedule: HeunSchedule,
        noise: ImageNoise,
        decoder: LatentDecoder | None = None,
        settings: NetworkSettings | None = None,
    ) -> None:
        super().__init__(denoiser, settings, trained=denoiser.network, noise=noise, decoder=decoder)
        self.schedule = schedule
        self._denoiser = denoiser
        # of the images between two calls of the network: float64 where there is one, as in NVlabs' own sampler
        self._dtype = torch.float32
        if has_float64(self._network.device):
            self._dtype = torch.float64
        self.nfe = (2 * schedule.steps - 1) * denoiser.calls  # each step calls the denoiser twice, the last one once
        self.recomputed = self.nfe - denoiser.calls  # in a backward pass, all but those of the last call

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images, nominally in [-1, 1]."""
        labels = self._labels(noise, start, stop)
        z = self.noise.batch(noise, start, stop)
        *positive, zero = self.schedule.levels()
        levels = [*(self._denoiser.rounded(sigma) for sigma in positive), zero]
        x = levels[0] * z.to(self._network.device).to(self._dtype)
        for sigma, lower in itertools.pairwise(levels):
            derivative = self._derivative(x, sigma, labels, recompute=lower > 0)  # the last call is not worth it
            euler = x + (lower - sigma) * derivative
            if lower == 0:  # the last step is Euler's
                x = euler
            else:
                derivative_at_euler = self._derivative(euler, lower, labels, recompute=True)
                x = x + (lower - sigma) * (derivative + derivative_at_euler) / 2
        return self._decoded(x.to(self._network.dtype))

    def describe(self) -> dict[str, object]:
        """Settings that change the images."""
        return {
            **super().describe(),
            "sampler": "edm-heun",
            "schedule": {name: str(value) for name, value in dataclasses.asdict(self.schedule).items()},
            "network": self._denoiser.config,
        }

    def _derivative(
        self,
        x: Tensor,
        sigma: float,
        labels: Tensor | None,
        *,
        recompute: bool,
    ) -> Tensor:
        """dx/dsigma at one noise level, from one call of the denoiser; ``recompute`` as of :class:`PreparedNetwork`."""
        dtype = self._network.dtype
        level = torch.full((len(x),), sigma, device=x.device, dtype=dtype)
        denoised = self._network(x.to(dtype), level, labels, recompute=recompute)
        return (x - denoised.to(self._dtype)) / sigma
