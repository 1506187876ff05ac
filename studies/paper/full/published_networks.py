"""The networks that the paper searched, built by the code that trained them, and their samplers.

The classes come from your copies of four code bases, on PYTHONPATH: NVlabs/edm (``training``),
openai/consistency_models (``cm``), ermongroup/ddim (``models``) and openai/improved-diffusion (``improved_diffusion``).
Sizes are those of the paper's trainings; a keyword changes one.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.sampling.diffusers_sampler import build_scheduler

SMALLEST_LOG_SNR = -5.1  # of lambda, where the cosine schedule has next to no signal: as DPM-Solver's own code clips it


def cifar10_consistency(**changes: Any) -> nn.Module:
    """NCSN++ of EDM without its preconditioning, 56.4 M parameters: CD and CT on CIFAR-10."""
    published = {
        "img_resolution": 32,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "dropout": 0.0,
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    }
    return _build("NVlabs/edm", "training.networks", "SongUNet", {**published, **changes})


def imagenet64_consistency(**changes: Any) -> nn.Module:
    """ADM with classes, 295.9 M parameters: CD and CT on ImageNet-64."""
    published = {
        "image_size": 64,
        "in_channels": 3,
        "model_channels": 192,
        "out_channels": 3,
        "num_res_blocks": 3,
        "attention_resolutions": (2, 4, 8),  # divisors of the side: 32, 16, 8
        "channel_mult": (1, 2, 3, 4),
        "num_classes": 1000,
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    unet: Any = _module("openai/consistency_models", "cm.unet")
    unet.QKVFlashAttention = TorchAttention  # flash-attn 1, which it imports, is not made for today's torch
    return _build("openai/consistency_models", "cm.unet", "UNetModel", {**published, **changes})


def cifar10_diffusion(**changes: Any) -> nn.Module:
    """The U-Net of DDPM, 35.7 M parameters: DM on CIFAR-10."""
    published = {
        "type": "simple",
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.1,
        "resamp_with_conv": True,
    }
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(**{**published, **changes}),
        data=types.SimpleNamespace(image_size=32),
        diffusion=types.SimpleNamespace(num_diffusion_timesteps=1000),
    )
    return _build("ermongroup/ddim", "models.diffusion", "Model", {"config": config})


def imagenet64_diffusion(**changes: Any) -> nn.Module:
    """The U-Net of improved DDPM, 121.1 M parameters: DM on ImageNet-64."""
    published = {
        "in_channels": 3,
        "model_channels": 128,
        "out_channels": 3,
        "num_res_blocks": 3,
        "attention_resolutions": (4, 8),
        "channel_mult": (1, 2, 3, 4),
        "num_heads": 4,
        "use_scale_shift_norm": True,
    }
    return _build("openai/improved-diffusion", "improved_diffusion.unet", "UNetModel", {**published, **changes})


def _build(code: str, module: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = getattr(_module(code, module), name)(**arguments)
    except (AttributeError, TypeError, ValueError) as error:
        raise ObjectiveError(f"model: {module}:{name} of {code} cannot be built with {arguments}: {error}") from error
    return network


def _module(code: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ObjectiveError(
            f"model: {name} cannot be imported ({error}): put a copy of {code} on PYTHONPATH"
        ) from error


class TorchAttention(nn.Module):
    """What cm.unet's ``QKVFlashAttention`` computes, by torch's own attention."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """``[N, 3 heads dim, positions]`` → ``[N, heads dim, positions]``."""
        parts = qkv.reshape(len(qkv), 3, self.num_heads, self.head_dim, -1).transpose(-1, -2)
        query, key, value = parts.unbind(1)
        attended: Tensor = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(-1, -2).flatten(1, 2)


def edm_consistency(model: Any, noise: Tensor, draw: Any, sigmas: Sequence[float] = (80.0,)) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Alg. 1) of a network that is told ln(sigma) / 4."""
    return _consistency(lambda x, c_noise: model(x, c_noise, None), noise, draw, sigmas, noise_scale=0.25)


def openai_consistency(
    model: Any, noise: Tensor, labels: Tensor, draw: Any, sigmas: Sequence[float] = (80.0,)
) -> Tensor:
    """The same, of a network with classes that is told 250 ln(sigma)."""
    return _consistency(lambda x, c_noise: model(x, c_noise, y=labels), noise, draw, sigmas, noise_scale=250.0)


def _consistency(
    network: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    draw: Any,
    sigmas: Sequence[float],
    *,
    noise_scale: float,
) -> Tensor:
    function = ConsistencyFunction(cast("nn.Module", network), noise_scale=noise_scale)
    images = torch.zeros_like(noise)
    for step, sigma in enumerate(sigmas):
        if step == 0:
            noisy = images + sigma * noise
        else:
            noisy = images + (sigma**2 - function.sigma_min**2) ** 0.5 * draw(step)
        images = function(noisy, noise.new_full((len(noise),), sigma)).clamp(-1, 1)
    return images


def dpm_solver(model: Any, noise: Tensor, nfe: int, timesteps: int = 1000, beta_schedule: str = "linear") -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022, Sec. 4), as the authors' script sets it: steps even in lambda, none to zero.

    lambda = ln(alpha / sigma); a step of length h from lambda_0 with the predicted images m of the last three is
    sigma_1 / sigma_0 x - alpha_1 (phi_1 m_0 - phi_2 D_1 + phi_3 D_2), of lower order where there are not three yet.

    Args:
        model: a network; timesteps are scaled to 1,000 for it, whatever their number.
        noise: ``[N, C, H, W]``.
        nfe: the number of steps.
        timesteps: the number of timesteps in the training.
        beta_schedule: ``linear`` or ``squaredcos_cap_v2``, which is the cosine of improved DDPM.
    """
    levels = _log_snr(timesteps, beta_schedule)
    grid = np.linspace(max(levels[-1], SMALLEST_LOG_SNR), levels[0], nfe + 1)
    conditioning = np.interp(-grid, -levels, np.arange(timesteps)) * 1000 / timesteps
    alpha = (1 / (1 + np.exp(-2 * grid))) ** 0.5
    sigma = (1 / (1 + np.exp(2 * grid))) ** 0.5
    h = grid[1] - grid[0]
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    x = noise
    m: list[Tensor] = []  # the predicted images of the last three steps, the latest first
    for i in range(nfe):
        predicted = model(x, x.new_full((len(x),), conditioning[i]))
        m = [(x - sigma[i] * predicted) / alpha[i], *m[:2]]
        change = phi_1 * m[0]
        if len(m) == 2:
            change = change + phi_1 / 2 * (m[0] - m[1])
        elif len(m) == 3:
            first = m[0] - m[1]
            second = m[0] - 2 * m[1] + m[2]
            change = change - phi_2 * (first + second / 2) + phi_3 * second / 2
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * change
    return x


def _log_snr(timesteps: int, beta_schedule: str) -> npt.NDArray[np.float64]:
    """``[T]`` lambda of each timestep, decreasing."""
    scheduler = build_scheduler("ddpm", {"num_train_timesteps": timesteps, "beta_schedule": beta_schedule})
    signal = (1 - scheduler.betas.double().numpy()).cumprod()  # alpha², and sigma² = 1 - alpha²
    log_snr: npt.NDArray[np.float64] = 0.5 * np.log(signal / (1 - signal))
    return log_snr
