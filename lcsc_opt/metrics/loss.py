"""The loss of a search: a weighted sum of metrics, and a metric that must not get worse while the sum falls.

The default, ``fdr``, looks at images three times: it is the mean, over representations, of the distance to real images
divided by that of one fixed average of the checkpoints. The first is the network of the metric, which sees images
clipped as they are saved; the others are the pixels as the model gives them, and the distributions of their values and
differences. A model that learned only what one of them overlooks gains little.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import STANDARD_ERROR, Yardstick
from lcsc_opt.metrics.names import (
    DIFFERENTIABLE,
    DISTANCES,
    FDR,
    FID_HELD_OUT,
    HELD_OUT_REWARD,
    INCEPTION,
    KEPT,
    OF_LOSS_FEATURES,
    PLAIN,
    REWARD,
    TO_SHRUNK,
    WITHOUT_NETWORK,
    Kept,
    MetricName,
)

LEAST_UNIT = 1e-8  # of the largest unit of fdr; a unit is what the yardstick measured, and divides a metric

_BOUNDS = {"precision": (0.0, 1.0), REWARD: (-math.inf, sys.float_info.max)}
"""A kept metric → what its bound is above, and at most; of others any positive number is one."""

LossSetting = str | Mapping[str, float | Sequence[str]]
"""A metric or ``fdr``, these → their weights in a sum, or ``{fdr: [representations]}``."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The bound of the kept metric.

    Attributes:
        guide: the yardstick's value of the metric whose gradient is followed.
        yardstick: has the bound itself, its own loss, and the standard deviation of the kept metric between images.
    """

    guide: float
    yardstick: Yardstick

    @property
    def scale(self) -> float:
        """The loss of the yardstick divided by its guide: the factor between their units, for weights in a gradient.

        A loss may be negative, where higher metrics are better. A guide that is zero cannot get better, as ``hinge``
        where all samples are precise; then it is the loss itself.
        """
        return abs(self.yardstick.loss) / (abs(self.guide) or 1.0)

    def violation(self, value: float, images: int) -> float:
        """By how many standard errors, for this many images, ``value`` is worse than the bound; negative if better.

        Where images do not differ, and so there is no error, it is 1 for any value that is worse, else 0.
        """
        excess = self.yardstick.excess(value)
        standard_error = self.yardstick.deviation / math.sqrt(images)
        if standard_error > 0:
            return excess / standard_error
        return float(excess > 0)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a search minimizes.

    Attributes:
        weights: metric → its weight in the sum, from which metrics are subtracted where higher is better.
        keep: the metric that must not get worse than its bound.
        bound: the bound of the settings; ``None`` for the yardstick's value.
        of_fdr: those of the metrics that ``fdr`` is made of; empty if it is no part of the loss.
        constraint: what bounds the kept metric; ``None`` until the loss is :meth:`relative_to` a yardstick.
    """

    weights: Mapping[MetricName, float]
    keep: MetricName | None = None
    bound: float | None = None
    of_fdr: tuple[MetricName, ...] = ()
    constraint: Constraint | None = None

    @classmethod
    def parse(cls, loss: LossSetting, keep: Kept | None = None) -> Loss:
        """The loss of settings.

        Args:
            loss: a metric or ``fdr``, these → their weights in a sum, or ``{fdr: [representations]}``.
            keep: a metric, or metric → bound.

        Raises:
            MetricError: a metric is unknown, or cannot be in a loss or be kept.
        """
        terms: dict[str, float | Sequence[str]] = {loss: 1.0} if isinstance(loss, str) else dict(loss)
        fdr = [name for name in terms if name.partition("@")[0] == FDR]
        if len(fdr) > 1:
            raise MetricError(
                f"loss: names fdr twice; with several networks it is {{{FDR}: [inception, clip, pixels]}}"
            )
        weights: dict[MetricName, float] = {}
        if fdr:
            setting = terms.pop(fdr[0])
            weights = _weights_of_fdr(fdr[0], setting, is_alone=not terms)
        of_fdr = tuple(weights)
        weights = _with_terms(weights, terms)
        # The first metric should have a network's features: these order image pairs, and metrics of single images
        # without @extractor are in them. The sort is stable.
        networks_first = sorted(weights.items(), key=lambda pair: pair[0].has_own_features)
        parsed = cls(dict(networks_first), of_fdr=of_fdr)
        if keep is None:
            return parsed
        return parsed._keeping(keep)

    def _keeping(self, keep: Kept) -> Loss:
        """The same loss, while a metric may not get worse than at the yardstick, or than its bound.

        FID falls while single images get worse. Optimizers that follow gradients add that of its guide
        (:attr:`MetricName.guide`), with a weight that they choose themselves, for example by dual ascent. All others
        get the loss with a penalty for the violation.
        """
        bounds: Mapping[str, float | None] = {keep: None} if isinstance(keep, str) else keep
        name = next(iter(bounds), "")  # an empty mapping is refused below, as one of several metrics is
        bound = bounds.get(name)
        formula = name.partition("@")[0]
        lowest, highest = _BOUNDS.get(formula, (0.0, sys.float_info.max))
        is_in_range = bound is None or lowest < bound <= highest
        if len(bounds) != 1 or formula not in KEPT or not is_in_range:
            raise MetricError(
                f"keep: {keep!r} cannot be kept; known: {', '.join(KEPT)}, each optionally with @extractor; or a "
                "bound, as {precision: 0.7}"
            )
        [metric] = self.parse_beside([name])
        return dataclasses.replace(self, keep=metric, bound=bound)

    def parse_beside(self, names: Iterable[str]) -> list[MetricName]:
        """Further metrics by name; those in ``OF_LOSS_FEATURES`` without ``@extractor`` have the features of the loss.

        Raises:
            MetricError: one is unknown.
        """
        first = next(iter(self.weights))
        extractor = INCEPTION if first.has_own_features else first.extractor
        return [MetricName.parse(f"{name}@{extractor}" if name in OF_LOSS_FEATURES else name) for name in names]

    def yardstick(self, measured: Mapping[str, float], images: int) -> Yardstick:
        """The yardstick of a loss that is relative to one, or keeps a metric.

        Args:
            measured: metric → its value for the fixed average; of a kept metric also its standard error.
            images: of how many images.

        Raises:
            MetricError: ``fdr`` would divide by a value that is zero, or nothing beside the others: its metric would be
                all of the loss.
        """
        metrics = {str(metric): measured[str(metric)] for metric in self.metrics}
        if self.has_units:
            _check_units({str(metric): metrics[str(metric)] for metric in self.of_fdr})
            _check_not_zero({str(metric): metrics[str(metric)] for metric in self.weights})
        of_shrunk = self.shrunk({metric.extractor for metric in self.weights}).weights
        shrunk = {metric.extractor: str(metric) for metric in of_shrunk if str(metric) in measured}
        metrics |= {name: measured[name] for name in shrunk.values()}
        if self.keep is None:
            return Yardstick(metrics)
        plain = dataclasses.replace(self.shrunk(shrunk), keep=None).relative_to(Yardstick(metrics))
        return Yardstick(
            metrics,
            kept=str(self.keep),
            sign=self.keep.sign,
            bound=metrics[str(self.keep)] if self.bound is None else self.bound,
            deviation=measured[f"{self.keep}{STANDARD_ERROR}"] * math.sqrt(images),
            loss=plain.value({metric: metrics[str(metric)] for metric in plain.weights}),
        )

    def shrunk(self, extractors: Collection[str]) -> Loss:
        """The loss whose distances in the features of these extractors are those to shrunk targets."""
        weights = {
            dataclasses.replace(metric, formula=TO_SHRUNK[metric.formula])
            if metric.formula in TO_SHRUNK and metric.extractor in extractors
            else metric: weight
            for metric, weight in self.weights.items()
        }
        return dataclasses.replace(self, weights=weights)

    def relative_to(self, yardstick: Yardstick) -> Loss:
        """The loss in the units of a yardstick, and with its bound."""
        weights = dict(self.weights)
        if self.has_units:  # a reward may be negative
            weights = {metric: weight / abs(yardstick.metrics[str(metric)]) for metric, weight in weights.items()}
        loss = dataclasses.replace(self, weights=weights)
        if self.keep is None:
            return loss
        constraint = Constraint(yardstick.metrics[str(self.keep.guide)], yardstick)
        return dataclasses.replace(loss, constraint=constraint)

    def describe(self) -> dict[str, Any]:
        """The weights, for the key of a study; those of ``fdr`` together, by their extractors."""
        described: dict[str, Any] = {}
        if self.of_fdr:
            described[FDR] = {metric.extractor: self.weights[metric] for metric in self.of_fdr}
        others = {str(metric): weight for metric, weight in self.weights.items() if metric not in self.of_fdr}
        return described | others

    @property
    def has_units(self) -> bool:
        """Whether each metric is divided by the yardstick's value of it: of ``fdr``, and of every sum of several.

        So weights say how much a share of one metric counts against the same share of another.
        """
        return bool(self.of_fdr) or len(self.weights) > 1

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

    def value(self, values: Mapping[MetricName, float]) -> float:
        """The loss of these values of its metrics."""
        penalty = 0.0
        if self.keep is not None and self.constraint is not None:
            penalty = self.constraint.yardstick.penalty(values[self.keep])
        return sum(weight * metric.sign * values[metric] for metric, weight in self.weights.items()) + penalty


