"""The delete-group jackknife: the standard error of any statistic from its values without one of ten groups each.

With G groups and θ₋g the statistic without group g, ``SE² = (G − 1) / G Σ (θ₋g − mean θ₋)²`` (Kott 2001; Efron &
Tibshirani 1993, Eq. 11.5, for groups of one), and the interval is ``θ ± t · SE`` with G − 1 degrees of freedom.
A distance depends on two samples, the generated images and the real ones: it has ten values without groups of the
first, then ten without groups of the second, and its error is the root of the sum of both squares.
A bootstrap would repeat images, and a repeated image is its own nearest neighbour: precision, recall and every other
metric of neighbours would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GROUPS = 10
FEWEST_IN_A_GROUP = 10  # images; with fewer, there is no interval
LEVEL = 0.95
_SEED = 2026


def group_of_each(images: int) -> npt.NDArray[np.int64]:
    """``[N]``: the group of each image; the same for every model, so that differences of models have errors, too.

    It is random, since images may be ordered by class or prompt. Sizes differ by at most one.
    """
    return np.random.RandomState(_SEED).permutation(images) % GROUPS


def standard_error(without: Sequence[float]) -> float:
    """The standard error of a statistic, from its values without one of the groups each.

    Args:
        without: ``[G]`` of one sample; or ``[2 G]`` of two samples that are independent, one after the other.
    """
    by_sample = np.asarray(without, dtype=np.float64).reshape(-1, GROUPS)
    deviations = by_sample - by_sample.mean(axis=1, keepdims=True)
    return math.sqrt((GROUPS - 1) / GROUPS * float(np.square(deviations).sum()))


def error_of_mean(columns: Sequence[Sequence[float]]) -> float:
    """The standard error of a mean over groups of noise.

    Samples differ between groups of noise, so their error shrinks with the number of these. The real images are the
    same, and their error does not.

    Args:
        columns: for each group of noise, what :func:`standard_error` takes, ``[G]`` or ``[2 G]``.
    """
    of_samples = math.hypot(*(standard_error(column[:GROUPS]) for column in columns)) / len(columns)
    of_real = [column[GROUPS:] for column in columns if len(column) > GROUPS]
    if not of_real:
        return of_samples
    return math.hypot(of_samples, standard_error(np.mean(of_real, axis=0).tolist()))


def half_width(error: float, degrees: float) -> float:
    """Half the width of the 95 % interval of a value.

    Args:
        error: its standard error.
        degrees: of freedom; infinitely many where the error itself is known, as of a normal distribution.
    """
    from scipy.special import ndtri, stdtrit  # SciPy is slow to import

    quantile = (1 + LEVEL) / 2
    if math.isinf(degrees):
        return error * float(ndtri(quantile))
    return error * float(stdtrit(degrees, quantile))
