"""Names of metrics: ``fid``, ``kid@clip``, ``precision@my_module:my_extractor``.

The formula stands before the ``@``, the extractor behind it. Without an extractor it is Inception, as in the papers of
these metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import near_miss

Formula = Literal[
    "fid", "kid", "is", "precision", "recall", "near", "hinge", "clusters", "sliced", "cmmd",
    "authenticity", "fid_held_out", "nearer_train",
]  # fmt: skip
FORMULAS: tuple[Formula, ...] = get_args(Formula)
HIGHER_IS_BETTER: frozenset[Formula] = frozenset({"is", "precision", "recall", "authenticity"})
OF_REFERENCE_FEATURES: frozenset[Formula] = frozenset(FORMULAS) - {"fid", "is"}  # mean and covariance are not enough
OF_HELD_OUT: frozenset[Formula] = frozenset({"fid_held_out", "nearer_train"})  # which no loss may look at
DIFFERENTIABLE: tuple[Formula, ...] = ("fid", "kid", "near", "hinge", "clusters", "sliced", "cmmd")

KEPT = ("precision", "near", "hinge")  # of single images

INCEPTION = "inception"
EXTRACTORS = (INCEPTION, "clip", "dinov2")
MADE = {
    "random": "lcsc_opt.metrics.extractors.published:RandomInception",
    "digits": "lcsc_opt.training.images:digits_extractor",
    "digits2": "lcsc_opt.training.images:second_digits_extractor",
    "photographs": "lcsc_opt.training.images:photographs_extractor",
    "photographs2": "lcsc_opt.training.images:second_photographs_extractor",
}  # short names of factories, for study files and tables: networks that nobody published, made without a download
CROSS_CHECK = "cross_check"  # an objective's own extractor for the cross-check; no study file can name it
FDR = "fdr"  # of all feature spaces together, so it has no extractor
DISTANCES: tuple[Formula, ...] = ("fid", "kid", "sliced", "cmmd")  # lower is better; they see quality and diversity


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
            raise MetricError(f"{text!r} is no metric{hint}; known: {', '.join(FORMULAS)}, each with @extractor or not")
        module, colon, factory = extractor.partition(":")
        known = (*EXTRACTORS, *MADE)
        if at and extractor not in known and not (colon and module and factory):
            hint = near_miss(extractor, known)
            raise MetricError(
                f"{extractor!r} is no extractor{hint}; known: {', '.join(known)}, or your own as module:factory"
            )
        return cls(formula, extractor if at else INCEPTION)

    @classmethod
    def parse_loss(cls, loss: str | Mapping[str, float]) -> dict[MetricName, float]:
        """One metric with the weight 1, or the metrics of a weighted sum.

        Raises:
            MetricError: for an unknown or repeated metric, one of held-out images, a weight below zero, or none above
                it.
        """
        parsed: dict[MetricName, float] = {}
        for text, weight in ({loss: 1.0} if isinstance(loss, str) else loss).items():
            name = cls.parse(text)
            if name.formula in OF_HELD_OUT:
                raise MetricError(
                    f"loss: {name} is of held-out images, which decide nothing; move it to held_out_metrics"
                )
            if name in parsed:
                raise MetricError(f"loss: {name} is there twice")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise MetricError(
                    f"loss: the weight of {name} is {weight!r}, expected a positive number; "
                    f"{', '.join(sorted(HIGHER_IS_BETTER))} are subtracted by themselves, since higher is better"
                )
            parsed[name] = float(weight)
        parsed = {name: weight for name, weight in parsed.items() if weight}  # a sweep may begin at zero
        if not parsed:
            raise MetricError("loss: names no metric; the usual one is fid")
        return parsed

    @classmethod
    def parse_all(cls, names: Iterable[str]) -> tuple[MetricName, ...]:
        """The metrics of a list, each once, in its order. Raises MetricError for an unknown one."""
        return tuple(dict.fromkeys(cls.parse(name) for name in names))

    @classmethod
    def parse_kept(cls, text: str, loss: Mapping[MetricName, float]) -> MetricName:
        """The metric of ``keep: TEXT``, which may not get worse than at EMA*, the best of the window's EMA rates.

        FID falls while single images get worse. Optimizers that follow gradients add that of its :attr:`guide`, with a
        weight that they choose themselves, for example by dual ascent. All others get the loss with a penalty for the
        violation. Without ``@extractor``, its features are those of the loss's first metric.

        Raises:
            MetricError: it cannot be kept.
        """
        formula, at, extractor = text.partition("@")
        if formula not in KEPT:
            raise MetricError(f"keep: {text!r} cannot be kept; known: {', '.join(KEPT)}, each with @extractor or not")
        return cls.parse(f"{formula}@{extractor if at else next(iter(loss)).extractor}")

    @property
    def guide(self) -> MetricName:
        """What has a gradient in place of this metric: ``hinge`` is zero exactly for samples that are precise."""
        return dataclasses.replace(self, formula="hinge") if self.formula == "precision" else self

    def __str__(self) -> str:
        return self.formula if self.extractor == INCEPTION else f"{self.formula}@{self.extractor}"

    @property
    def sign(self) -> int:
        """The sign of the metric in a loss: 1, or −1 where higher is better."""
        return -1 if self.formula in HIGHER_IS_BETTER else 1

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with real images; only the Inception Score does not."""
        return self.formula != "is"
