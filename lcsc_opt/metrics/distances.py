"""Distances between sets of features, where the features are: KID in torch-fidelity's subsets, precision and recall,
and metrics of single samples.

torch-fidelity computes the kernel distance of KID (Bińkowski et al. 2018) in numpy. Here it runs on the device of the
features: on a GPU it is then fast enough to be the loss of a search.

FID trades fidelity for diversity: it falls while single images get worse. ``near`` and ``hinge`` measure single
samples. Both are differentiable in the samples, and their gradients come from automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from lcsc_opt.metrics.reference.reference import Reference

# torch-fidelity's defaults, which published numbers are computed with.
SUBSET_SIZE = 1000
SUBSETS = 100
SUBSET_SEED = 2020


def kernel_distance(samples: Tensor, real: Tensor, *, gradient: bool = False) -> tuple[float, Tensor]:
    """Mean over random subsets of the unbiased squared MMD with the kernel ``(xᵀy / D + 1)³``; may be below zero.

    The estimate is Eq. 3 of Gretton et al. 2012, of subsets of one size m.

    Args:
        samples: ``[N, D]``, at least two.
        real: ``[M, D]`` on the same device, at least two.
        gradient: whether the derivative is wanted.

    Returns:
        The distance, and its derivative in the samples: ``[N, D]`` float64 on their device, zero without ``gradient``.
    """
    m = min(SUBSET_SIZE, len(samples), len(real))
    dimension = samples.shape[1]
    distances = []
    total = torch.zeros_like(samples, dtype=torch.float64)
    for rows, real_rows in kernel_subsets(samples, real):
        x = samples[rows]
        y = real[real_rows]
        # The kernel is the third power of these.
        inside = x @ x.T / dimension + 1
        inside_real = y @ y.T / dimension + 1
        across = x @ y.T / dimension + 1
        within = _off_diagonal_sum(inside**3) + _off_diagonal_sum(inside_real**3)
        distances.append(within / (m * (m - 1)) - 2 * _sum(across**3) / m**2)
        if gradient:  # ∂ (xᵀy / D + 1)³ / ∂x = 3 (…)² y / D
            weights = inside**2
            weights.fill_diagonal_(0)  # no pair of a sample with itself is in the estimate
            # The factor is twice 3: pairs of samples count twice in their sum, and the term across has a factor 2.
            # The rows of a subset are distinct, so the indexed sum loses none.
            total[rows] += (6 / dimension) * (weights @ x / (m * (m - 1)) - across**2 @ y / m**2)
    return float(torch.stack(distances).mean()), total / len(distances)


def kernel_subsets(samples: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each subset, the rows of ``samples`` and those of ``real``, ``[m]`` each, as torch-fidelity draws them."""
    m = min(SUBSET_SIZE, len(samples), len(real))
    # A subset as large as both sets is the sets themselves: the same value every time.
    subsets = 1 if m == len(samples) == len(real) else SUBSETS
    generator = np.random.RandomState(SUBSET_SEED)
    for _ in range(subsets):
        rows = _drawn_rows(generator, samples, m)
        yield rows, _drawn_rows(generator, real, m)


def _drawn_rows(generator: np.random.RandomState, features: Tensor, count: int) -> Tensor:
    """``[count]`` indices of distinct rows, on the device of ``features``."""
    return torch.from_numpy(generator.choice(len(features), count, replace=False)).to(features.device)


def _off_diagonal_sum(kernel: Tensor) -> Tensor:
    """The sum over pairs of different images: the estimate is unbiased since no image is compared with itself."""
    return _sum(kernel) - _sum(kernel.diagonal())


def _sum(values: Tensor) -> Tensor:
    """In float64, since the distance is a small difference of large sums."""
    return values.sum(dtype=torch.float64)


NEIGHBOURHOOD = 3  # k of Kynkäänniemi et al. 2019, and torch-fidelity's default
BLOCK = 2**27  # distances held at once: 512 MiB of float32


def radii_of(features: Tensor) -> Tensor:
    """``[N]``: distance of each of ``[N, D]`` features to its third nearest other; there are at least four."""
    radii = []
    for rows in torch.split(features, rows_at_once(len(features))):
        distances = torch.cdist(rows, features)
        # one more, as the nearest is the feature itself; on a CPU, kthvalue takes several times as long
        nearest = distances.topk(NEIGHBOURHOOD + 1, dim=1, largest=False, sorted=False).values
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def real_radii(samples: Tensor, reference: Reference) -> Tensor:
    """``[M]``: distance of each real image to its third nearest other."""
    return reference.once("radii", samples.device, radii_of)


def precise_and_covered(samples: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    """Which samples ``[N]`` are inside the sphere of some real image, and which real images ``[M]`` inside that of some
    sample: their shares are precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2). There are at least four of
    both.
    """
    real = real_features(samples, reference)
    radii = real_radii(samples, reference)
    sample_radii = radii_of(samples)
    precise = []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    step = rows_at_once(len(real))
    for rows, rows_radii in zip(torch.split(samples, step), torch.split(sample_radii, step), strict=True):
        distances = torch.cdist(rows, real)  # [rows, M]
        precise.append((distances <= radii).any(dim=1))
        covered |= (distances <= rows_radii[:, None]).any(dim=0)
    return torch.cat(precise).cpu(), covered.cpu()


def rows_at_once(columns: int) -> int:
    """How many rows of this many distances are held in memory at once; a long row is not divided."""
    return max(1, BLOCK // columns)


SMALLEST_RADIUS = 1e-9  # in place of zero, as for four copies of one real image


def _near(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: the distance of each sample ``[N, D]`` to its nearest real image, with a graph back to the samples."""
    real = real_features(samples, reference)
    distances: Tensor = torch.linalg.vector_norm(samples - real[_nearest(samples, real)], dim=1)
    return distances


def _hinge(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: how far samples lie outside the neighbourhoods of real images: relu(min_j |f − r_j|² / radius_j² − 1).

    It is zero for samples that precision counts: those inside the sphere of some real image. The radius is that image's
    distance to its third nearest real image (Kynkäänniemi et al. 2019, Eq. 1).
    """
    real = real_features(samples, reference)
    radii = real_radii(samples, reference).to(samples.dtype).clamp_min(SMALLEST_RADIUS)
    chosen = _nearest(samples, real, radii)
    ratios = (samples - real[chosen]).square().sum(dim=1) / radii[chosen].square()
    return F.relu(ratios - 1)


EACH = {
    "near": _near,
    "hinge": _hinge,
}
"""The metrics of single samples, differentiable in them; each is reported as the mean over samples."""


def real_features(samples: Tensor, reference: Reference) -> Tensor:
    """``[M, D]``, of the type of the samples and on their device."""
    return reference.features_on(samples.device).to(samples.dtype)


def _nearest(samples: Tensor, real: Tensor, units: Tensor | float = 1.0) -> Tensor:
    """``[N]``: the index of the real image with the smallest distance, measured in its own unit of ``units`` ``[M]``.

    It is found without a graph, which would keep all N × M distances; callers compute those to the chosen images anew.
    """
    parts = torch.split(samples.detach(), rows_at_once(len(real)))
    return torch.cat([(torch.cdist(rows, real) / units).argmin(dim=1) for rows in parts])
