"""What the extractors of published networks share: bytes in, and the hash that names the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lcsc_opt.errors import MetricError


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


def rgb_bytes(images: Tensor, device: torch.device) -> Tensor:
    """``[B, 1 or 3, H, W]`` in [−1, 1] → ``[B, 3, H, W]`` uint8 on ``device``; grey becomes three equal channels.

    Raises MetricError for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise MetricError(f"images: expected [B, 1 or 3, H, W] for this extractor, got {list(images.shape)}")
    # Half-precision samples become float32 first: sums with 128 would lose levels.
    return to_bytes(images.to(device, torch.float32)).expand(-1, 3, -1, -1)
