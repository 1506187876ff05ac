"""Distances between sets of features: KID in torch-fidelity's subsets, precision and recall, and shares of copies.

torch-fidelity computes the kernel distance of KID (Bińkowski et al. 2018) in numpy. Here it runs on the device of the
features: on a GPU it is then fast enough to be the loss of a search.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        real: ``[M, D]`` as ``samples``, on the same device.
        seed: of the subsets.
    """
    distances = [
        _squared_mmd(_base(x, x), _base(y, y), _base(x, y))
        for x, y in ((samples[rows], real[real_rows]) for rows, real_rows in _subsets(samples, real, seed))
    ]
    return float(torch.stack(distances).mean())


def kernel_distance_and_gradient(samples: Tensor, real: Tensor, *, seed: int) -> tuple[float, Tensor]:
    """:func:`kernel_distance` and its derivative in the samples; one subset is in memory at a time.

    Args:
        samples: ``[N, D]`` float32.
        real: ``[M, D]`` as ``samples``, on the same device.
        seed: of the subsets.

    Returns:
        The distance, and the gradient ``[N, D]`` float64 on the device of ``samples``.
    """
    distances, gradient = [], torch.zeros_like(samples, dtype=torch.float64)
    for rows, real_rows in _subsets(samples, real, seed):
        x, y = samples[rows], real[real_rows]
        inside, across = _base(x, x), _base(x, y)
        distances.append(_squared_mmd(inside, _base(y, y), across))
        gradient[rows] += _gradient(x, y, inside, across)  # the rows of a subset are different ones
    return float(torch.stack(distances).mean()), gradient / len(distances)


def _subsets(samples: Tensor, real: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the samples and rows of the real images: the subsets that torch-fidelity draws."""
    size = subset_size(len(samples), len(real))
    # Subsets as large as both sets are the sets themselves: the same value every time.
    subsets = 1 if size == len(samples) == len(real) else SUBSETS
    generator = np.random.RandomState(seed)  # the one that torch-fidelity draws its subsets from
    for _ in range(subsets):
        rows, real_rows = (
            torch.from_numpy(generator.choice(len(features), size, replace=False)).to(features.device)
            for features in (samples, real)
        )
        yield rows, real_rows


def _base(x: Tensor, y: Tensor) -> Tensor:
    """``[m, m]``: the kernel is its third power."""
    return x @ y.T / x.shape[1] + 1


def _squared_mmd(inside: Tensor, inside_real: Tensor, across: Tensor) -> Tensor:
    """The unbiased estimate of two sets of one size m (Gretton et al. 2012, Eq. 3), from their kernels' bases."""
    m = len(across)
    kernels = (inside**3, inside_real**3)
    within = sum(_sum(kernel) - _sum(kernel.diagonal()) for kernel in kernels)
    return within / (m * (m - 1)) - 2 * _sum(across**3) / m**2


def _gradient(x: Tensor, y: Tensor, inside: Tensor, across: Tensor) -> Tensor:
    """``[m, D]``: the derivative of :func:`_squared_mmd` in ``x``, with ``∂ (xᵀy / D + 1)³ / ∂x = 3 (…)² y / D``."""
    m, dimension = x.shape
    slopes = inside**2
    slopes.fill_diagonal_(0)  # no pair of a sample with itself is in the estimate
    return (6 / dimension) * (slopes @ x / (m * (m - 1)) - across**2 @ y / m**2)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


NEIGHBOURHOOD = 3  # k of Kynkäänniemi et al. 2019, and torch-fidelity's default
BLOCK = 2**27  # distances held at once: 512 MiB of float32


def radii(features: Tensor, neighbour: int = NEIGHBOURHOOD) -> Tensor:
    """``[N]``: distance of each of ``[N, D]`` features to its k-th nearest other; k is ``neighbour``, below N."""
    found = [
        torch.cdist(rows, features).kthvalue(neighbour + 1, dim=1).values  # the nearest is the feature itself
        for rows in torch.split(features, rows_at_once(len(features)))
    ]
    return torch.cat(found)


def coverage(samples: Tensor, real: Tensor, sample_radii: Tensor, real_radii: Tensor) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019).

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
    step = rows_at_once(len(real))
    for rows, rows_radii in zip(torch.split(samples, step), torch.split(sample_radii, step), strict=True):
        distances = torch.cdist(rows, real)  # [rows, M]
        realistic += int((distances <= real_radii).any(dim=1).sum())
        covered |= (distances <= rows_radii[:, None]).any(dim=0)
    return realistic / len(samples), int(covered.sum()) / len(real)


def nearer_share(samples: Tensor, real: Tensor, other: Tensor) -> float:
    """The share of samples ``[N, D]`` whose nearest of ``real`` [M, D] is nearer than their nearest of ``other``."""
    nearer = 0
    for rows in torch.split(samples, rows_at_once(max(len(real), len(other)))):
        nearer += int((torch.cdist(rows, real).amin(dim=1) < torch.cdist(rows, other).amin(dim=1)).sum())
    return nearer / len(samples)


def authentic_share(samples: Tensor, real: Tensor, apart: Tensor) -> float:
    """The share of samples farther from their nearest real image than that is from its own nearest.

    Alaa et al. 2022 (arXiv 2102.08921), Eq. 7, as dgm-eval computes it.

    Args:
        samples: ``[N, D]``.
        real: ``[M, D]``.
        apart: ``[M]`` distance of each real image to the nearest other one.
    """
    authentic = 0
    for rows in torch.split(samples, rows_at_once(len(real))):
        distances, nearest = torch.cdist(rows, real).min(dim=1)
        authentic += int((apart[nearest] < distances).sum())
    return authentic / len(samples)


def rows_at_once(columns: int) -> int:
    """How many rows of this many distances are in memory at once."""
    return max(1, BLOCK // columns)
