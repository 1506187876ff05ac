"""Names of metrics: ``fid``, ``kid@clip``, ``precision@my_module:my_extractor``.

The formula stands before the ``@``, the extractor behind it. Without an extractor it is Inception, as in the papers of
these metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Final

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import near_miss

Formula = str
"""One of :data:`FORMULAS`."""
FORMULAS: tuple[Formula, ...] = (
    "fid",
    "kid",
    "is",
    "precision",
    "recall",
    "near",
    "hinge",
    "fid_held_out",
    "reward",
    "held_out_reward",
    "outside",
    "tones",
)
HIGHER_IS_BETTER: frozenset[Formula] = frozenset({"is", "precision", "recall", "reward", "held_out_reward"})
PIXELS = "pixels"
THUMBNAILS = "thumbnails"
TONES = "tones"
OUTSIDE = "outside"
REWARD: Final = "reward"
HELD_OUT_REWARD: Final = "held_out_reward"
FID_SHRUNK: Final = "fid_shrunk"  # to a target that is shrunk towards an average of the checkpoints
TONES_SHRUNK: Final = "tones_shrunk"
OWN_FEATURES: frozenset[Formula] = frozenset({REWARD, HELD_OUT_REWARD, OUTSIDE, TONES})
"""Metrics with features of their own; the extractor has the metric's name. That of a reward is the user's function."""
WITHOUT_NETWORK: Mapping[str, Formula] = {PIXELS: "fid", TONES: TONES}
"""In place of an extractor: representations of images without a network → the distance that compares them."""
WITHOUT_REFERENCE: frozenset[Formula] = frozenset({"is", REWARD, HELD_OUT_REWARD, OUTSIDE})
FID_HELD_OUT: Final = "fid_held_out"  # to real images that no search saw: never in a loss
OF_REFERENCE_FEATURES: frozenset[Formula] = frozenset(FORMULAS) - {"fid", FID_HELD_OUT, *WITHOUT_REFERENCE}
"""Those for which mean and covariance of the real images are not enough."""
TONES_HELD_OUT: Final = f"{TONES}_held_out"
TO_SHRUNK: Mapping[Formula, Formula] = {"fid": FID_SHRUNK, TONES: TONES_SHRUNK}
"""A distance to the real images that a search sees → the same one to a target that is shrunk; only a loss has it."""
TO_HELD_OUT: Mapping[Formula, Formula] = {
    "fid": FID_HELD_OUT,
    TONES: TONES_HELD_OUT,
    FID_SHRUNK: FID_HELD_OUT,
    TONES_SHRUNK: TONES_HELD_OUT,
}
"""A distance to the real images that a search sees → the same one to those that are held out."""
PLAIN: Mapping[Formula, Formula] = {
    FID_HELD_OUT: "fid",
    TONES_HELD_OUT: TONES,
    FID_SHRUNK: "fid",
    TONES_SHRUNK: TONES,
}
"""A distance to something else than the real images that a search sees → the same one to these."""
DIFFERENTIABLE: tuple[Formula, ...] = ("fid", "kid", "near", "hinge", "reward", TONES)
BIASED: frozenset[Formula] = frozenset({"fid", TONES, *TO_SHRUNK.values()})
"""Distances with a gradient, whose expected value depends on the number of samples."""

OF_LOSS_FEATURES = ("precision", "recall", "near", "hinge", "fid_held_out")
"""Without ``@extractor``, these are in the features of the loss."""
KEPT = ("precision", "near", "hinge", REWARD)  # of single images
Kept = str | Mapping[str, float]
"""A metric that is kept; or a metric → its bound."""

INCEPTION = "inception"
EXTRACTORS = (INCEPTION, "clip", "dinov2")
TRAINED = ("digits", "photographs", "mnist")  # classifiers of such images; each has a second one, as digits2

# Short names of factories, for study files and tables: unpublished networks, which need no download.
MADE = {
    PIXELS: "lcsc_opt.metrics.extractors.pixels:Thumbnails",  # whose principal components a reference turns them into
    THUMBNAILS: "lcsc_opt.metrics.extractors.pixels:Thumbnails",
    "outside": "lcsc_opt.metrics.extractors.pixels:Outside",
    TONES: "lcsc_opt.metrics.tones:Tones",
}
for _name in TRAINED:
    MADE[_name] = "lcsc_opt.metrics.extractors.bundled:feature_network"
    MADE[f"{_name}2"] = "lcsc_opt.metrics.extractors.bundled:feature_network"

CROSS_CHECK = "cross_check"  # our own extractor for the cross-check; no study file can name it
FDR = "fdr"  # a loss: distances in several representations, each relative to that of one average of the checkpoints
DISTANCES: tuple[Formula, ...] = ("fid", "kid")  # lower is better; they see quality and diversity


@dataclasses.dataclass(frozen=True)
class MetricName:
    """A metric: its ``formula``, and the name of the ``extractor`` of its features."""

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
            raise MetricError(
                f"{text!r} is not a metric{near_miss(formula, FORMULAS)}; known: {', '.join(FORMULAS)}, each "
                "optionally with @extractor"
            )
        if not at:
            return cls(formula, _usual_extractor(formula))
        if formula in (TONES, OUTSIDE):
            raise MetricError(f"{text!r}: {formula} has features of its own; leave out what follows @")
        if formula in (REWARD, HELD_OUT_REWARD):
            raise MetricError(f"{text!r}: the setting {formula} names the function, as module:function")
        module, _, factory = extractor.partition(":")
        is_factory = bool(module and factory)
        names = [*EXTRACTORS, *MADE]
        if not is_factory and extractor not in names:
            raise MetricError(
                f"{extractor!r} is not an extractor{near_miss(extractor, names)}; known: {', '.join(names)}, or your "
                "own as module:factory"
            )
        return cls(formula, extractor)

    @property
    def guide(self) -> MetricName:
        """What has a gradient in place of this metric: ``hinge`` is zero exactly for samples that are precise."""
        if self.formula == "precision":
            return dataclasses.replace(self, formula="hinge")
        return self

    def __str__(self) -> str:
        if self.extractor == _usual_extractor(self.formula):
            return self.formula
        return f"{self.formula}@{self.extractor}"

    @property
    def has_own_features(self) -> bool:
        """Whether its features are made for it, as a reward or tones: no other metric is measured in them."""
        return PLAIN.get(self.formula, self.formula) in OWN_FEATURES

    @property
    def sign(self) -> int:
        """The sign of the metric in a loss: 1, or −1 where higher is better."""
        if self.formula in HIGHER_IS_BETTER:
            return -1
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with real images; the Inception Score and rewards do not."""
        return self.formula not in WITHOUT_REFERENCE


def _usual_extractor(formula: Formula) -> str:
    """The extractor of a metric that is written without one."""
    plain = PLAIN.get(formula, formula)
    if plain in OWN_FEATURES:
        return plain
    return INCEPTION


def need_real_features(formulas: Iterable[Formula]) -> bool:
    """Whether any of these needs the features of all real images, not only their mean and covariance."""
    return not OF_REFERENCE_FEATURES.isdisjoint(formulas)
