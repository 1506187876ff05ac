"""Tones: whether values, and steps between neighbouring values, are as frequent as in real images; no network.

A Fréchet distance compares means and covariances, so images can have all of them right and still be grey where real
ones are black and white. Here one-dimensional distributions are compared as a whole, at three scales and in each
channel: values, and their differences to the right and downwards. Differences are the contrast of edges and strokes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.jackknife import GROUPS
from lcsc_opt.metrics.reference.reference import Reference

SCALES = (1, 2, 4)  # pixels on a side that are averaged
GRID = 8  # places on a side of an image, whose values stand for all
LEVELS = 4096  # quantiles of the real images
CHANNELS = 3
LEAST_VARIANCE = 1e-6  # of the largest one, for a distribution that counts
DISTRIBUTIONS = 3 * CHANNELS * len(SCALES)  # values, and differences to the right and downwards


class Tones:
    """Values and differences at some places of an image, not clipped, at each scale.

    There are 8 × 8 places, so that an image of any size has as many features; what lies between them in large images is
    not seen.
    """

    name = f"tones-{GRID}"
    dimension = DISTRIBUTIONS * GRID**2
    unclipped = True
    enough_images = 20_000  # a million values of each distribution

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 1 or 3, H, W]`` → ``[B, 27 · 64]``, distribution by distribution; grey counts as three equal channels.

        Raises:
            MetricError: images of one row or column have no differences.
        """
        smaller_side = min(images.shape[-2:])
        if smaller_side < 2:
            raise MetricError(f"tones: images of {images.shape[-2]}x{images.shape[-1]} have no neighbouring pixels")
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        parts = []
        for scale in SCALES:
            # at least two pixels are left on a side, for a difference
            scaled = F.avg_pool2d(wide, min(scale, smaller_side // 2))
            to_the_right = scaled.diff(dim=-1)
            downwards = scaled.diff(dim=-2)
            parts += [_at_places(values).expand(-1, CHANNELS, -1) for values in (scaled, to_the_right, downwards)]
        return torch.cat(parts, dim=1).flatten(1)


def _at_places(values: Tensor) -> Tensor:
    """``[B, C, H, W]`` → ``[B, C, 64]``: the values in the middle of 8 × 8 cells, some the same in smaller images."""
    middles = 2 * torch.arange(GRID, device=values.device) + 1  # in sixteenths of a side
    rows, columns = (middles * side // (2 * GRID) for side in values.shape[-2:])
    return values[..., rows, :][..., columns].flatten(2)


def tones(samples: Tensor, reference: Reference) -> Tensor:
    """The mean, over distributions, of the squared 2-Wasserstein distance to the real one ÷ the variance of that.

    Between distributions on a line, that distance is the mean squared difference of their quantiles (Peyré and Cuturi
    2019, Remark 2.30). Distributions in which real images hardly vary are left out.

    Args:
        samples: ``[N, D]`` of :class:`Tones`; the result has a graph to them.
        reference: the real images.

    Raises:
        MetricError: no distribution of the real images varies.
    """
    quantiles = target_quantiles(reference, samples.device)
    return distance_of_sorted(by_distribution(samples).sort(dim=1).values, quantiles)


def target_quantiles(reference: Reference, device: torch.device | str) -> Tensor:
    """``[distributions, levels]``: the quantiles of the real images, shrunk if the reference is; computed once."""
    return reference.once("quantiles", device, lambda features: reference.shrinkage.quantiles(quantiles_of(features)))


def distance_of_sorted(ordered: Tensor, quantiles: Tensor) -> Tensor:
    """:func:`tones` of sorted values.

    Args:
        ordered: ``[distributions, N · 64]`` of the samples, ascending.
        quantiles: ``[distributions, levels]`` of the real images.
    """
    quantiles = quantiles.to(ordered.dtype)
    varies, variances = _varying(quantiles)
    expected = interpolated(quantiles, ordered.shape[1])
    squared = (ordered - expected).square().mean(dim=1)
    return (squared[varies] / variances).mean()


def by_distribution(features: Tensor) -> Tensor:
    """``[N, D]`` of :class:`Tones` → ``[distributions, N · 64]``."""
    return features.reshape(len(features), DISTRIBUTIONS, -1).transpose(0, 1).flatten(1)


def quantiles_of(features: Tensor) -> Tensor:
    """``[M, D]`` of :class:`Tones` → the quantiles ``[distributions, levels]``."""
    return interpolated(by_distribution(features).sort(dim=1).values, LEVELS)


def tones_without_each_group(features: Tensor, quantiles: Tensor, groups: Tensor) -> Tensor:
    """``[G]``: :func:`tones` without the samples of each group, to first order in what is left out.

    The derivative of the squared distance in a distribution is the Kantorovich potential, whose slope at a value is
    twice the way to where the optimal map takes it (Santambrogio 2015, Proposition 7.17). So one sort serves all.

    Args:
        features: ``[N, D]`` of the samples.
        quantiles: ``[distributions, levels]`` of the real images.
        groups: ``[N]``, the group of each sample.
    """
    ordered, order = by_distribution(features).sort(dim=1)
    quantiles = quantiles.to(ordered.dtype)
    varies, variances = _varying(quantiles)
    ordered, order = ordered[varies].double(), order[varies]
    ways = ordered - interpolated(quantiles[varies], ordered.shape[1])
    slopes = ways[:, :-1] + ways[:, 1:]  # between two values, twice the mean of their ways
    potentials = F.pad((ordered.diff(dim=1) * slopes).cumsum(dim=1), (1, 0))  # the integral, from zero at the least
    labels = groups.to(features.device).repeat_interleave(GRID**2)[order]  # [distributions, N · 64]
    of_groups = torch.zeros(len(ordered), GROUPS, dtype=torch.float64, device=ordered.device)
    of_groups.scatter_add_(1, labels, potentials)
    sizes = torch.bincount(labels[0], minlength=GROUPS)  # in values, the same in every distribution
    of_others = (of_groups.sum(dim=1, keepdim=True) - of_groups) / (ordered.shape[1] - sizes)
    changes = of_others - potentials.mean(dim=1, keepdim=True)
    distances = ways.square().mean(dim=1, keepdim=True) + changes
    return (distances / variances[:, None]).mean(dim=0)


def _varying(quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """Which distributions count, ``[distributions]`` bool, and the variances of those that do.

    Raises:
        MetricError: none varies.
    """
    variances = quantiles.var(dim=1, correction=0)
    if not bool(variances.max() > 0):
        raise MetricError("tones: all values of all real images are the same; give real images that vary")
    varies = variances > LEAST_VARIANCE * variances.max()
    return varies, variances[varies]


def sorted_without_each_group(features: Tensor, groups: Tensor) -> Iterator[Tensor]:
    """For each group, the values ``[distributions, n · 64]`` of the images that are not in it, ascending.

    One sort serves all groups: what is left of sorted values is sorted.

    Args:
        features: ``[N, D]``.
        groups: ``[N]``, the group of each image.
    """
    ordered, order = by_distribution(features).sort(dim=1)
    group_of_value = groups.to(features.device).repeat_interleave(GRID**2)[order]
    for group in range(GROUPS):
        yield ordered[group_of_value != group].reshape(len(ordered), -1)


def interpolated(ordered: Tensor, count: int) -> Tensor:
    """``[distributions, M]`` ascending values → the quantiles ``[distributions, count]`` at levels (i + ½) / count."""
    total = ordered.shape[1]
    # the place in the list, level · M − ½, in whole units of 1 / (2 · count), as not every device has float64
    places = ((2 * torch.arange(count, device=ordered.device) + 1) * total - count).clamp(0, 2 * count * (total - 1))
    below = places // (2 * count)
    above = (below + 1).clamp(max=total - 1)
    share = (places - 2 * count * below).to(ordered.dtype) / (2 * count)
    return torch.lerp(ordered[:, below], ordered[:, above], share)
