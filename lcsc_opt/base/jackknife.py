"""The delete-group jackknife: the standard error of any statistic from its values without one of ten groups each.

With G groups and θ₋g the statistic without group g, ``SE² = (G − 1) / G Σ (θ₋g − mean θ₋)²`` (Kott 2001; Efron &
Tibshirani 1993, Eq. 11.5, for groups of one), and the interval is ``θ ± t · SE`` with G − 1 degrees of freedom.
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
    """The standard error of a statistic, from its ``[G]`` values without one of the groups each."""
    values = np.asarray(without, dtype=np.float64)
    squares = np.square(values - values.mean()).sum()
    return math.sqrt((len(values) - 1) / len(values) * squares)


def half_width(error: float, degrees: float) -> float:
    """Half the 95 % interval of a value with this standard error; a normal one for infinite degrees of freedom."""
    from scipy.special import ndtri, stdtrit  # SciPy is slow to import

    quantile = (1 + LEVEL) / 2
    if math.isinf(degrees):
        return error * float(ndtri(quantile))
    return error * float(stdtrit(degrees, quantile))
