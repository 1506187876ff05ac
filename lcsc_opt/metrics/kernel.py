"""The kernel distance of KID (Bińkowski et al. 2018) between two sets of features, in torch-fidelity's subsets.

torch-fidelity computes it in numpy; here it runs where the features are, since on a GPU it is then cheap enough to be
the loss of a search.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SUBSET_SIZE = 1000  # torch-fidelity's defaults, which published numbers are computed with
SUBSETS = 100


def subset_size(samples: int, real: int) -> int:
    """Images in a subset: torch-fidelity's 1,000, or all there are where there are fewer."""
    return min(SUBSET_SIZE, samples, real)


def kernel_distance(samples: Tensor, real: Tensor, *, seed: int) -> float:
    """Mean over random subsets of the unbiased squared MMD with the kernel ``(xᵀy / D + 1)³``; may be below zero.

    Args:
        samples: ``[N, D]`` float32.
        real: ``[M, D]`` float32, on the same device.
        seed: of the subsets.
    """
    size = subset_size(len(samples), len(real))
    # Subsets as large as both sets are the sets themselves: the same value every time.
    subsets = 1 if size == len(samples) == len(real) else SUBSETS
    generator = np.random.RandomState(seed)  # the one that torch-fidelity draws its subsets from
    distances = []
    for _ in range(subsets):
        rows, real_rows = (
            torch.from_numpy(generator.choice(len(features), size, replace=False)).to(features.device)
            for features in (samples, real)
        )
        distances.append(_squared_mmd(samples[rows], real[real_rows]))
    return float(torch.stack(distances).mean())


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of two sets of one size m (Gretton et al. 2012, Eq. 3)."""
    m = len(x)
    inside = sum(_sum(kernel) - _sum(kernel.diagonal()) for kernel in (_kernel(x, x), _kernel(y, y)))
    return inside / (m * (m - 1)) - 2 * _sum(_kernel(x, y)) / m**2


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)
