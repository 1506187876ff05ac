"""Distances corrected for the bias of few samples: what a gradient step follows.

The Fréchet distance of N samples is biased by about c / N, and c depends on the model (Bińkowski et al. 2018,
Appendix D; Chong and Forsyth 2020): it is lower for samples that vary less, so steps of a hundred images drift towards
grey. ``2 d(all) − ½ (d(one half) + d(other half))`` has no term in 1 / N. Where N is below the effective dimension of
the features the bias falls more slowly than 1 / N, and about half of it is left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FEWEST = 4  # samples; a half of fewer has no covariance
SEED = 2020  # fixed, so that an evaluation that is repeated has the same halves

Rows = npt.NDArray[np.intp]


def weighted_subsets(count: int) -> list[tuple[float, Rows]]:
    """(weight, indices) of subsets of ``count`` samples: the weighted sum of their distances is the corrected one.

    The halves are drawn at random: samples of an objective may be sorted by prompt. Their weights are in proportion to
    their sizes, so that the term in 1 / N cancels for odd counts, too. Of fewer than four samples, the only subset is
    all of them, and nothing is corrected.
    """
    everything = np.arange(count)
    if count < FEWEST:
        return [(1.0, everything)]
    order = np.random.RandomState(SEED).permutation(count)
    halves = np.array_split(order, 2)
    return [(2.0, everything), *((-len(half) / count, half) for half in halves)]
