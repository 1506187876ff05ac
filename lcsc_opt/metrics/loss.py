"""The loss of a search: a weighted sum of metrics, and a metric that must not get worse while the sum falls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import Constraint
from lcsc_opt.metrics.names import (
    DIFFERENTIABLE,
    DISTANCES,
    HELD_OUT_REWARD,
    INCEPTION,
    KEPT,
    OF_HELD_OUT,
    OF_REPORTS,
    REWARD,
    Kept,
    MetricName,
)


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
        weights = parse_loss(loss)
        if keep is None:
            return cls(weights)
        bound = None
        if isinstance(keep, Mapping):
            bound = next(iter(keep.values()))
        return cls(weights, parse_kept(keep, weights), bound)

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


def parse_loss(loss: str | Mapping[str, float], *, unguarded: bool = True) -> dict[MetricName, float]:
    """One metric with the weight 1, or the metrics of a weighted sum.

    Metrics where higher is better are subtracted, whether their weight is written with its minus or without. A
    reward alone collapses diversity; ``unguarded`` allows it without a distance between distributions.

    Raises:
        MetricError: for an unknown or repeated metric, one of held-out images, a weight that is no number, or a
            reward without a guard.
    """
    if isinstance(loss, str):
        loss = {loss: 1.0}
    weights: dict[MetricName, float] = {}
    for text, weight in loss.items():
        metric = MetricName.parse(text)
        if metric.formula in OF_HELD_OUT or metric.formula == HELD_OUT_REWARD:
            raise MetricError(f"loss: {metric} is held out, and decides nothing; move it to held_out_metrics")
        if metric.formula in OF_REPORTS:
            raise MetricError(f"loss: {metric} is for reports only; search with fid, and name it in held_out_metrics")
        if metric in weights:
            raise MetricError(f"loss: {metric} is named twice")
        weights[metric] = abs(_checked_weight(metric, weight))
    weights = {metric: weight for metric, weight in weights.items() if weight}  # a sweep may begin at zero
    if not weights:
        raise MetricError("loss: names no metric; the default is fid")
    formulas = {metric.formula for metric in weights}
    if REWARD in formulas and not unguarded and formulas.isdisjoint(DISTANCES):
        raise MetricError(
            "loss: a reward alone collapses diversity; add a distance between distributions, as loss: "
            "{reward: -1, fid: 1}, or write unguarded: true"
        )
    # The first metric's features order image pairs; a reward has none of images, so it comes last.
    return dict(sorted(weights.items(), key=lambda pair: pair[0].formula == REWARD))


def _checked_weight(metric: MetricName, weight: object) -> float:
    """The weight of a metric in a loss. Raises MetricError if it is no finite number, or has the wrong sign."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < math.inf:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}, expected a number")
    if weight < 0 < metric.sign:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}; lower is better, so expected a positive one")
    return float(weight)


def parse_kept(keep: Kept, loss: Mapping[MetricName, float]) -> MetricName:
    """The metric that may not get worse than at EMA*, the best of the window's EMA rates, or than its bound.

    FID falls while single images get worse. Optimizers that follow gradients add that of its guide
    (:attr:`MetricName.guide`), with a weight that they choose themselves, for example by dual ascent. All others get
    the loss with a penalty for the violation. Without ``@extractor``, its features are those of the loss's first
    metric.

    Raises:
        MetricError: it cannot be kept.
    """
    bounds = {keep: 1.0} if isinstance(keep, str) else keep
    text = ""
    bound = 0.0
    if len(bounds) == 1:
        [(text, bound)] = bounds.items()
    formula, at, extractor = text.partition("@")
    largest = 1.0 if formula == "precision" else math.inf
    if formula not in KEPT or not 0 < bound <= largest or bound == math.inf:
        names = ", ".join(KEPT)
        raise MetricError(
            f"keep: {keep!r} cannot be kept; known: {names}, each optionally with @extractor; or a bound, as "
            "{precision: 0.7}"
        )
    if not at:
        extractor = next(iter(loss)).extractor
        if extractor == REWARD:
            extractor = INCEPTION
    return MetricName.parse(f"{formula}@{extractor}")


def why_no_gradient(loss: Iterable[MetricName]) -> str | None:
    """Why a sum of these metrics has no gradient in the features, as one clause; ``None`` if it has one."""
    for metric in loss:
        if not metric.is_differentiable:
            return f"{metric} in the loss has no gradient, only {', '.join(DIFFERENTIABLE)} have one"
    return None
