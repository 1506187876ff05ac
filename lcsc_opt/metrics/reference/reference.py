"""The real images that samples are compared with, seen by one extractor."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import NEIGHBOURHOOD, radii
from lcsc_opt.metrics.frechet import FrechetReference
from lcsc_opt.metrics.statistics import ReferenceStatistics


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of the real images' features and, where metrics need them, the features themselves.

    What every evaluation needs again is computed once, when it is first needed.

    Attributes:
        statistics: mean and covariance.
        identity: names the images and the extractor by their content, for the fingerprint of a study.
        all_features: ``[M, D]`` float32; None when nothing but mean and covariance is known or needed.
        size: height and width of the images, where they are known and alike.
    """

    statistics: ReferenceStatistics
    identity: str
    all_features: npt.NDArray[np.float32] | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def from_statistics(cls, statistics: ReferenceStatistics) -> Reference:
        """A reference of mean and covariance alone: enough for FID."""
        return cls(statistics, statistics.sha256)

    @property
    def features(self) -> npt.NDArray[np.float32]:
        """``[M, D]`` float32. Raises MetricError where only mean and covariance are known."""
        if self.all_features is None:
            raise MetricError(NO_FEATURES)
        return self.all_features

    @cached_property
    def frechet(self) -> FrechetReference:
        """Distances to the mean and covariance."""
        return FrechetReference(self.statistics.mean, self.statistics.cov)

    def radii(self, device: torch.device | str) -> Tensor:
        """``[M]`` distance of each real image to its third nearest, for precision. Raises MetricError below four."""
        if len(self.features) <= NEIGHBOURHOOD:
            raise MetricError(f"precision and recall need more than {NEIGHBOURHOOD} reference images")
        if str(device) not in self._radii:
            self._radii[str(device)] = radii(self.features_on(device))
        return self._radii[str(device)]

    def features_on(self, device: torch.device | str) -> Tensor:
        """``[M, D]`` float32, kept on ``device``. Raises MetricError where only mean and covariance are known."""
        if str(device) not in self._features:
            self._features[str(device)] = torch.from_numpy(self.features).to(device)
        return self._features[str(device)]

    @cached_property
    def _radii(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _features(self) -> dict[str, Tensor]:
        return {}


NO_FEATURES = (
    "kid, precision and recall compare features, and this reference holds mean and covariance only; "
    "give the images themselves (a folder, a .zip, ADM's .npz) or saved features [N, D]"
)
