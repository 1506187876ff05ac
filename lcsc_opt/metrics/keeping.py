"""A metric that a search may not make worse than EMA* has it, the best of the window's EMA rates.

FID falls while single images get worse. ``keep: precision`` bounds ``hinge`` by its value at EMA*: samples may lie as
far outside of the real images as that one's, on average. Whoever follows gradients weighs it as it likes, by
dual ascent say; whoever asks for a loss gets it with a penalty for what is beyond the bound.
"""

from __future__ import annotations

import dataclasses
import math

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.fidelity import EACH
from lcsc_opt.metrics.names import MetricName

PENALTY = 10.0  # times the loss at EMA*, for a value that is twice the bound
SLACK = 1.0  # standard errors beyond EMA*'s value that cost nothing
SURROGATES = {"precision": "hinge"}  # what is kept in place of a metric that has no gradient


def kept_metric(text: str) -> MetricName:
    """The metric of ``keep: TEXT``. Raises MetricError for one that cannot be kept."""
    formula, at, extractor = text.partition("@")
    known = ", ".join([*SURROGATES, *EACH])
    metric_text = SURROGATES.get(formula, formula)
    if metric_text not in EACH:
        raise MetricError(f"keep: {text!r} cannot be kept; known: {known}, each with @extractor or not")
    return MetricName.parse(metric_text + at + extractor)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """EMA*, on the noise of the search.

    Attributes:
        loss: there.
        value: of the kept metric.
        deviation: of that between images.
    """

    loss: float
    value: float
    deviation: float

    @property
    def scale(self) -> float:
        """The loss at EMA* over the value there: it gives both one unit."""
        return abs(self.loss) / (self.value or 1.0)

    def standard_error(self, images: int) -> float:
        """Of the kept metric, for so many images."""
        return self.deviation / math.sqrt(images)

    def excess(self, value: float, images: int) -> float:
        """How many standard errors of so many images ``value`` lies above EMA*'s."""
        error = self.standard_error(images)
        return (value - self.value) / error if error > 0 else float(value > self.value)

    def penalty(self, value: float, images: int) -> float:
        """What is added to the loss of so many images."""
        return PENALTY * self.scale * max(0.0, value - self.value - SLACK * self.standard_error(images))

    def penalty_slope(self, value: float, images: int) -> float:
        """The derivative of :meth:`penalty` in ``value``."""
        return PENALTY * self.scale if self.penalty(value, images) > 0 else 0.0