def _check_units(units: Mapping[str, float]) -> None:
    """Refuse units of ``fdr`` that are zero, or nothing beside the others."""
    for metric, unit in units.items():
        if not unit > LEAST_UNIT * max(units.values()):  # so NaN is refused, too
            raise MetricError(
                f"loss: fdr divides {metric} by that of an average of the checkpoints, which is {unit:.3g}: it is "
                "at no distance from the real images. Name the other representations, as {fdr: [inception, pixels]}"
            )


def _check_not_zero(units: Mapping[str, float]) -> None:
    """Refuse units of a sum that are zero, or no numbers."""
    for metric, unit in units.items():
        if not abs(unit) > 0:  # so NaN is refused, too
            raise MetricError(
                f"loss: each metric of a sum is divided by that of an average of the checkpoints, and {metric} is "
                f"{unit:.3g} there; leave it out of the loss, or let a reward of yours have another zero"
            )


def _weights_of_fdr(name: str, setting: object, *, is_alone: bool) -> dict[MetricName, float]:
    """The metrics of ``fdr``, which share its weight equally.

    ``fdr`` is Inception's features, pixels and tones, ``fdr@clip`` CLIP's in place of Inception's.

    Args:
        name: ``fdr``, or with a network.
        setting: the weight, or a list of representations: extractors, and what stands in place of one.
        is_alone: whether it is the whole loss.

    Raises:
        MetricError: a list names none, one twice, or stands beside other metrics.
    """
    extractor = name.partition("@")[2]
    if not isinstance(setting, list):
        weight = _checked_weight(name, setting, sign=1)
        if weight == 0:
            return {}
        representations = list(dict.fromkeys([extractor or INCEPTION, *WITHOUT_NETWORK]))
    elif extractor or not is_alone or not setting:
        raise MetricError(
            f"loss: {{{name}: {setting}}}: a list of representations stands alone, as {{fdr: [clip, pixels]}}; beside "
            "other metrics, fdr has a weight, as {fdr: 1, reward: -1}"
        )
    else:
        weight = 1.0
        representations = setting
    weights = {_distance_in(one): weight / len(representations) for one in representations}
    if len(weights) < len(representations):
        raise MetricError(f"loss: {{fdr: {representations}}} names an extractor twice")
    return weights


