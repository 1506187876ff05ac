"""Metrics without each of ten groups of images: what the intervals of held-out reports are computed from.

Each costs about as much as the metric itself, since all groups share the distances between features: means over samples
need the mean of each group; KID, CMMD and recall need sums or nearest neighbours by group. Only ``sliced`` is computed
ten times, and FID needs ten Fréchet distances (:mod:`~lcsc_opt.metrics.grouped_fid`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.metrics.clipped import clipped_coverage, clipped_density_of_each, samples_in_spheres
from lcsc_opt.metrics.distances import (
    EACH,
    FIDELITY,
    KERNEL_SCALE,
    NEIGHBOURHOOD,
    kernel_subsets,
    kernel_sums,
    mean_kernel_of_reference,
    precise_and_covered,
    real_features,
    rows_at_once,
)
from lcsc_opt.metrics.frechet import Array
from lcsc_opt.metrics.names import Formula
from lcsc_opt.metrics.reference.reference import Reference


class GroupedSamples:
    """Samples in ten groups, and their metrics without each group.

    Args:
        samples: ``[N, D]`` features, on the device where distances are computed; enough of each group for the metrics.
        reference: the real images.
    """

    def __init__(self, samples: Tensor, reference: Reference) -> None:
        self._samples = samples
        self._reference = reference
        self._labels = group_of_each(len(samples))
        one_hot = np.eye(GROUPS)[self._labels]
        self._members = torch.from_numpy(one_hot).to(samples)  # [N, G]
        self._counts = np.bincount(self._labels, minlength=GROUPS)

    @torch.no_grad()
    def without_each_group(self, formula: Formula) -> Array:
        """``[G]``: the metric of the samples that are not in a group, for each group."""
        match formula:
            case "reward" | "held_out_reward" | "outside":
                return self._means(self._samples[:, 0])
            case "spread":
                return np.array([_spread(self._samples[self._others(group)]) for group in range(GROUPS)])
            case "near" | "hinge" | "nearer_train" | "authenticity":
                return self._means(EACH[formula](self._samples, self._reference))
            case "precision":
                precise, _ = precise_and_covered(self._samples, self._reference)
                return self._means(precise)
            case "recall":
                return self._recall()
            case "clipped_density":
                return np.minimum(1.0, self._means(clipped_density_of_each(self._samples, self._reference)))
            case "clipped_coverage":
                return self._clipped_coverage()
            case "kid":
                return self._kernel_distance()
            case "cmmd":
                return self._cmmd()
            case _:
                metric = FIDELITY[formula]
                values = [metric(self._samples[self._others(group)], self._reference) for group in range(GROUPS)]
                return np.array([float(value) for value in values])

    def _others(self, group: int) -> Tensor:
        """The indices of the samples that are not in a group."""
        return torch.from_numpy(np.flatnonzero(self._labels != group)).to(self._samples.device)

    def _means(self, values: Tensor) -> Array:
        """``[N]`` → ``[G]``: the means over all samples but those of a group."""
        sums = np.bincount(self._labels, weights=values.cpu().double().numpy(), minlength=GROUPS)
        means: Array = (sums.sum() - sums) / (self._counts.sum() - self._counts)
        return means

    def _recall(self) -> Array:
        """A real image is covered if it is in the sphere of a sample that ends at its third nearest other sample."""
        real = real_features(self._samples, self._reference)
        radii = self._radii_without_each_group()
        covered = torch.zeros(GROUPS, len(real), dtype=torch.bool, device=real.device)
        step = rows_at_once(len(real))
        for start in range(0, len(self._samples), step):
            distances = torch.cdist(self._samples[start : start + step], real)  # [rows, M]
            labels = self._labels[start : start + step]
            for group in range(GROUPS):
                rows_of_other_groups = torch.from_numpy(np.flatnonzero(labels != group)).to(real.device)
                spheres = radii[start + rows_of_other_groups, group]
                covered[group] |= (distances[rows_of_other_groups] <= spheres[:, None]).any(dim=0)
        return covered.double().mean(dim=1).cpu().numpy()

    def _radii_without_each_group(self) -> Tensor:
        """``[N, G]``: distance of each sample to its third nearest other that is not in a group."""
        members = [torch.from_numpy(np.flatnonzero(self._labels == group)) for group in range(GROUPS)]
        radii = []
        for rows in torch.split(self._samples, rows_at_once(len(self._samples))):
            distances = torch.cdist(rows, self._samples)
            # the nearest of each group; the nearest of all is the sample itself
            nearest = []
            for group in range(GROUPS):
                of_group = distances[:, members[group].to(rows.device)]
                nearest.append(of_group.topk(NEIGHBOURHOOD + 1, dim=1, largest=False).values)
            columns = []
            for group in range(GROUPS):
                distances_without_group = torch.cat(nearest[:group] + nearest[group + 1 :], dim=1)
                columns.append(distances_without_group.kthvalue(NEIGHBOURHOOD + 1, dim=1).values)
            radii.append(torch.stack(columns, dim=1))
        return torch.cat(radii)

    def _clipped_coverage(self) -> Array:
        counts = samples_in_spheres(self._samples, self._reference, self._members)  # [M, G]
        total = counts.sum(dim=1)
        values = []
        for group in range(GROUPS):
            remaining_samples = len(self._samples) - int(self._counts[group])
            values.append(clipped_coverage(total - counts[:, group], remaining_samples))
        return np.array(values)

    def _kernel_distance(self) -> Array:
        """The means over the subsets of KID, from which the samples of a group are removed."""
        real = real_features(self._samples, self._reference)
        dimension = real.shape[1]
        values = []
        for rows, real_rows in kernel_subsets(self._samples, real):
            x = self._samples[rows]
            y = real[real_rows]
            members = self._members[rows]
            inside = (x @ x.T / dimension + 1) ** 3
            inside.fill_diagonal_(0)
            inside_real = (y @ y.T / dimension + 1) ** 3
            inside_real.fill_diagonal_(0)
            across = (x @ y.T / dimension + 1) ** 3
            remaining = len(x) - members.sum(dim=0).double()  # [G]
            pairs = remaining * (remaining - 1)
            real_pairs = len(y) * (len(y) - 1)
            within = _without_each(members.T @ inside @ members) / pairs + inside_real.sum().double() / real_pairs
            between = _sums_without_each(members.T @ across.sum(dim=1)) / (remaining * len(y))
            values.append(within - 2 * between)
        return torch.stack(values).mean(dim=0).cpu().numpy()

    def _cmmd(self) -> Array:
        unit = F.normalize(self._samples, dim=1)
        real = F.normalize(real_features(self._samples, self._reference), dim=1)
        everything = torch.ones(len(real), 1).to(real)
        inside = _without_each(kernel_sums(unit, unit, self._members, self._members))
        across = _sums_without_each(kernel_sums(unit, real, self._members, everything)[:, 0])
        remaining = len(unit) - self._members.sum(dim=0).double()
        inside_reference = mean_kernel_of_reference(self._reference, self._samples.device)
        distances = inside / remaining**2 + inside_reference - 2 * across / (remaining * len(real))
        return (KERNEL_SCALE * distances).cpu().numpy()


def _without_each(sums: Tensor) -> Tensor:
    """``[G]``: the sum of ``[G, G]`` without the row and the column of a group."""
    sums = sums.double()
    return sums.sum() - sums.sum(dim=0) - sums.sum(dim=1) + sums.diagonal()


def _sums_without_each(sums: Tensor) -> Tensor:
    """``[G]``: the sum of ``[G]`` without a group."""
    sums = sums.double()
    return sums.sum() - sums


def _spread(pixels: Tensor) -> float:
    """The root mean square deviation from the mean image, over pixels."""
    return math.sqrt(float(pixels.double().var(dim=0, correction=0).mean()))
