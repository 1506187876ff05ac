"""Distances between sets of features, where the features are: KID in torch-fidelity's subsets, precision and recall,
shares of copies, and what FID does not see.

torch-fidelity computes the kernel distance of KID (Bińkowski et al. 2018) in numpy. Here it runs on the device of the
features: on a GPU it is then fast enough to be the loss of a search.

FID trades fidelity for diversity: it falls while single images get worse. ``near`` and ``hinge`` measure single
samples; ``sliced`` and ``cmmd`` measure more of the distribution than its first two moments. All are differentiable in
the samples, and their gradients come from automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.metrics.names import Formula

if TYPE_CHECKING:
    from lcsc_opt.metrics.reference.reference import Reference

# torch-fidelity's defaults, which published numbers are computed with.
SUBSET_SIZE = 1000
SUBSETS = 100
SUBSET_SEED = 2020


def kernel_distance(samples: Tensor, real: Tensor, *, gradient: bool = False) -> tuple[float, Tensor]:
    """Mean over random subsets of the unbiased squared MMD with the kernel ``(xᵀy / D + 1)³``; may be below zero.

    The estimate is Eq. 3 of Gretton et al. 2012, of subsets of one size m. Samples are ``[N, D]`` and real ones
    ``[M, D]``, on one device. Returns the distance, and its derivative in the samples: ``[N, D]`` float64 on their
    device, zero without ``gradient``.
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
            # The rows of a subset are distinct, so the indexed sum loses none.
            total[rows] += (6 / dimension) * (weights @ x / (m * (m - 1)) - across**2 @ y / m**2)
    return float(torch.stack(distances).mean()), total / len(distances)


