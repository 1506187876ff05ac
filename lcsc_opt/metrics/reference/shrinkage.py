"""How far the target of a loss is the average of the checkpoints, where real images are few."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lcsc_opt.metrics.frechet import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Shrinkage:
    """Moves statistics of real images towards those of an average of the checkpoints. By default, nothing moves.

    Attributes:
        of_mean: the weight of the average in a mean, or in the quantiles of :mod:`~lcsc_opt.metrics.tones`; 0 to 1.
        of_covariance: likewise in a covariance.
        average: the mean ``[D]`` and the covariance ``[D, D]`` of the average's samples.
        average_quantiles: ``[distributions, levels]`` of the average's samples.
    """

    of_mean: float = 0.0
    of_covariance: float = 0.0
    average: tuple[Array, Array] | None = None
    average_quantiles: Tensor | None = None

    def gaussian(self, mean: Array, covariance: Array) -> tuple[Array, Array]:
        """The target's mean ``[D]`` and covariance ``[D, D]``, from those of real images."""
        if self.average is None:
            return mean, covariance
        average_mean, average_covariance = self.average
        shrunk_mean = (1 - self.of_mean) * mean + self.of_mean * average_mean
        shrunk_covariance = (1 - self.of_covariance) * covariance + self.of_covariance * average_covariance
        return shrunk_mean, shrunk_covariance

    def quantiles(self, quantiles: Tensor) -> Tensor:
        """The target's quantiles, from those of real images, ``[distributions, levels]`` both."""
        if self.average_quantiles is None:
            return quantiles
        return torch.lerp(quantiles, self.average_quantiles.to(quantiles), self.of_mean)

    @property
    def weights(self) -> dict[str, float]:
        """What is shrunk, in words → its weight of the average."""
        if self.average is None:
            return {"distributions": self.of_mean}
        return {"mean": self.of_mean, "covariance": self.of_covariance}


NOTHING = Shrinkage()
