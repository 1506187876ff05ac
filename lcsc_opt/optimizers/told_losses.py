"""The losses that an optimizer is told: in units of the first one, so that no unit of a loss matters.

Nevergrad clips losses of 5e20 and more, and pycma stops where losses differ by less than 1e-11. The unit is a power of
two: dividing by it rounds nothing, so an optimizer that only compares losses asks the same as without it.
"""

from __future__ import annotations

import dataclasses
import math

from lcsc_opt.base.records import Evaluation

FIRST_FAILURE_LOSS = 1e6  # told for a failure when nothing has succeeded yet, in units of the first loss
LARGEST_LOSS = 1e20  # in units of the first loss; Nevergrad clips above 5e20, with a warning


class ToldLosses:
    """What one optimizer is told, in the order in which it is told.

    A search that continues tells the stored evaluations again in that order, and so finds the same unit.
    """

    def __init__(self) -> None:
        self._unit: float | None = None
        self._worst: float | None = None

    def of_success(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with its losses and gradient in units of the first loss that is not zero."""
        if self._unit is None and evaluation.loss != 0:
            _, exponent = math.frexp(evaluation.loss)
            self._unit = math.ldexp(1.0, exponent - 1)  # the largest power of two that is not above the absolute loss
        unit = 1.0 if self._unit is None else self._unit
        loss = max(min(evaluation.loss / unit, LARGEST_LOSS), -LARGEST_LOSS)
        if self._worst is None or loss > self._worst:
            self._worst = loss
        gradient = evaluation.gradient
        if gradient is not None:
            gradient = gradient / unit
        without_groups = dict(evaluation.without_groups)
        if "loss" in without_groups:
            without_groups["loss"] = [value / unit for value in without_groups["loss"]]
        return dataclasses.replace(evaluation, loss=loss, gradient=gradient, without_groups=without_groups)

    @property
    def of_failure(self) -> float:
        """The worst loss that was told so far, so that the optimizer avoids the surroundings of what failed."""
        if self._worst is None:
            return FIRST_FAILURE_LOSS
        return self._worst
