"""Names of metrics: ``fid``, ``kid@clip``, ``precision@my_module:my_extractor``.

The formula stands before the ``@``, the extractor behind it. Without an extractor it is Inception, as in the papers of
these metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.plugins import Plugin, find_plugin, plugin_names
from lcsc_opt.base.settings import near_miss

Formula = str
"""One of :data:`FORMULAS`, or the name of a metric that an installed package adds."""
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
    "spread",
    "outside",
)
HIGHER_IS_BETTER: frozenset[Formula] = frozenset({"is", "precision", "recall", "reward", "held_out_reward", "spread"})
PIXELS = "pixels"
THUMBNAILS = "thumbnails"
OWN_FEATURES: Mapping[Formula, str] = {
    "reward": "reward",
    "held_out_reward": "held_out_reward",
    "spread": THUMBNAILS,
    "outside": "outside",
}
# Those for which mean and covariance of the reference are not enough.
OF_REFERENCE_FEATURES: frozenset[Formula] = frozenset(FORMULAS) - {"fid", "is", *OWN_FEATURES}
FID_HELD_OUT: Final = "fid_held_out"  # to real images that no search saw: never in a loss
DIFFERENTIABLE: tuple[Formula, ...] = ("fid", "kid", "near", "hinge", "reward")

OF_LOSS_FEATURES = ("precision", "recall", "near", "hinge", "fid_held_out")
"""Without ``@extractor``, these are in the features of the loss."""
KEPT = ("precision", "near", "hinge")  # of single images
Kept = str | Mapping[str, float]
"""A metric that is kept; or a metric → its bound."""

INCEPTION = "inception"
EXTRACTORS = (INCEPTION, "clip", "dinov2")
TRAINED = ("digits", "photographs", "characters")  # classifiers of such images; each has a second one, as digits2

# Short names of factories, for study files and tables: unpublished networks, which need no download.
MADE = {
    "random": "lcsc_opt.metrics.extractors.published:RandomInception",
    PIXELS: "lcsc_opt.metrics.extractors.pixels:Thumbnails",  # whose principal components a reference turns them into
    THUMBNAILS: "lcsc_opt.metrics.extractors.pixels:Thumbnails",
    "outside": "lcsc_opt.metrics.extractors.pixels:Outside",
}
for _name in TRAINED:
    MADE[_name] = "lcsc_opt.metrics.extractors.bundled:feature_network"
    MADE[f"{_name}2"] = "lcsc_opt.metrics.extractors.bundled:feature_network"

CROSS_CHECK = "cross_check"  # our own extractor for the cross-check; no study file can name it
FDR = "fdr"  # a loss: FID in several representations together, each relative to that of one average of the checkpoints
OUTSIDE = "outside"
DISTANCES: tuple[Formula, ...] = ("fid", "kid")  # lower is better; they see quality and diversity
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
            _check_plugin(formula, text)
        if not at:
            return cls(formula, OWN_FEATURES.get(formula, INCEPTION))
        if formula in (REWARD, HELD_OUT_REWARD):
            raise MetricError(f"{text!r}: the setting {formula} names the function, as module:function")
        module, _, factory = extractor.partition(":")
        is_factory = bool(module and factory)
        if not is_factory and extractor not in (*EXTRACTORS, *MADE) and extractor_plugin(extractor) is None:
            names = [*EXTRACTORS, *MADE, *plugin_names("extractors")]
            raise MetricError(
                f"{extractor!r} is not an extractor{near_miss(extractor, names)}; known: {', '.join(names)}, or your "
                "own as module:factory"
            )
        return cls(formula, extractor)

    @classmethod
    def parse_all(cls, names: Iterable[str]) -> tuple[MetricName, ...]:
        """The metrics of a list, each once, in its order. Raises MetricError for an unknown one."""
        return tuple(dict.fromkeys(cls.parse(name) for name in names))

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
        higher_is_better = self.formula in HIGHER_IS_BETTER
        if self.formula not in FORMULAS:
            higher_is_better = getattr(load_metric(self.formula), "higher_is_better", False)
        return -1 if higher_is_better else 1

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with real images; the Inception Score, rewards and the spread do not."""
        return self.formula not in ("is", *OWN_FEATURES)

    @property
    def is_differentiable(self) -> bool:
        """Whether it has a derivative in the features of the samples."""
        if self.formula in FORMULAS:
            return self.formula in DIFFERENTIABLE
        return bool(getattr(load_metric(self.formula), "differentiable", False))


def need_real_features(formulas: Iterable[Formula]) -> bool:
    """Whether any of these needs the features of all real images, not only their mean and covariance."""
    return any(formula in OF_REFERENCE_FEATURES or formula not in FORMULAS for formula in formulas)


def load_metric(formula: Formula) -> Callable[..., Any]:
    """The metric of an installed package: samples ``[N, D]`` and real ones ``[M, D]`` → a number.

    Attributes of it may say more: ``higher_is_better`` and ``differentiable``, both false by default.

    Raises:
        MetricError: there is none of this name, or it cannot be imported.
    """
    metric: Callable[..., Any] = metric_plugin(formula).load(MetricError)
    return metric


def metric_plugin(formula: Formula) -> Plugin:
    """The installed package that brings a metric which is not ours.

    Raises:
        MetricError: none or two of them bring it; one that a stored study was made with may be gone.
    """
    plugin = _plugin_of_formula(formula)
    if plugin is None:
        raise MetricError(f"{formula}: no installed package has a metric of this name")
    return plugin


def _check_plugin(formula: str, text: str) -> None:
    """Raise MetricError if no installed package brings the metric that ``text`` names, or it cannot be imported."""
    if _plugin_of_formula(formula) is None:
        formulas = [*FORMULAS, *plugin_names("metrics")]
        raise MetricError(
            f"{text!r} is not a metric{near_miss(formula, formulas)}; known: {', '.join(formulas)}, each optionally "
            "with @extractor"
        )
    load_metric(formula)


def _plugin_of_formula(formula: str) -> Plugin | None:
    if formula in FORMULAS:
        return None
    return find_plugin("metrics", formula, error=MetricError)


def extractor_plugin(name: str) -> Plugin | None:
    """The installed package that brings an extractor; ``None`` for ours, a ``module:factory``, and what nobody has.

    Raises:
        MetricError: two packages bring one of this name.
    """
    if ":" in name or name in (*EXTRACTORS, *MADE):
        return None
    return find_plugin("extractors", name, error=MetricError)


def plugins_in_settings(settings: Any) -> Iterator[Plugin]:
    """The packages whose metrics and extractors settings name, in a key or a value."""
    if isinstance(settings, str):
        formula, _, extractor = settings.partition("@")
        for plugin in (_plugin_of_formula(formula), extractor_plugin(extractor or settings)):
            if plugin is not None:
                yield plugin
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from plugins_in_settings(key)
            yield from plugins_in_settings(value)
    elif isinstance(settings, (list, tuple)):
        for entry in settings:
            yield from plugins_in_settings(entry)
