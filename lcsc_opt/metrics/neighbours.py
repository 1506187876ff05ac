"""Distances between features in blocks, for precision and recall (Kynkäänniemi et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURHOOD = 3  # k of the paper, and torch-fidelity's default
BLOCK = 2**27  # distances held at once: 512 MiB of float32


def radii(features: Tensor) -> Tensor:
    """``[N]`` distance of each of ``[N, D]`` features to its third nearest neighbour; N above three."""
    found = [
        torch.cdist(rows, features).kthvalue(NEIGHBOURHOOD + 1, dim=1).values  # the nearest is the feature itself
        for rows in torch.split(features, _rows(len(features)))
    ]
    return torch.cat(found)


def coverage(samples: Tensor, real: Tensor, sample_radii: Tensor, real_radii: Tensor) -> tuple[float, float]:
    """Precision and recall.

    Args:
        samples: ``[N, D]``.
        real: ``[M, D]``.
        sample_radii: ``[N]``, of :func:`radii`.
        real_radii: ``[M]``.

    Returns:
        The fraction of samples inside the sphere of some real image, and of real images inside the sphere of some
        sample (Eq. 1 and 2).
    """
    realistic = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    step = _rows(len(real))
    for rows, rows_radii in zip(torch.split(samples, step), torch.split(sample_radii, step), strict=True):
        distances = torch.cdist(rows, real)  # [rows, M]
        realistic += int((distances <= real_radii).any(dim=1).sum())
        covered |= (distances <= rows_radii[:, None]).any(dim=0)
    return realistic / len(samples), int(covered.sum()) / len(real)


def _rows(columns: int) -> int:
    return max(1, BLOCK // columns)