def kernel_subsets(samples: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each subset of both, ``[m]`` each, as torch-fidelity draws them."""
    m = min(SUBSET_SIZE, len(samples), len(real))
    # Subsets as large as both sets are the sets themselves: the same value every time.
    subsets = 1 if m == len(samples) == len(real) else SUBSETS
    generator = np.random.RandomState(SUBSET_SEED)
    for _ in range(subsets):
        rows = _drawn_rows(generator, samples, m)
        yield rows, _drawn_rows(generator, real, m)


def _drawn_rows(generator: np.random.RandomState, features: Tensor, count: int) -> Tensor:
    """``[count]`` indices of distinct rows, on the device of ``features``."""
    return torch.from_numpy(generator.choice(len(features), count, replace=False)).to(features.device)


def _off_diagonal_sum(kernel: Tensor) -> Tensor:
    return _sum(kernel) - _sum(kernel.diagonal())


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


NEIGHBOURHOOD = 3  # k of Kynkäänniemi et al. 2019, and torch-fidelity's default
BLOCK = 2**27  # distances held at once: 512 MiB of float32


def radii_of(features: Tensor, neighbour: int = NEIGHBOURHOOD) -> Tensor:
    """``[N]``: distance of each of ``[N, D]`` features to its k-th nearest other; k is ``neighbour``, below N."""
    radii = []
    for rows in torch.split(features, rows_at_once(len(features))):
        distances = torch.cdist(rows, features)
        # the nearest is the feature itself; on a CPU, kthvalue takes several times as long
        nearest = distances.topk(neighbour + 1, dim=1, largest=False, sorted=False).values
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


def _nearer_train(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: whether each sample is nearer to a real image of the loss than to any held-out one."""
    train = real_features(samples, reference)
    held_out = real_features(samples, reference.unseen)
    nearer = []
    for rows in torch.split(samples, rows_at_once(max(len(train), len(held_out)))):
        train_distances = torch.cdist(rows, train).amin(dim=1)
        held_out_distances = torch.cdist(rows, held_out).amin(dim=1)
        nearer.append(train_distances < held_out_distances)
    return torch.cat(nearer)


def _authenticity(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: whether each sample is farther from its nearest real image than that is from its own nearest.

    Alaa et al. 2022 (arXiv 2102.08921), Eq. 7, as dgm-eval computes it.
    """
    real = real_features(samples, reference)
    real_distances = reference.once("nearest", samples.device, lambda features: radii_of(features, 1))
    authentic = []
    for rows in torch.split(samples, rows_at_once(len(real))):
        distances, nearest = torch.cdist(rows, real).min(dim=1)
        authentic.append(real_distances[nearest] < distances)
    return torch.cat(authentic)


def rows_at_once(columns: int) -> int:
    """How many rows of this many distances are in memory at once."""
    return max(1, BLOCK // columns)


DIRECTIONS = 256  # of the sliced distance, drawn once from one seed
SMALLEST_RADIUS = 1e-9  # in place of zero, as for four copies of one real image
KERNEL_WIDTH = 10.0  # Jayasumana et al. 2024, Section 4
KERNEL_SCALE = 1000.0

Distance = Callable[[Tensor, "Reference"], Tensor]
"""Samples ``[N, D]`` and the reference → a number, with a graph back to the samples."""


def _near(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: the distance of each sample to its nearest real image."""
    real = real_features(samples, reference)
    distances: Tensor = torch.linalg.vector_norm(samples - real[_nearest(samples, real)], dim=1)
    return distances


def _hinge(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]``: how far samples lie outside the neighbourhoods of real images: relu(min_j |f − r_j|² / radius_j² − 1).

    It is zero for samples that precision counts: those inside the sphere of some real image. The radius is that image's
    distance to its third nearest real image (Kynkäänniemi et al. 2019, Eq. 1).
    """
    real = real_features(samples, reference)
    spheres = real_radii(samples, reference).to(samples.dtype).clamp_min(SMALLEST_RADIUS)
    chosen = _nearest(samples, real, spheres)
    ratios = (samples - real[chosen]).square().sum(dim=1) / spheres[chosen].square()
    return F.relu(ratios - 1)


def _sliced(samples: Tensor, reference: Reference) -> Tensor:
    """The sliced Wasserstein distance (Bonneel et al. 2015), squared, times D: the metric that MIND proposes.

    The mean over directions of the squared distance between the sorted projections (Berthet et al. 2026). The factor D
    makes a shift of the mean count as in FID.
    """
    real = reference.once("projections", samples.device, _sorted_projections).to(samples.dtype)  # [M, P]
    projections = _sorted_projections(samples)  # [N, P]
    # Both quantile functions are steps. They are integrated over the pieces on which both are constant.
    ends = torch.arange(1, len(projections) + 1, dtype=torch.float64) / len(projections)
    real_ends = torch.arange(1, len(real) + 1, dtype=torch.float64) / len(real)
    pieces = torch.unique(torch.cat([ends, real_ends]))  # where they end
    widths = torch.diff(pieces, prepend=pieces.new_zeros(1))
    middles = pieces - widths / 2
    index = torch.searchsorted(ends, middles).to(samples.device)
    real_index = torch.searchsorted(real_ends, middles).to(samples.device)
    squares = (projections[index] - real[real_index]).square().mean(dim=1)
    return samples.shape[1] * (widths.to(samples) * squares).sum()


def _cmmd(samples: Tensor, reference: Reference) -> Tensor:
    """1000 times the squared MMD of features of length one, with a Gaussian kernel of width 10, biased.

    ``cmmd@clip`` is the metric of Jayasumana et al. 2024, in the features of CLIP ViT-B/32 in place of ViT-L/14@336.
    """
    unit_samples = F.normalize(samples, dim=1)
    real = F.normalize(real_features(samples, reference), dim=1)
    inside_reference = mean_kernel_of_reference(reference, samples.device)
    inside_samples = _kernel_mean(unit_samples, unit_samples)
    return KERNEL_SCALE * (inside_samples + inside_reference - 2 * _kernel_mean(unit_samples, real))


def mean_kernel_of_reference(reference: Reference, device: torch.device) -> float:
    """The mean over all pairs of real images of the kernel of CMMD, less one."""

    def mean_inside(features: Tensor) -> float:
        unit = F.normalize(features.cpu().double(), dim=1)
        return float(_kernel_mean(unit, unit))

    return reference.once("kernel", device, mean_inside)


# of single samples, [N]; the metric is their mean
EACH: Mapping[Formula, Distance] = {
    "near": _near,
    "hinge": _hinge,
    "nearer_train": _nearer_train,
    "authenticity": _authenticity,
}
FIDELITY: Mapping[Formula, Distance] = {
    "near": lambda samples, reference: _near(samples, reference).mean(),
    "hinge": lambda samples, reference: _hinge(samples, reference).mean(),
    "sliced": _sliced,
    "cmmd": _cmmd,
}


def real_features(samples: Tensor, reference: Reference) -> Tensor:
    """``[M, D]``, of the type of the samples and on their device."""
    return reference.features_on(samples.device).to(samples.dtype)


def _nearest(samples: Tensor, real: Tensor, units: Tensor | float = 1.0) -> Tensor:
    """``[N]``: the index of the real image with the smallest distance, in ``units`` ``[M]``."""
    parts = torch.split(samples.detach(), rows_at_once(len(real)))
    return torch.cat([(torch.cdist(rows, real) / units).argmin(dim=1) for rows in parts])


def _sorted_projections(features: Tensor) -> Tensor:
    """``[N, D]`` → ``[N, P]``, each column sorted."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(features.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    return (features @ F.normalize(drawn, dim=0).to(features)).sort(dim=0).values


def _kernel_mean(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all pairs of ``exp(−|x − y|² / 2σ²) − 1``, of rows of length one; the ones cancel in the distance."""
    blocks = torch.split(x, rows_at_once(len(y)))
    sums = [torch.expm1((rows @ y.T - 1) / KERNEL_WIDTH**2).sum() for rows in blocks]
    return torch.stack(sums).sum() / (len(x) * len(y))


def kernel_sums(x: Tensor, y: Tensor, x_members: Tensor, y_members: Tensor) -> Tensor:
    """``[G, H]``: the sums of that kernel, less one, over the pairs of two groups, of rows of length one.

    Members ``[N, G]`` and ``[M, H]`` are 1 where a row is of a group, else 0.
    """
    total = torch.zeros(x_members.shape[1], y_members.shape[1]).to(x)
    step = rows_at_once(len(y))
    for rows, members in zip(torch.split(x, step), torch.split(x_members, step), strict=True):
        kernel = torch.expm1((rows @ y.T - 1) / KERNEL_WIDTH**2)
        total = total + members.T @ (kernel @ y_members)
    return total
