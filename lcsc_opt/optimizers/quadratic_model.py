"""A quadratic model of a loss around a centre, learned from losses alone: pure functions of arrays.

Among all quadratics that explain the losses, it is the one that differs least from the model before (Powell 2004,
*Least Frobenius norm updating of quadratic models that satisfy interpolation conditions*). It is written as the mean of
a Gaussian process, so that losses need not be met exactly: far from the centre no loss is a quadratic.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

SLOPE_SPREAD = 30.0  # of the slope before anything was measured, in units of the scale: as good as unknown
CURVATURE_SPREAD = 0.5  # of each entry of the curvature around the prior's, in units of the scale
MISFIT = 0.05  # how far a loss departs from a quadratic, as a share of scale * distance²


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
    """loss(centre + x) = loss(centre) + slope · x + x · curvature · x / 2.

    Attributes:
        slope: ``[r]``.
        curvature: ``[r, r]``, symmetric.
    """

    slope: Vector
    curvature: Vector

    @classmethod
    def unknown(cls, scale: float, dimension: int) -> Quadratic:
        """The model before any measurement: no slope, and the curvature ``scale`` in all directions."""
        return cls(np.zeros(dimension), scale * np.eye(dimension))

    def around(self, offset: Vector) -> Quadratic:
        """The same function with its centre moved by ``offset`` ``[r]``."""
        return Quadratic(self.slope + self.curvature @ offset, self.curvature)

    def change(self, offset: Vector) -> float:
        """The change of the loss from the centre to ``offset`` ``[r]``."""
        return float(self.slope @ offset + offset @ self.curvature @ offset / 2)


def fitted(prior: Quadratic, offsets: Vector, changes: Vector, *, scale: float, reach: float) -> Quadratic:
    """The quadratic that explains the measured changes and differs least from ``prior``.

    Args:
        prior: the model before, around the same centre.
        offsets: ``[N, r]`` where losses were measured, from the centre.
        changes: ``[N]`` their losses, less the centre's.
        scale: the size of a curvature.
        reach: distances below a hundredth of it count as that, so that losses at nearly one point do not contradict
            each other.
    """
    if not len(offsets):
        return prior
    rest = changes - offsets @ prior.slope - np.sum((offsets @ prior.curvature) * offsets, axis=1) / 2
    products = offsets @ offsets.T
    misfit = MISFIT * scale * np.maximum(np.diag(products), (reach / 100) ** 2)
    covariance = (SLOPE_SPREAD * scale) ** 2 * products + (CURVATURE_SPREAD * scale * products) ** 2 / 2
    weights = np.linalg.solve(covariance + np.diag(misfit**2), rest)
    slope = prior.slope + (SLOPE_SPREAD * scale) ** 2 * (weights @ offsets)
    curvature = prior.curvature + (CURVATURE_SPREAD * scale) ** 2 * (offsets.T * weights) @ offsets
    return Quadratic(slope, (curvature + curvature.T) / 2)


def step_within(model: Quadratic, radius: float, *, floor: float) -> Vector:
    """``[r]``: the way to the model's minimum, no longer than ``radius``, with curvatures of at least ``floor``.

    Moré and Sorensen 1983, in the basis of eigenvectors. The floor keeps steps short where the loss is flat: there the
    model's error, and the noise of few images, are larger than any gain.
    """
    values, vectors = np.linalg.eigh(model.curvature)
    values, slope = np.maximum(values, floor), vectors.T @ model.slope
    damping = 0.0
    if np.linalg.norm(slope / values) > radius:
        low, high = 0.0, float(np.linalg.norm(slope)) / radius
        for _ in range(60):
            damping = (low + high) / 2
            low, high = (damping, high) if np.linalg.norm(slope / (values + damping)) > radius else (low, damping)
        damping = high
    step: Vector = -(vectors @ (slope / (values + damping)))
    return step


def second_difference(before: float, middle: float, after: float) -> float:
    """The curvature that three losses at -1, 0 and 1 show."""
    return before + after - 2 * middle
