"""The networks that the paper searched, of the code that trained them, and how they are sampled.

The classes come from your copies of four code bases, on PYTHONPATH: NVlabs/edm (``training``), openai/consistency_models
(``cm``), ermongroup/ddim (``models``) and openai/improved-diffusion (``improved_diffusion``). Sizes are those of the
paper's trainings; a keyword changes one.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.sampling.schedulers import build_scheduler, without_deprecations

SOLVER = {  # of the authors' sampling script: third order, steps even in the logarithm of the signal-to-noise ratio
    "algorithm_type": "dpmsolver++",
    "solver_order": 3,
    "use_lu_lambdas": True,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
}


def cifar10_consistency(**changes: Any) -> nn.Module:
    """NCSN++ of EDM without its preconditioning, 55.7 M parameters: CD and CT on CIFAR-10."""
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
    return _made("NVlabs/edm", "training.networks", "SongUNet", {**published, **changes})


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
    return _made("openai/consistency_models", "cm.unet", "UNetModel", {**published, **changes})


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
    return _made("ermongroup/ddim", "models.diffusion", "Model", {"config": config})


def imagenet64_diffusion(**changes: Any) -> nn.Module:
    """The U-Net of improved DDPM: DM on ImageNet-64."""
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
    return _made("openai/improved-diffusion", "improved_diffusion.unet", "UNetModel", {**published, **changes})


def _made(code: str, module: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = getattr(_module(code, module), name)(**arguments)
    except (AttributeError, TypeError, ValueError) as error:
        raise ObjectiveError(f"model: {module}:{name} of {code} cannot be made with {arguments}: {error}") from error
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
        parts = qkv.unflatten(1, (3, self.num_heads, self.head_dim)).transpose(-1, -2)
        attended: Tensor = F.scaled_dot_product_attention(*parts.unbind(1))
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
    network: Callable[[Tensor, Tensor], Tensor], noise: Tensor, draw: Any, sigmas: Sequence[float], *, noise_scale: float
) -> Tensor:
    function = ConsistencyFunction(cast("nn.Module", network), noise_scale=noise_scale)
    images = torch.zeros_like(noise)
    for step, sigma in enumerate(sigmas):
        spread = sigma if step == 0 else (sigma**2 - function.sigma_min**2) ** 0.5
        noisy = images + spread * (noise if step == 0 else draw(step))
        images = function(noisy, noise.new_full((len(noise),), sigma)).clamp(-1, 1)
    return images


def dpm_solver(
    model: Any,
    noise: Tensor,
    nfe: int,
    timesteps: int = 1000,
    beta_schedule: str = "linear",
    timestep_scale: float = 1.0,
) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022) as the authors' script sets it, at the nearest whole timesteps."""
    trained = {"num_train_timesteps": timesteps, "beta_schedule": beta_schedule}
    scheduler = build_scheduler("dpm-solver++", trained, SOLVER)
    scheduler.set_timesteps(nfe, device=noise.device)
    images = noise
    for timestep in scheduler.timesteps:
        predicted = model(images, timestep_scale * timestep.expand(len(images)).float())
        with without_deprecations():
            images = scheduler.step(predicted, timestep, images).prev_sample
    return images
