"""FIDs of parts of the images: without a group each, and extrapolated to infinitely many.

FID is biased upwards: with N images it is ``FID∞ + c / N`` to first order (Chong & Forsyth 2020, arXiv 1911.07023,
Section 3), and c depends on the model. They fit a line in 1 / N to one random subset of each size. Here the subsets of
a size divide the images, and their FIDs are averaged: what single images change about FID cancels in the differences,
so the line has less noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.metrics.frechet import Array, FrechetReference, Moments

DIVISIONS = (1, 2, 5)  # into how many parts the images are divided for the points of the line
FEWEST_IMAGES = 2 * GROUPS  # a covariance of each group; the line is straight from 10 images for each feature
_ALL_GROUPS = frozenset(range(GROUPS))


class GroupedFid:
    """FID of features that are divided at random into ten groups; each distance is computed once.

    Args:
        reference: the Gaussian of the real images.
        features: ``[N, D]``, at least two of each part.
    """

    def __init__(self, reference: FrechetReference, features: npt.ArrayLike) -> None:
        self._reference = reference
        self._features = np.asarray(features)
        self._labels = group_of_each(len(self._features))
        self._moments: dict[int, Moments] = {}
        self._distances: dict[frozenset[int], float] = {}

    def without_each_group(self) -> Array:
        """``[G]``: FID without one of the groups."""
        return np.array([self._distance(_ALL_GROUPS - {group}) for group in range(GROUPS)])

    def extrapolated(self) -> float:
        """FID of infinitely many images; 8 distances."""
        return self._extrapolated(_ALL_GROUPS)

    def extrapolated_without_each_group(self) -> Array:
        """``[G]``: the same without one of the groups; 30 distances, 10 of which FID shares."""
        return np.array([self._extrapolated(_ALL_GROUPS - {group}) for group in range(GROUPS)])

    def _extrapolated(self, groups: frozenset[int]) -> float:
        points = [self._point(groups, parts) for parts in DIVISIONS]
        inverse_counts, distances = np.array(points).T
        _, at_zero = np.polyfit(inverse_counts, distances, 1)
        return float(at_zero)

    def _point(self, groups: frozenset[int], parts: int) -> tuple[float, float]:
        """The means of 1 / N and of FID over the parts of a division, each by the images in it."""
        size = GROUPS // parts
        subsets = []
        for part in range(parts):
            subset = groups.intersection(range(part * size, (part + 1) * size))
            if subset:
                subsets.append(subset)
        counts = [self._count(subset) for subset in subsets]
        inverse_count = np.average([1 / count for count in counts], weights=counts)
        distance = np.average([self._distance(subset) for subset in subsets], weights=counts)
        return float(inverse_count), float(distance)

    def _count(self, groups: frozenset[int]) -> int:
        return int(np.isin(self._labels, list(groups)).sum())

    def _distance(self, groups: frozenset[int]) -> float:
        if groups not in self._distances:
            self._distances[groups] = self._computed_distance(sorted(groups))
        return self._distances[groups]

    def _computed_distance(self, groups: Sequence[int]) -> float:
        rows = np.isin(self._labels, groups)
        if rows.sum() < self._features.shape[1]:  # through the smaller N × N matrix
            return self._reference.distance_from_features(self._features[rows])
        moments = Moments()
        for group in groups:
            moments = moments.merge(self._moments_of(group))
        return self._reference.distance_from_moments(moments)

    def _moments_of(self, group: int) -> Moments:
        if group not in self._moments:
            self._moments[group] = Moments.of(self._features[self._labels == group])
        return self._moments[group]
