"""``keep``: a metric that a search may not make worse than at EMA*, the best of the window's EMA rates.

FID falls while single images get worse. ``keep: precision`` bounds ``hinge`` by its value at EMA*: on average, samples
may lie as far outside the real images as EMA*'s samples do. Optimizers that follow gradients choose its weight
themselves, for example by dual ascent. All others get the loss with a penalty for the violation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import EACH
from lcsc_opt.metrics.names import MetricName

PENALTY = 10.0  # times the loss at EMA*, for a value that is twice the bound
SLACK = 1.0  # standard errors beyond EMA*'s value that cost nothing
SURROGATES = {"precision": "hinge"}  # a metric without a gradient → the one that is kept in its place


def kept_metric(text: str, loss: Mapping[MetricName, float]) -> MetricName:
    """The metric of ``keep: TEXT``, in the features of the loss's first metric if the text names no others.

    Raises:
        MetricError: it cannot be kept.
    """
    formula, at, extractor = text.partition("@")
    metric = SURROGATES.get(formula, formula)
    if metric not in EACH:
        known = ", ".join([*SURROGATES, *EACH])
        raise MetricError(f"keep: {text!r} cannot be kept; known: {known}, each with @extractor or not")
    return MetricName.parse(f"{metric}@{extractor if at else next(iter(loss)).extractor}")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The bound of the kept metric, measured at EMA* on the noise of the search.

    Attributes:
        loss: EMA*'s loss.
        value: EMA*'s value of the kept metric.
        deviation: the standard deviation of the kept metric between images.
    """

    loss: float
    value: float
    deviation: float

    @property
    def scale(self) -> float:
        """The loss at EMA* divided by the kept metric there: the factor between their units."""
        return abs(self.loss) / (self.value or 1.0)

    def violation(self, value: float, images: int) -> float:
        """How many standard errors, for this many images, ``value`` lies above the value at EMA*."""
        error = self.deviation / math.sqrt(images)
        return (value - self.value) / error if error > 0 else float(value > self.value)

    def penalty(self, value: float, images: int) -> float:
        """The number that is added to the loss of this many images."""
        slack = SLACK * (self.deviation / math.sqrt(images))
        return PENALTY * self.scale * max(0.0, value - self.value - slack)

    def penalty_slope(self, value: float, images: int) -> float:
        """The derivative of :meth:`penalty` in ``value``."""
        return PENALTY * self.scale if self.penalty(value, images) > 0 else 0.0
