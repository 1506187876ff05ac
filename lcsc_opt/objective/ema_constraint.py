"""The bound of a kept metric, measured at EMA*."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lcsc_opt.base.records import Candidate
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.metrics import MetricSuite
from lcsc_opt.metrics.loss import Constraint

FEWEST_KEPT = 5_000  # images for EMA*'s precision: a standard error of at most 0.007


def measure_constraint(
    scores: MetricSuite, steps: Sequence[int], images: int, measure: Callable[[Candidate], Constraint]
) -> Constraint | None:
    """Measure EMA*, the best of the window's EMA rates, as the bound of the kept metric.

    If EMA*'s precision is the bound, it is measured on at least :data:`FEWEST_KEPT` images.

    Args:
        scores: the kept metric, and the user's bound if there is one.
        steps: ``[K]`` training steps.
        images: of an evaluation of a search.
        measure: evaluates a candidate on the noise of the search.

    Returns:
        The constraint; ``None`` if no metric is kept.
    """
    if scores.keep is None:
        return None
    rates = window_ema_rates(steps)
    constraints = [measure(Candidate(ema_coefficients(steps, rate), images=images)) for rate in rates]
    best = min(range(len(rates)), key=lambda index: constraints[index].loss)
    constraint = constraints[best]
    if scores.bound is not None:
        return dataclasses.replace(constraint, value=scores.bound)
    if scores.keep.formula == "precision" and images < FEWEST_KEPT:
        candidate = Candidate(ema_coefficients(steps, rates[best]), images=FEWEST_KEPT)
        return dataclasses.replace(measure(candidate), loss=constraint.loss)
    return constraint
