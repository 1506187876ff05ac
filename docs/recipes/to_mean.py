"""``to_mean``: how far samples are from the mean real image. The recipe "Add a metric" of CONTRIBUTING.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lcsc_opt.metrics.reference.reference import Reference


def to_mean(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: the distance of each of ``[N, D]`` samples to the mean of the real images' features."""
    real = reference.features_on(samples.device).to(samples.dtype)  # [M, D]
    distances: Tensor = torch.linalg.vector_norm(samples - real.mean(dim=0), dim=1)
    return distances
