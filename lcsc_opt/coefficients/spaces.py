"""Coefficient spaces: maps from the free vector ``[d]`` that an optimizer moves to ``[K]`` coefficients.

With a row of coefficients for each of S layer groups, both have a first axis: ``[S, d]`` and ``[S, K]``. All maps work
on the last axis, row by row, and take ``[K]`` coefficients for S equal rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import NEAR_ZERO, close_sum, exact_sums, normalize

_Array = npt.NDArray[np.float64]
_ROUNDING = 1e-14  # of a coefficient, on the way to a free vector and back


class CoefficientSpace(Protocol):
    """A map between the free vector that an optimizer moves and coefficients that sum to one.

    The zero vector maps to the space's origin. For coefficients that the space reaches, ``to_free`` inverts
    ``to_coefficients`` up to rounding; for others it gives the free vector of coefficients near them.
    """

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints."""

    @property
    def closeness(self) -> _Array | None:
        """``[S]``, or ``[1]``: each row's weights divided by what its checkpoints deviate; ``None``: nobody knows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``[d]`` or ``[S, d]``, of the free vector."""

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[d]`` → ``[K]``, sum to one within 1e-12."""

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[d]``."""

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:
        """The chain rule at ``free``: a gradient in the coefficients ``[K]`` → the one in the free vector ``[d]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class AffineSpace:
    """All coefficients that sum to one: an origin plus an orthonormal basis of the sum-zero directions, d = K - 1.

    The basis is the first K - 1 columns of the Householder reflection of the last axis onto the negative diagonal.
    It is orthonormal, so a step has the same length in both spaces. Free coordinate i moves coefficient i and hardly
    any other; optimizers that work coordinate by coordinate need this. Both maps cost O(K) and no BLAS.
    """

    steps: tuple[int, ...]
    origin: Coefficients
    closeness: _Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[K - 1]`` or ``[S, K - 1]``."""
        return (*self.origin.shape[:-1], len(self.steps) - 1)

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[K - 1]`` → ``[K]``."""
        last = np.zeros((*free.shape[:-1], 1))
        coefficients = self.origin + _reflect(np.concatenate([free, last], axis=-1))
        coefficients[np.abs(coefficients) < _ROUNDING] = 0.0  # so one checkpoint alone comes back as that
        return close_sum(coefficients)

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[K - 1]``."""
        return _reflect(np.asarray(coefficients, dtype=np.float64) - self.origin)[..., :-1]

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:  # noqa: ARG002 - the map is linear
        """``[K]`` → ``[K - 1]``, the same everywhere: the basis transposed."""
        return _reflect(gradient)[..., :-1]


def _reflect(vectors: _Array) -> _Array:
    """``[..., K]`` → ``[..., K]``: the Householder reflection I - 2 v v^T, v along diagonal + last axis.

    It swaps the last axis and the negative diagonal of unit length, and is its own inverse.
    """
    count = vectors.shape[-1]
    shift = 1 / math.sqrt(count)
    normal = np.full(count, shift)
    normal[-1] += 1.0  # 2 v v^T = normal normal^T / (1 + shift)
    scale = np.sum(normal * vectors, axis=-1, keepdims=True) / (1 + shift)  # 2 / |normal|^2 = 1 / (1 + shift)
    return np.asarray(vectors - scale * normal)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvexSpace:
    """The convex hull of the checkpoints (Liu et al. 2024, Table 14): clip to non-negative, divide by the sum; d = K.

    Where clipping leaves (nearly) nothing, the free vector stands for the origin.
    """

    steps: tuple[int, ...]
    origin: Coefficients
    closeness: _Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[K]`` or ``[S, K]``."""
        return self.origin.shape

    def to_coefficients(self, free: _Array) -> Coefficients:
        """``[K]`` → ``[K]``, non-negative."""
        clipped = np.maximum(self.origin + free, 0.0)
        empty = _sums(clipped) < NEAR_ZERO  # [1], or [S, 1]
        return normalize(np.where(empty, self.origin, clipped))

    def to_free(self, coefficients: Coefficients) -> _Array:
        """``[K]`` → ``[K]``; negative coefficients come back clipped."""
        return np.asarray(coefficients, dtype=np.float64) - self.origin

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:
        """``[K]`` → ``[K]``; zero where clipping hides a change.

        A coefficient that is exactly zero can only grow. Its derivative counts only where the loss falls as it grows.
        """
        moved = self.origin + free
        clipped = np.maximum(moved, 0.0)
        total = _sums(clipped)
        counts = total >= NEAR_ZERO  # else the coefficients are the origin's, whatever is changed
        total = np.where(counts, total, 1.0)  # no division by zero
        slope = (gradient - _sums(gradient * clipped) / total) / total  # of clipped / total, by the quotient rule
        free_to_move = (moved > 0) | ((moved == 0) & (slope < 0))
        return np.where(counts & free_to_move, slope, 0.0)


def _sums(rows: _Array) -> _Array:
    """``[..., K]`` → ``[..., 1]``, correctly rounded."""
    return exact_sums(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-1], 1)
