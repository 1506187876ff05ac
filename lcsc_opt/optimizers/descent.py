"""What following a gradient takes, in coefficients as in all weights: an average of the iterates, and what is kept."""

from __future__ import annotations

import math

from lcsc_opt.base.records import Evaluation

AVERAGING = 3  # the exponent of the average; its mean age is a fifth of the steps
FIRST_KEEP_WEIGHT = 0.1  # of the metric that is kept, in units of the loss
KEEP_RATE, MOST_EXCESS = 0.05, 3.0  # of its dual ascent, per standard error, of which so many count
NOISE_STRIDE = 2**20  # seeds of one search's noise; below 2^31 times this they are exact in JSON


def averaging_share(step: int) -> float:
    """How much of the average the iterate of a step becomes; the first one, of step 1, is all of it.

    Polynomial-decay averaging (Shamir and Zhang 2013) needs no number of steps beforehand.
    """
    return (AVERAGING + 1) / (step + AVERAGING)


class DualAscent:
    """The weight of a metric that is kept: more where it was above its value at EMA*, less where it was below.

    Args:
        weight: at first.
    """

    def __init__(self, weight: float = FIRST_KEEP_WEIGHT) -> None:
        self.weight = weight

    def hear(self, evaluation: Evaluation | None) -> None:
        """Weigh anew after an evaluation; one that keeps nothing changes nothing."""
        if evaluation is not None and evaluation.excess is not None:
            excess = min(max(evaluation.excess, -MOST_EXCESS), MOST_EXCESS)
            self.weight *= math.exp(KEEP_RATE * excess)
