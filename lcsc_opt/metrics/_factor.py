"""A covariance as a product ``R Rᵀ``, and products with R that leave out its zeros.

BLAS has such products, but scipy's wrappers of it keep Python's lock, so that nothing could be sampled meanwhile; numpy
releases it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lcsc_opt.metrics._arrays import Array

BLOCK = 256  # columns at once: as fast as LAPACK's own, which does the same


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """``R`` with ``R Rᵀ`` the covariance.

    Attributes:
        matrix: ``[D, r]``.
        triangular: whether it is lower triangular, with r = D.
    """

    matrix: Array
    triangular: bool

    @classmethod
    def of(cls, covariance: Array, *, rounding: float) -> Factor:
        """By Cholesky, or by eigenvectors if ``covariance`` is singular.

        Args:
            covariance: ``[D, D]``, symmetric and positive semidefinite.
            rounding: eigenvalues up to this times the largest one are zero.
        """
        try:
            return cls(np.linalg.cholesky(covariance).astype(np.float64, copy=False), triangular=True)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(covariance)
            kept = values > rounding * values[-1]
            return cls(vectors[:, kept] * np.sqrt(values[kept]), triangular=False)

    def between(self, scatter: Array) -> Array:
        """``Rᵀ S R`` [r, r] of a symmetric S [D, D]; above the diagonal it may be anything finite."""
        half = self.after(scatter)
        if not self.triangular:
            return self.matrix.T @ half
        product = np.zeros_like(half)
        for start in range(0, len(half), BLOCK):
            stop = start + BLOCK
            np.matmul(self.matrix[start:, start:stop].T, half[start:, :stop], out=product[start:stop, :stop])
        return product

    def after(self, rows: Array) -> Array:
        """``X R`` [N, r] of X [N, D]."""
        if not self.triangular:
            return rows @ self.matrix
        product = np.empty_like(rows)
        for start in range(0, rows.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            np.matmul(rows[:, start:], self.matrix[start:, columns], out=product[:, columns])
        return product
