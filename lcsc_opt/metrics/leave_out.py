"""Metrics without each of ten groups of images: what the intervals of held-out reports are computed from.

All groups share the distances between features, so this costs about as much as the metric itself: means over samples
need the mean of each group, KID and recall need sums by group. FID needs ten Fréchet distances.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.metrics.distances import (
    EACH,
    kernel_subsets,
    precise_and_covered,
    radii_of,
    real_features,
    rows_at_once,
)
from lcsc_opt.metrics.frechet import Array, FrechetReference, Moments
from lcsc_opt.metrics.names import Formula
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.tones import by_distribution, distance_of_sorted

Labels = npt.NDArray[np.int64]
"""``[N]``: the group of each image."""


@torch.no_grad()
def without_each_group(formula: Formula, samples: Tensor, reference: Reference) -> Array:
    """``[G]``: a metric of the samples that are not in a group, for each group.

    Args:
        formula: one that is computed from features.
        samples: ``[N, D]`` features, on the device where distances are computed; enough of each group for the metric.
        reference: the real images.
    """
    labels = group_of_each(len(samples))
    match formula:
        case "fid":
            return _fid(samples, labels, reference.frechet)
        case "fid_held_out":
            return _fid(samples, labels, reference.unseen.frechet)
        case "kid":
            return _kernel_distance(samples, labels, reference)
        case "precision":
            precise, _ = precise_and_covered(samples, reference)
            return _means(precise, labels)
        case "recall":
            return _recall(samples, labels, reference)
        case "spread":
            pixels = samples.cpu().double().numpy()
            return np.array([_spread(pixels[labels != group]) for group in range(GROUPS)])
        case "tones":
            return _tones(samples, labels, reference)
        case "tones_held_out":
            return _tones(samples, labels, reference.unseen)
        case "near" | "hinge":
            return _means(EACH[formula](samples, reference), labels)
        case _:  # the mean of the only feature
            return _means(samples[:, 0], labels)


def _means(values: Tensor, labels: Labels) -> Array:
    """``[N]`` → ``[G]``: the means over all samples but those of a group."""
    sums = np.bincount(labels, weights=values.cpu().double().numpy(), minlength=GROUPS)
    counts = np.bincount(labels, minlength=GROUPS)
    means: Array = (sums.sum() - sums) / (counts.sum() - counts)
    return means


def _fid(samples: Tensor, labels: Labels, reference: FrechetReference) -> Array:
    features = samples.cpu().numpy()
    if len(features) < features.shape[1]:  # through the smaller N × N matrix
        distances = [reference.distance_from_features(features[labels != group]) for group in range(GROUPS)]
        return np.array(distances)
    moments = [Moments.of(features[labels == group]) for group in range(GROUPS)]
    distances = []
    for group in range(GROUPS):
        others = functools.reduce(Moments.merge, moments[:group] + moments[group + 1 :])
        distances.append(reference.distance_from_moments(others))
    return np.array(distances)


def _recall(samples: Tensor, labels: Labels, reference: Reference) -> Array:
    """The spheres are those among all samples.

    Radii among the others would grow a little, by the same for every group on average, and that cancels in an interval.
    """
    real = real_features(samples, reference)
    radii = radii_of(samples)
    members = _members(samples, labels)
    spheres = torch.zeros(len(real), GROUPS).to(samples)  # around each real image, of samples in each group
    step = rows_at_once(len(real))
    for start in range(0, len(samples), step):
        rows = slice(start, start + step)
        inside = torch.cdist(samples[rows], real) <= radii[rows, None]
        spheres += inside.to(samples).T @ members[rows]
    covered = spheres.sum(dim=1, keepdim=True) - spheres > 0
    return covered.double().mean(dim=0).cpu().numpy()


def _kernel_distance(samples: Tensor, labels: Labels, reference: Reference) -> Array:
    """The means over the subsets of KID, from which the samples of a group are removed."""
    real = real_features(samples, reference)
    dimension = real.shape[1]
    all_members = _members(samples, labels)
    values = []
    for rows, real_rows in kernel_subsets(samples, real):
        x = samples[rows]
        y = real[real_rows]
        members = all_members[rows]
        inside = (x @ x.T / dimension + 1) ** 3
        inside.fill_diagonal_(0)
        inside_real = (y @ y.T / dimension + 1) ** 3
        inside_real.fill_diagonal_(0)
        across = (x @ y.T / dimension + 1) ** 3
        remaining = len(x) - members.sum(dim=0).double()  # [G]
        pairs = remaining * (remaining - 1)
        real_pairs = len(y) * (len(y) - 1)
        sums = (members.T @ inside @ members).double()  # [G, G]
        sums_inside = sums.sum() - sums.sum(dim=0) - sums.sum(dim=1) + sums.diagonal()
        sums_across = (members.T @ across.sum(dim=1)).double()  # [G]
        within = sums_inside / pairs + inside_real.sum().double() / real_pairs
        between = (sums_across.sum() - sums_across) / (remaining * len(y))
        values.append(within - 2 * between)
    return torch.stack(values).mean(dim=0).cpu().numpy()


def _members(samples: Tensor, labels: Labels) -> Tensor:
    """``[N, G]``, of the type of the samples and on their device: 1 where a sample is of a group, else 0."""
    return torch.from_numpy(np.eye(GROUPS)[labels]).to(samples)


def _tones(samples: Tensor, labels: Labels, reference: Reference) -> Array:
    """One sort serves all groups: what is left of sorted values is sorted."""
    ordered, order = by_distribution(samples).sort(dim=1)
    values_of_an_image = ordered.shape[1] // len(samples)
    groups = torch.from_numpy(labels).to(samples.device).repeat_interleave(values_of_an_image)[order]
    distances = []
    for group in range(GROUPS):
        of_others = ordered[groups != group].reshape(len(ordered), -1)
        distances.append(float(distance_of_sorted(of_others, reference)))
    return np.array(distances)


def _spread(pixels: Array) -> float:
    """The root mean square deviation from the mean image, over pixels."""
    return math.sqrt(float(pixels.var(axis=0).mean()))
