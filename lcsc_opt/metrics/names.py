"""Names of metrics: ``fid``, ``kid@clip``, ``precision@my_module:my_extractor``.

The formula stands before the ``@``, the extractor behind it. Without an extractor it is Inception, as in the papers of
these metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import near_miss

Formula = Literal[
    "fid",
    "kid",
    "is",
    "precision",
    "recall",
    "near",
    "hinge",
    "sliced",
    "cmmd",
    "authenticity",
    "fid_held_out",
    "nearer_train",
    "reward",
    "held_out_reward",
    "spread",
]
FORMULAS: tuple[Formula, ...] = get_args(Formula)
HIGHER_IS_BETTER: frozenset[Formula] = frozenset(
    {"is", "precision", "recall", "authenticity", "reward", "held_out_reward", "spread"}
)
OWN_FEATURES: Mapping[Formula, str] = {"reward": "reward", "held_out_reward": "held_out_reward", "spread": "pixels"}
# Those for which mean and covariance of the reference are not enough.
OF_REFERENCE_FEATURES: frozenset[Formula] = frozenset(FORMULAS) - {"fid", "is", *OWN_FEATURES}
OF_HELD_OUT: frozenset[Formula] = frozenset({"fid_held_out", "nearer_train"})  # of held-out images: never in a loss
DIFFERENTIABLE: tuple[Formula, ...] = ("fid", "kid", "near", "hinge", "sliced", "cmmd", "reward")

KEPT = ("precision", "near", "hinge")  # of single images
Kept = str | Mapping[str, float]
"""A metric that is kept; or a metric → its bound."""

INCEPTION = "inception"
EXTRACTORS = (INCEPTION, "clip", "dinov2")
TRAINED = ("digits", "photographs", "characters")  # classifiers of such images; each has a second one, as digits2

# Short names of factories, for study files and tables: unpublished networks, which need no download.
MADE = {
    "random": "lcsc_opt.metrics.extractors.published:RandomInception",
    "pixels": "lcsc_opt.metrics.extractors.rewards:Thumbnails",
}
for _name in TRAINED:
    MADE[_name] = "lcsc_opt.metrics.extractors.bundled:feature_network"
    MADE[f"{_name}2"] = "lcsc_opt.metrics.extractors.bundled:feature_network"

CROSS_CHECK = "cross_check"  # an objective's own extractor for the cross-check; no study file can name it
FDR = "fdr"  # of all feature spaces together, so it has no extractor
DISTANCES: tuple[Formula, ...] = ("fid", "kid", "sliced", "cmmd")  # lower is better; they see quality and diversity
REWARD: Final = "reward"
HELD_OUT_REWARD: Final = "held_out_reward"  # in place of an extractor: a function that scores single images


@dataclasses.dataclass(frozen=True)
class MetricName:
    """A metric: its ``formula``, and the ``extractor`` of its features."""

    formula: Formula
    extractor: str = INCEPTION

    @classmethod
    def parse(cls, text: str) -> MetricName:
        """The metric that ``text`` names.

        Raises:
            MetricError: there is no such metric; the message names a near miss.
        """
        formula, at, extractor = text.partition("@")
        if formula not in FORMULAS:
            hint = near_miss(formula, FORMULAS)
            raise MetricError(
                f"{text!r} is not a metric{hint}; known: {', '.join(FORMULAS)}, each optionally with @extractor"
            )
        if not at:
            return cls(formula, OWN_FEATURES.get(formula, INCEPTION))
        if formula in (REWARD, HELD_OUT_REWARD):
            raise MetricError(f"{text!r}: the setting {formula} names the function, as module:function")
        module, _, factory = extractor.partition(":")
        is_factory = bool(module and factory)
        names = (*EXTRACTORS, *MADE)
        if extractor not in names and not is_factory:
            hint = near_miss(extractor, names)
            raise MetricError(
                f"{extractor!r} is not an extractor{hint}; known: {', '.join(names)}, or your own as module:factory"
            )
        return cls(formula, extractor)

    @classmethod
    def parse_loss(cls, loss: str | Mapping[str, float], *, unguarded: bool = True) -> dict[MetricName, float]:
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
            metric = cls.parse(text)
            if metric.formula in OF_HELD_OUT or metric.formula == HELD_OUT_REWARD:
                raise MetricError(f"loss: {metric} is held out, and decides nothing; move it to held_out_metrics")
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

    @classmethod
    def parse_all(cls, names: Iterable[str]) -> tuple[MetricName, ...]:
        """The metrics of a list, each once, in its order. Raises MetricError for an unknown one."""
        return tuple(dict.fromkeys(cls.parse(name) for name in names))

    @classmethod
    def parse_kept(cls, keep: Kept, loss: Mapping[MetricName, float]) -> MetricName:
        """The metric that may not get worse than at EMA*, the best of the window's EMA rates, or than its bound.

        FID falls while single images get worse. Optimizers that follow gradients add that of its :attr:`guide`, with a
        weight that they choose themselves, for example by dual ascent. All others get the loss with a penalty for the
        violation. Without ``@extractor``, its features are those of the loss's first metric.

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
        return cls.parse(f"{formula}@{extractor}")

    @staticmethod
    def why_no_gradient(loss: Iterable[MetricName]) -> str | None:
        """Why a sum of these metrics has no gradient in the features, as one clause; ``None`` if it has one."""
        for metric in loss:
            if metric.formula not in DIFFERENTIABLE:
                return f"{metric} in the loss has no gradient, only {', '.join(DIFFERENTIABLE)} have one"
        return None

    @property
    def guide(self) -> MetricName:
        """What has a gradient in place of this metric: ``hinge`` is zero exactly for samples that are precise."""
        if self.formula == "precision":
            return dataclasses.replace(self, formula="hinge")
        return self

    def __str__(self) -> str:
        if self.extractor == OWN_FEATURES.get(self.formula, INCEPTION):
            return self.formula
        return f"{self.formula}@{self.extractor}"

    @property
    def sign(self) -> int:
        """The sign of the metric in a loss: 1, or −1 where higher is better."""
        return -1 if self.formula in HIGHER_IS_BETTER else 1

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with real images; the Inception Score, rewards and the spread do not."""
        return self.formula not in ("is", *OWN_FEATURES)


def _checked_weight(metric: MetricName, weight: object) -> float:
    """The weight of a metric in a loss. Raises MetricError if it is no finite number, or has the wrong sign."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < math.inf:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}, expected a number")
    if weight < 0 < metric.sign:
        raise MetricError(f"loss: the weight of {metric} is {weight!r}; lower is better, so expected a positive one")
    return float(weight)
