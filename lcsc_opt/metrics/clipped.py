"""Clipped Density and Clipped Coverage (Salvy, Talbot & Thirion 2026, arXiv 2507.01761): fidelity, coverage as shares.

Density and coverage (Naeem et al. 2020) count samples inside the spheres of real images. A real outlier has a large
sphere that holds many samples, and many spheres may count one sample. Here no radius is larger than the median, and no
image counts more than once. Both are calibrated: they fall linearly with the share of bad samples, and are near 1 for
other images of the real distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcsc_opt.metrics.distances import radii_of, real_features, rows_at_once

if TYPE_CHECKING:
    from lcsc_opt.metrics.reference.reference import Reference

CLIPPED_NEIGHBOURS = 5  # K of the paper


def clipped_density_of_each(samples: Tensor, reference: Reference) -> Tensor:
    """``[N]`` float64: what each sample adds to Clipped Density, which is their mean, at most 1.

    It is the number of real spheres around the sample, divided by K and at most 1, over the mean of the same among real
    images. Samples are ``[N, D]``; there are more than K real images.
    """
    device = samples.device
    real = real_features(samples, reference)
    radii = reference.once("clipped_radii", device, _clipped_radii).to(samples.dtype)
    real_share = reference.once("clipped_density", device, _share_of_real)
    shares = []
    for rows in torch.split(samples, rows_at_once(len(real))):
        inside = torch.cdist(rows, real) <= radii  # [rows, M]
        shares.append(_capped_share(inside.sum(dim=1)))
    return torch.cat(shares).cpu() / real_share


def _clipped_radii(real: Tensor) -> Tensor:
    """``[M]``: distance of each real image to its K-th nearest other, at most the median of these."""
    radii = radii_of(real, CLIPPED_NEIGHBOURS)
    # torch.median would be the lower of the two middle values
    return radii.clamp(max=float(torch.quantile(radii, 0.5)))


def _share_of_real(real: Tensor) -> float:
    """The mean over real images of the number of others' spheres around them, divided by K and at most 1."""
    radii = _clipped_radii(real)
    counts = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    step = rows_at_once(len(real))
    # The spheres are the rows, as in radii_of: the K-th neighbour is on the sphere, and rounding must not move it.
    for rows, rows_radii in zip(torch.split(real, step), torch.split(radii, step), strict=True):
        counts += (torch.cdist(rows, real) <= rows_radii[:, None]).sum(dim=0)
    return float(_capped_share(counts - 1).mean())  # each is in its own sphere


def _capped_share(counts: Tensor) -> Tensor:
    return (counts.double() / CLIPPED_NEIGHBOURS).clamp(max=1)


def samples_in_spheres(samples: Tensor, reference: Reference, members: Tensor) -> Tensor:
    """``[M, G]`` float64: how many samples of each group are nearer to a real image than its K-th nearest other.

    ``members`` ``[N, G]`` is 1 where a sample ``[N, D]`` is of a group, else 0.
    """
    device = samples.device
    real = real_features(samples, reference)
    radii = reference.once("radii_of_five", device, lambda features: radii_of(features, CLIPPED_NEIGHBOURS))
    columns = members.to(samples)
    counts = []
    step = rows_at_once(len(samples))
    for rows, rows_radii in zip(torch.split(real, step), torch.split(radii, step), strict=True):
        inside = torch.cdist(rows, samples) < rows_radii[:, None]
        counts.append(inside.to(samples.dtype) @ columns)
    return torch.cat(counts).cpu().double()


def clipped_coverage(counts: Tensor, samples: int) -> float:
    """The share of good samples that covers as much as was counted.

    Args:
        counts: ``[M]``, the samples nearer to each real image than its K-th nearest other.
        samples: how many there are, N.
    """
    covered = float(_capped_share(counts).mean())
    expected = _expected_coverage(samples, len(counts))
    return int(torch.searchsorted(expected, covered)) / len(expected)


def _expected_coverage(samples: int, real: int) -> Tensor:
    """``[N + 1]`` float64: the mean coverage, before calibration, if n of N samples are of the real distribution.

    The mass of a sphere up to the K-th of M − 1 others has the distribution Beta(K, M − K). So the number J of n
    samples inside is beta-binomial, and ``E min(J, K) / K = 1 − Σ_{j < K} (1 − j / K) P(J = j)``. Below K samples
    it counts as zero, as in the authors' code.
    """
    alpha = torch.tensor(float(CLIPPED_NEIGHBOURS), dtype=torch.float64)
    beta = torch.tensor(float(real - CLIPPED_NEIGHBOURS), dtype=torch.float64)
    good = torch.arange(CLIPPED_NEIGHBOURS, samples + 1, dtype=torch.float64)
    missing = torch.zeros_like(good)
    for inside in range(CLIPPED_NEIGHBOURS):
        log_probability = (
            _log_binomial(good, inside) + _log_beta(alpha + inside, beta + good - inside) - _log_beta(alpha, beta)
        )
        missing += (1 - inside / CLIPPED_NEIGHBOURS) * log_probability.exp()
    few = min(CLIPPED_NEIGHBOURS, samples + 1)
    return torch.cat([torch.zeros(few, dtype=torch.float64), 1 - missing])


def _log_binomial(total: Tensor, chosen: int) -> Tensor:
    count = torch.tensor(float(chosen), dtype=torch.float64)
    return torch.lgamma(total + 1) - torch.lgamma(count + 1) - torch.lgamma(total - count + 1)


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