def _with_terms(of_fdr: Mapping[MetricName, float], terms: Mapping[str, object]) -> dict[MetricName, float]:
    """The weights of ``fdr``'s metrics and of the other terms of a sum, without those that weigh nothing.

    Metrics where higher is better are subtracted, whether their weight is written with its minus or without.

    Raises:
        MetricError: for an unknown or repeated metric, one of held-out images, a weight that is no number, or a
            reward without a distance beside it.
    """
    weights = dict(of_fdr)
    for text, weight in terms.items():
        metric = MetricName.parse(text)
        if metric.formula in (FID_HELD_OUT, HELD_OUT_REWARD):
            raise MetricError(f"loss: {metric} is held out, and decides nothing; move it to held_out_metrics")
        if metric in weights:
            raise MetricError(f"loss: {metric} is named twice")
        size = abs(_checked_weight(metric, weight, metric.sign))
        if size > 0:
            weights[metric] = size
    if not weights:
        raise MetricError("loss: names no metric; the default is fdr")
    formulas = {metric.formula for metric in weights}
    if REWARD in formulas and formulas.isdisjoint(DISTANCES):
        raise MetricError(
            "loss: a reward alone collapses diversity; add a distance between distributions, as loss: "
            "{reward: -1, fid: 1}"
        )
    return weights


def _distance_in(representation: str) -> MetricName:
    """The distance that ``fdr`` measures in one of its representations: FID in the features of a network."""
    if representation in WITHOUT_NETWORK:
        return MetricName(WITHOUT_NETWORK[representation], representation)
    return MetricName.parse(f"fid@{representation}")


def _checked_weight(metric: MetricName | str, weight: object, sign: int) -> float:
    """The weight of a metric in a loss; its ``sign`` is −1 where higher is better.

    Where higher is better, either sign is right: the metric is subtracted. Raises MetricError if the weight is no
    finite number, or negative where lower is better.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < math.inf:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}, expected a number")
    if weight < 0 < sign:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}; lower is better, so expected a positive one")
    return float(weight)


def why_no_gradient(loss: Iterable[MetricName]) -> str | None:
    """Why a sum of these metrics has no gradient in the features, as one clause; ``None`` if it has one."""
    for metric in loss:
        if PLAIN.get(metric.formula, metric.formula) not in DIFFERENTIABLE:
            return f"{metric} in the loss has no gradient, only {', '.join(DIFFERENTIABLE)} have one"
    return None
