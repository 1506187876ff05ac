"""Metrics without each of ten groups of images: what errors of a choice and of a report are computed from.

All groups share the distances between features, so this costs about as much as the metric itself: means over samples
need the mean of each group, KID and recall need sums by group.

Distances also have values without each of ten groups of *real* images, since a few hundred real images are as uncertain
as a few hundred samples. Of FID these are linear in the covariance of the real images, and with many features also in
that of the samples: ten decompositions of large matrices for each model would say the same.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.metrics import distances, tones
from lcsc_opt.metrics.frechet import Array, FrechetReference, Moments
from lcsc_opt.metrics.names import Formula
from lcsc_opt.metrics.reference.reference import Reference

MANY_FEATURES = 512  # with more, a Fréchet distance takes a second, and ten of them ten
FEWEST_REAL = 2 * GROUPS  # real images, of which two are in each group

Rows = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
"""``[N]``: the group of each image."""


@torch.no_grad()
def without_each_group(formula: Formula, samples: Tensor, reference: Reference) -> Array:
    """``[2 G]``: a metric without each group of the samples, then without each group of the real images.

    The latter are the same number where no error of the real images is known: of metrics that are no distances, and of
    references that are statistics, or have too few images.

    Args:
        formula: one that is computed from features.
        samples: ``[N, D]`` features, on the device where distances are computed; enough of each group for the metric.
        reference: the real images.
    """
    of_samples = _without_samples(formula, samples, reference)
    of_real = np.full(GROUPS, of_samples.mean())  # ten equal numbers have no error
    if reference.features is not None and len(reference.features) >= FEWEST_REAL:
        if formula == "fid":
            of_real = _real_fid(samples, reference)
        elif formula == "tones":
            of_real = _real_tones(samples, reference)
    return np.concatenate([of_samples, of_real])


def _without_samples(formula: Formula, samples: Tensor, reference: Reference) -> Array:
    """``[G]``: a metric of the samples ``[N, D]`` that are not in a group, for each group."""
    labels = group_of_each(len(samples))
    match formula:
        case "fid":
            return _fid(samples, labels, reference.frechet)
        case "kid":
            return _kernel_distance(samples, labels, reference)
        case "precision":
            precise, _ = distances.precise_and_covered(samples, reference)
            return _means(precise, labels)
        case "recall":
            return _recall(samples, labels, reference)
        case "tones":
            return _tones(samples, labels, reference)
        case "near" | "hinge":
            return _means(distances.EACH[formula](samples, reference), labels)
        case _:  # the mean of the only feature
            return _means(samples[:, 0], labels)


def _means(values: Tensor, labels: Labels) -> Array:
    """``[N]`` → ``[G]``: the means over all samples but those of a group."""
    sums = np.bincount(labels, weights=values.cpu().double().numpy(), minlength=GROUPS)
    counts = np.bincount(labels, minlength=GROUPS)
    return np.asarray((sums.sum() - sums) / (counts.sum() - counts))


def _fid(samples: Tensor, labels: Labels, reference: FrechetReference) -> Array:
    """Exact for few features; for many, linear in the covariance of the samples."""
    features = samples.cpu().numpy()
    if len(features) < features.shape[1]:  # through the smaller N × N matrix
        groups = range(GROUPS)
        return np.array([reference.distance_from_features(features[labels != group]) for group in groups])
    without = _gaussians_without_each_group(features, labels)
    if features.shape[1] > MANY_FEATURES:
        return reference.distances_from_others(features, without)
    return np.array([reference.distance(*gaussian) for gaussian in without])


def _recall(samples: Tensor, labels: Labels, reference: Reference) -> Array:
    """The share of real images that are in the sphere of a sample of another group.

    The radii of the spheres are those among all samples. Among the others they would be a little larger, by the same
    for every group on average, and that cancels in an interval.
    """
    real = distances.real_features(samples, reference)
    radii = distances.radii_of(samples)
    members = _members(samples, labels)
    spheres = torch.zeros(len(real), GROUPS).to(samples)  # how many hold each real image, of samples in each group
    step = distances.rows_at_once(len(real))
    for start in range(0, len(samples), step):
        rows = slice(start, start + step)
        inside = torch.cdist(samples[rows], real) <= radii[rows, None]
        spheres += inside.to(samples).T @ members[rows]
    covered = spheres.sum(dim=1, keepdim=True) - spheres > 0  # [M, G]: by a sample that is not in the group
    return covered.double().mean(dim=0).cpu().numpy()


def _kernel_distance(samples: Tensor, labels: Labels, reference: Reference) -> Array:
    """The mean over the subsets of KID, from each of which the samples of a group are removed.

    A sum over pairs without a group is the sum over all pairs, less those in which either sample is of the group; pairs
    within the group are subtracted twice, and added again.
    """
    real = distances.real_features(samples, reference)
    dimension = real.shape[1]
    all_members = _members(samples, labels)
    values = []
    for rows, real_rows in distances.kernel_subsets(samples, real):
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
        sums = (members.T @ inside @ members).double()  # [G, G], over pairs of two groups
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
    """``[G]``: tones of the samples that are not in a group, to first order."""
    quantiles = tones.target_quantiles(reference, samples.device)
    return tones.tones_without_each_group(samples, quantiles, torch.from_numpy(labels)).cpu().numpy()


def _real_fid(samples: Tensor, reference: Reference) -> Array:
    """``[G]``: FID to the real images that are not in a group, linear in their covariance."""

    def without(features: Tensor) -> list[tuple[Array, Array]]:
        gaussians = _gaussians_without_each_group(features.numpy(), group_of_each(len(features)))
        return [reference.shrinkage.gaussian(*gaussian) for gaussian in gaussians]

    gaussians = reference.once("without groups", "cpu", without)
    return reference.frechet.distances_to_others(samples.cpu().numpy(), gaussians)


def _gaussians_without_each_group(features: Rows, labels: Labels) -> list[tuple[Array, Array]]:
    """The means ``[D]`` and covariances ``[D, D]`` of the images that are not in a group, for each group."""
    moments = [Moments.of(features[labels == group]) for group in range(GROUPS)]
    rests = [functools.reduce(Moments.merge, moments[:group] + moments[group + 1 :]) for group in range(GROUPS)]
    return [(of_others.mean, of_others.covariance) for of_others in rests]


def _real_tones(samples: Tensor, reference: Reference) -> Array:
    """``[G]``: tones to the real images that are not in a group."""

    def quantiles(features: Tensor) -> list[Tensor]:
        labels = torch.from_numpy(group_of_each(len(features)))
        rests = tones.sorted_without_each_group(features, labels)
        return [reference.shrinkage.quantiles(tones.interpolated(ordered, tones.LEVELS)) for ordered in rests]

    # no more values than the real quantiles, so that ten comparisons cost little
    ordered = tones.interpolated(tones.by_distribution(samples).sort(dim=1).values, tones.LEVELS)
    without = reference.once("quantiles without groups", samples.device, quantiles)
    return np.array([float(tones.distance_of_sorted(ordered, of_others)) for of_others in without])
