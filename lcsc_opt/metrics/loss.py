"""The loss of a search: a weighted sum of metrics, and a metric that must not get worse while the sum falls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lcsc_opt.metrics.names import Kept, MetricName

PENALTY = 10.0  # times the loss at EMA*, for a value that is twice the bound


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The bound of the kept metric, and what is measured at EMA* on the noise of the search.

    Attributes:
        loss: EMA*'s loss.
        value: the bound: EMA*'s value of the kept metric, or the one of the settings.
        deviation: the standard deviation of the kept metric between images.
        guide: EMA*'s value of the metric whose gradient is followed.
        sign: −1 if higher values of the kept metric are better, else 1.
    """

    loss: float
    value: float
    deviation: float
    guide: float
    sign: float = 1.0

    @property
    def scale(self) -> float:
        """The loss at EMA* divided by the guide there: the factor between their units."""
        return abs(self.loss) / (self.guide or 1.0)

    def violation(self, value: float, images: int) -> float:
        """By how many standard errors, for this many images, ``value`` is worse than the bound."""
        excess = self.sign * (value - self.value)
        standard_error = self.deviation / math.sqrt(images)
        if standard_error > 0:
            return excess / standard_error
        return float(excess > 0)

    def penalty(self, value: float) -> float:
        """What is added to the loss."""
        return PENALTY * abs(self.loss) / (self.value or 1.0) * max(0.0, self.sign * (value - self.value))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a search minimizes.

    Attributes:
        weights: metric → its weight in the sum, from which metrics are subtracted where higher is better.
        keep: the metric that must not get worse than its bound.
        bound: the bound of the settings; ``None`` for EMA*'s value.
    """

    weights: Mapping[MetricName, float]
    keep: MetricName | None = None
    bound: float | None = None

    @classmethod
    def parse(cls, loss: str | Mapping[str, float], keep: Kept | None = None) -> Loss:
        """The loss of settings.

        Args:
            loss: a metric, or metric → weight.
            keep: a metric, or metric → bound.

        Raises:
            MetricError: a metric is unknown, or cannot be in a loss or be kept.
        """
        weights = MetricName.parse_loss(loss)
        if keep is None:
            return cls(weights)
        bound = None
        if isinstance(keep, Mapping):
            bound = next(iter(keep.values()))
        return cls(weights, MetricName.parse_kept(keep, weights), bound)

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """The metrics of the sum, then the kept one and its guide."""
        metrics = list(self.weights)
        if self.keep is not None:
            metrics += [self.keep, self.keep.guide]
        return tuple(dict.fromkeys(metrics))

    @property
    def extractors(self) -> tuple[str, ...]:
        """The names of the extractors whose features the loss is made of."""
        return tuple(dict.fromkeys(metric.extractor for metric in self.metrics))

    def value(self, values: Mapping[MetricName, float], constraint: Constraint | None) -> float:
        """The loss of these values of its metrics; without a constraint, nothing is bounded."""
        penalty = 0.0
        if self.keep is not None and constraint is not None:
            penalty = constraint.penalty(values[self.keep])
        return sum(weight * metric.sign * values[metric] for metric, weight in self.weights.items()) + penalty
