"""What the extractors share: the hash that names a network's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of the names, types, shapes and bytes of ``weights``."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
