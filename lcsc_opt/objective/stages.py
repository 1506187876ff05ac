"""The results that each stage of an evaluation hands to the next, and the cost of each stage."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Cost
from lcsc_opt.metrics.parts import FeaturePart

FeatureGradients = dict[str, npt.NDArray[np.floating[Any]]]
"""Extractor's name → the derivative of the loss in the features of some images, ``[n, D]``."""


class Merged:
    """The merged weights of one candidate. They can be taken only once, so no copy stays while images are sampled.

    Args:
        weights: name → tensor.
        cost: what merging took.
    """

    def __init__(self, weights: Mapping[str, Tensor], cost: Cost) -> None:
        self._weights: Mapping[str, Tensor] | None = weights
        self.cost = cost

    def take(self) -> Mapping[str, Tensor]:
        """The weights.

        Raises:
            ObjectiveError: they were taken before.
        """
        weights, self._weights = self._weights, None
        if weights is None:
            raise ObjectiveError("merged weights are sampled from once; prepare the candidate again")
        return weights


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
    """The reduced images of a part, and what they cost, merging included."""

    part: FeaturePart
    cost: Cost


class Stopwatch:
    """Wall-clock seconds of each part of an evaluation: ``merge``, ``sample``, ``features``, ``metric``."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("merge", "sample", "features", "metric"), 0.0)

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the time while this is open for that part."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def cost(self, *, images: int = 0, model_calls: int = 0) -> Cost:
        """The seconds of all parts."""
        parts = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        return Cost(images=images, model_calls=model_calls, seconds=sum(parts.values()), **parts)


def ranges(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """``[first, last)`` as ranges of at most ``size`` images."""
    for start in range(first, last, size):
        yield start, min(start + size, last)


def split_rows(gradients: Mapping[str, npt.NDArray[np.floating[Any]]], counts: Sequence[int]) -> list[FeatureGradients]:
    """Rows ``[N, D]`` of all images, divided into parts with these numbers of images."""
    ends = np.cumsum(counts)[:-1]
    by_name = {name: np.split(rows, ends) for name, rows in gradients.items()}
    return [{name: parts[index] for name, parts in by_name.items()} for index in range(len(counts))]
