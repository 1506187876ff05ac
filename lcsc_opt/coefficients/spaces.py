"""Coefficient spaces: maps from the free vector ``[d]`` that an optimizer moves to ``[K]`` coefficients."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import NEAR_ZERO, close_sum, normalize

_Array = npt.NDArray[np.float64]


class CoefficientSpace(Protocol):
    """A map between the free vector that an optimizer moves and coefficients that sum to one.

    The zero vector maps to the space's origin. For coefficients that the space reaches, ``to_free`` inverts
    ``to_coefficients`` up to rounding; for others it gives the free vector of coefficients near them.
    """

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints."""
        ...

    @property
    def dimension(self) -> int:
        """d, the length of the free vector."""
        ...

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[d]`` → ``[K]``, sum to one within 1e-12."""
        ...

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[d]``."""
        ...

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:
        """The chain rule at ``free``: a gradient in the coefficients ``[K]`` → the one in the free vector ``[d]``."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class AffineSpace:
    """All coefficients that sum to one: an origin plus an orthonormal basis of the sum-zero directions, d = K - 1.

    The basis is the first K - 1 columns of the Householder reflection of the last axis onto the negative diagonal.
    It is orthonormal, so a step has the same length in both spaces. Free coordinate i moves coefficient i and hardly
    any other; optimizers that work coordinate by coordinate need this. Both maps cost O(K) and no BLAS.
    """

    steps: tuple[int, ...]
    origin: Coefficients

    @property
    def dimension(self) -> int:
        """K - 1."""
        return len(self.steps) - 1

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[K - 1]`` → ``[K]``."""
        return close_sum(self.origin + _reflect(np.append(free, 0.0)))

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[K - 1]``."""
        return _reflect(np.asarray(coefficients, dtype=np.float64) - self.origin)[:-1]

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:  # noqa: ARG002 - the map is linear
        """``[K]`` → ``[K - 1]``, the same everywhere: the basis transposed."""
        return _reflect(gradient)[:-1]


def _reflect(vector: _Array) -> _Array:
    """Householder reflection I - 2 v v^T, v along diagonal + last axis; it is its own inverse."""
    count = len(vector)
    shift = 1 / math.sqrt(count)
    normal = np.full(count, shift)
    normal[-1] += 1.0
    scale = float(np.sum(normal * vector)) / (1 + shift)  # 2 / |normal|^2 = 1 / (1 + shift)
    return np.asarray(vector - scale * normal)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvexSpace:
    """The convex hull of the checkpoints (Liu et al. 2024, Table 14): clip to non-negative, divide by the sum; d = K.

    Where clipping leaves (nearly) nothing, the free vector stands for the origin.
    """

    steps: tuple[int, ...]
    origin: Coefficients

    @property
    def dimension(self) -> int:
        """K."""
        return len(self.steps)

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[K]`` → ``[K]``, non-negative."""
        clipped = np.maximum(self.origin + free, 0.0)
        return normalize(clipped) if math.fsum(clipped) >= NEAR_ZERO else self.origin.copy()

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[K]``; negative coefficients come back clipped."""
        return np.asarray(coefficients, dtype=np.float64) - self.origin

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:
        """``[K]`` → ``[K]``; zero where clipping hides a change.

        A coefficient that is exactly zero can only grow. Its derivative counts only where the loss falls as it grows.
        """
        moved = self.origin + free
        clipped = np.maximum(moved, 0.0)
        total = math.fsum(clipped)
        if total < NEAR_ZERO:  # the coefficients are the origin's, whatever is changed
            return np.zeros_like(clipped)
        slope = (gradient - math.fsum(gradient * clipped) / total) / total
        return np.where((moved > 0) | ((moved == 0) & (slope < 0)), slope, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalSpace:
    """The r leading directions of the trajectory's own covariance, as directions of coefficients; d = r.

    ``basis`` is ``[K, r]``, orthonormal, its columns sum to zero.
    """

    steps: tuple[int, ...]
    origin: Coefficients
    basis: _Array

    @classmethod
    def of(cls, steps: tuple[int, ...], origin: Coefficients, gram: _Array, dimension: int) -> PrincipalSpace:
        """The space of the leading eigenvectors of ``gram``, ``[K, K]``, of the checkpoints less their mean.

        Raises:
            StudySpecError: ``dimension``, r, is not from 1 to K - 1.
        """
        count = len(gram)
        if not 1 <= dimension <= count - 1:
            raise StudySpecError(f"space.principal: expected 1 to {count - 1} directions, got {dimension}")
        # the shift lowers the eigenvalue of the diagonal (1, …, 1) from zero to below all others: it is never chosen
        _, vectors = np.linalg.eigh(gram - np.trace(gram) / count)
        leading = vectors[:, ::-1][:, :dimension]
        leading = leading - leading.mean(axis=0)
        largest = np.abs(leading).argmax(axis=0)  # made positive, so signs are reproducible
        signs = np.sign(leading[largest, np.arange(dimension)])
        return cls(steps, origin, np.asarray(leading * signs, dtype=np.float64))

    @property
    def dimension(self) -> int:
        """The number of directions, r."""
        return int(self.basis.shape[1])

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[r]`` → ``[K]``."""
        return close_sum(self.origin + (self.basis * free).sum(axis=1))

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[r]``, the orthogonal projection."""
        moved = np.asarray(coefficients, dtype=np.float64) - self.origin
        return np.asarray((self.basis * moved[:, None]).sum(axis=0))

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:  # noqa: ARG002 - the map is linear
        """``[K]`` → ``[r]``, the same everywhere: the basis transposed."""
        return np.asarray((self.basis * gradient[:, None]).sum(axis=0))
