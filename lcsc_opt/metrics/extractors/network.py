"""What the extractors of published networks share: levels in, and the hash that names the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.weights import torch_fidelity_module


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of the names, types, shapes and bytes of ``weights``."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def to_bytes(images: Tensor) -> Tensor:
    """[−1, 1] → 0 to 255 uint8, to the nearest level, clipped (as EDM does, Karras et al. 2022)."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_levels(images: Tensor) -> Tensor:
    """:func:`to_bytes` in floating point, with a gradient that goes straight through the rounding.

    The derivative is that of the levels before rounding, 127.5 a level for pixels in [−1, 1]. It is 0 outside, since
    a pixel that is clipped can move without changing a level.
    """
    levels = (images.detach() * 127.5 + 128).clamp(0, 255).floor()
    if not images.requires_grad:
        return levels
    exact = 127.5 * images.clamp(-1, 1)
    return levels + (exact - exact.detach())  # adds zero: the levels stay what they are, bit for bit


def rgb_levels(images: Tensor, device: torch.device) -> Tensor:
    """``[B, 1 or 3, H, W]`` in [−1, 1] → ``[B, 3, H, W]`` float32 levels on ``device``; grey becomes RGB.

    Raises MetricError for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise MetricError(f"images: expected [B, 1 or 3, H, W] for this extractor, got {list(images.shape)}")
    # Half-precision samples become float32 first: sums with 128 would lose levels.
    return to_levels(images.to(device, torch.float32)).expand(-1, 3, -1, -1).contiguous()


def resized(levels: Tensor, size: int) -> Tensor:
    """``[B, 3, H, W]`` → ``[B, 3, size, size]``, as torch-fidelity's networks scale all images."""
    module = torch_fidelity_module("interpolate_compat_tensorflow")
    scaled: Tensor = module.interpolate_bilinear_2d_like_tensorflow1x(levels, size=(size, size), align_corners=False)
    return scaled


def normalized(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels → what a network was trained on: the mean and standard deviation ``[3]`` are those of pixels in [0, 1]."""
    shift, scale = (levels.new_tensor([255 * value for value in values])[:, None, None] for values in (mean, std))
    return (levels - shift) / scale
