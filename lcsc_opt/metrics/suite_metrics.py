"""Which metrics a search has, and which only its reports have: those that settings name, and the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import (
    CROSS_CHECK,
    DISTANCES,
    EXTRACTORS,
    HELD_OUT_REWARD,
    REWARD,
    TRAINED,
    MetricName,
)


@dataclasses.dataclass(frozen=True)
class SuiteMetrics:
    """The metrics of a search and those of its reports.

    Attributes:
        loss: the loss, with the metric that is kept.
        searched: the metrics of every evaluation: terms of the loss, further metrics, then what bounds the loss.
        reported: these, and those that settings name for reports only.
        adds_defaults: whether reports also have precision and recall: no metrics are named, or a reward is searched.
        adds_cross_check: whether they have FID in features that the loss does not see: always, unless settings want no
            metrics for reports only, by an empty list.
    """

    loss: Loss
    searched: tuple[MetricName, ...]
    reported: tuple[MetricName, ...]
    adds_defaults: bool
    adds_cross_check: bool

    @classmethod
    def of(
        cls,
        loss: Loss,
        *,
        metrics: Iterable[str] = (),
        held_out_metrics: Collection[str] | None = (),
        rewards: Collection[str] = (),
    ) -> SuiteMetrics:
        """The metrics of a loss, and those that settings name.

        Args:
            loss: what a search minimizes.
            metrics: computed with the loss in every evaluation.
            held_out_metrics: computed only in reports; ``None`` for the defaults.
            rewards: those of ``reward`` and ``held_out_reward`` that settings give a function. They are reported.

        Raises:
            MetricError: a metric is unknown, or a reward is named that has no function.
        """
        further = loss.parse_beside(metrics)
        held_out = loss.parse_beside(held_out_metrics or ())
        searches_reward = REWARD in loss.extractors
        if REWARD in rewards:
            further.append(MetricName(REWARD, REWARD))
        if HELD_OUT_REWARD in rewards:
            held_out.append(MetricName(HELD_OUT_REWARD, HELD_OUT_REWARD))
        # in the order of reports; each is computed once
        searched = tuple(dict.fromkeys((*loss.weights, *further, *loss.metrics)))
        reported = tuple(dict.fromkeys((*searched, *held_out)))
        for metric in reported:
            if metric.formula in (REWARD, HELD_OUT_REWARD) and metric.formula not in rewards:
                raise MetricError(f"{metric} is a metric here, so give {metric}: module:function")
        adds_defaults = held_out_metrics is None or searches_reward
        return cls(loss, searched, reported, adds_defaults, adds_cross_check=adds_defaults or bool(held_out_metrics))

    @property
    def named_cross_check(self) -> MetricName | None:
        """The distance in features that the loss does not see, if settings name one; FID before KID."""
        distances = [
            metric
            for metric in self.reported
            if metric.extractor not in self.loss.extractors and metric.formula in DISTANCES
        ]
        return min(distances, key=lambda metric: DISTANCES.index(metric.formula), default=None)

    @property
    def default_cross_check(self) -> str | None:
        """The extractor of the cross-check; ``None`` if settings name another one, or want none."""
        if not self.adds_cross_check or self.named_cross_check is not None:
            return None
        used = self.loss.extractors
        for name in TRAINED:  # its second network is another one, trained on the same images
            if name in used and f"{name}2" not in used:
                return f"{name}2"
        # these networks see natural images: they suit only if the loss uses one of them
        if not set(used).isdisjoint(EXTRACTORS):
            for name in EXTRACTORS:
                if name not in used:
                    return name
        return CROSS_CHECK
