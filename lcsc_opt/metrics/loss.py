"""The loss of a search: a weighted sum of metrics, and a metric that must not get worse while the sum falls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lcsc_opt.base.records import Constraint
from lcsc_opt.metrics.names import Kept, MetricName


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
