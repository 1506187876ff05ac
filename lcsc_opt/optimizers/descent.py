"""Shared by searches along a gradient, in coefficients or in all weights: averaging, and the kept metric's weight."""

from __future__ import annotations

import math

from lcsc_opt.base.records import Evaluation

AVERAGING = 3  # the exponent of the average; its mean age is a fifth of the steps
FIRST_KEEP_WEIGHT = 0.1  # of the metric that is kept, in units of the loss
KEEP_RATE, MOST_VIOLATION = 0.05, 3.0  # of its dual ascent: rate per standard error, most standard errors
NOISE_STRIDE = 2**20  # seeds of one search's noise; below 2^31 times this they are exact in JSON


def averaging_share(step: int) -> float:
    """The share that the iterate of a step gets in the average; 1 for step 1.

    Polynomial-decay averaging (Shamir and Zhang 2013) needs no number of steps beforehand.
    """
    return (AVERAGING + 1) / (step + AVERAGING)


class DualAscent:
    """The weight of a kept metric. It grows when the metric was above its value at EMA*, and falls when it was below.

    Args:
        weight: the first one.
    """

    def __init__(self, weight: float = FIRST_KEEP_WEIGHT) -> None:
        self.weight = weight

    def hear(self, evaluation: Evaluation | None) -> None:
        """Adjust the weight after an evaluation; without a kept metric nothing changes."""
        if evaluation is not None and evaluation.violation is not None:
            violation = min(max(evaluation.violation, -MOST_VIOLATION), MOST_VIOLATION)
            self.weight *= math.exp(KEEP_RATE * violation)
