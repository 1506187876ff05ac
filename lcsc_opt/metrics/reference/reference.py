"""The real images that samples are compared with, in the features of one extractor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import NEIGHBOURHOOD, radii
from lcsc_opt.metrics.frechet import FrechetReference
from lcsc_opt.metrics.statistics import ReferenceStatistics

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of the real images' features and, where metrics need them, these features.

    Values that all evaluations share are computed once, when they are first needed.

    Attributes:
        statistics: mean and covariance.
        identity: names the images and the extractor by their content, for the fingerprint of a study.
        all_features: ``[M, D]`` float32; None when nothing but mean and covariance is known or needed.
        size: height and width of the images, where they are known and alike.
        held_out: other real images, which no loss sees, with their features; None where there are none.
    """

    statistics: ReferenceStatistics
    identity: str
    all_features: npt.NDArray[np.float32] | None = None
    size: tuple[int, int] | None = None
    held_out: Reference | None = None

    @classmethod
    def from_statistics(cls, statistics: ReferenceStatistics) -> Reference:
        """A reference of mean and covariance alone: enough for FID."""
        return cls(statistics, statistics.sha256)

    @property
    def features(self) -> npt.NDArray[np.float32]:
        """``[M, D]`` float32.

        Raises:
            MetricError: only mean and covariance are known.
        """
        if self.all_features is None:
            raise MetricError(NO_FEATURES)
        return self.all_features

    @property
    def unseen(self) -> Reference:
        """:attr:`held_out`.

        Raises:
            MetricError: there are none.
        """
        if self.held_out is None:
            raise MetricError(NOTHING_HELD_OUT)
        return self.held_out

    @cached_property
    def frechet(self) -> FrechetReference:
        """Distances to the mean and covariance."""
        return FrechetReference(self.statistics.mean, self.statistics.cov)

    def radii(self, device: torch.device | str) -> Tensor:
        """``[M]`` distance of each real image to its third nearest, for precision. Raises MetricError below four."""
        if len(self.features) <= NEIGHBOURHOOD:
            raise MetricError(f"precision and recall need more than {NEIGHBOURHOOD} reference images")
        return self.once("radii", device, radii)

    def features_on(self, device: torch.device | str) -> Tensor:
        """``[M, D]`` float32, kept on ``device``.

        Raises:
            MetricError: only mean and covariance are known.
        """
        if str(device) not in self._features:
            self._features[str(device)] = torch.from_numpy(self.features).to(device)
        return self._features[str(device)]

    def once(self, name: str, device: torch.device | str, compute: Callable[[Tensor], T]) -> T:
        """The result of ``compute`` for the features ``[M, D]`` on ``device``; computed once, then kept.

        Raises:
            MetricError: only mean and covariance are known.
        """
        place = (name, str(device))
        if place not in self._computed:
            with torch.no_grad():
                self._computed[place] = compute(self.features_on(device))
        return cast("T", self._computed[place])

    @cached_property
    def _features(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _computed(self) -> dict[tuple[str, str], object]:
        return {}


NO_FEATURES = (
    "this metric compares features, and the reference holds mean and covariance only; "
    "give the images themselves (a folder, a .zip, ADM's .npz) or saved features [N, D]"
)
NOTHING_HELD_OUT = (
    "this metric compares with real images that the loss does not see, and none are held out; "
    "give reference: {train: FOLDER, held_out: FOLDER}, or {train: FOLDER, held_out_fraction: 0.2}"
)
