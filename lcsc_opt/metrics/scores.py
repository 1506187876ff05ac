"""The metrics of an evaluation, and the loss that they make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.accumulator import Accumulator
from lcsc_opt.metrics.distances import SUBSET_SIZE, subset_size
from lcsc_opt.metrics.extractors.base import ClassifyingExtractor, FeatureExtractor
from lcsc_opt.metrics.judges import (
    FDR,
    JudgeReference,
    floors,
    judges_in,
    split_distance,
)
from lcsc_opt.metrics.keeping import kept_metric
from lcsc_opt.metrics.loss import Loss, LossScale, View, scaled_by_trace
from lcsc_opt.metrics.names import (
    CROSS_CHECK,
    DISTANCES,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    MetricName,
    parse_loss,
    parse_names,
)
from lcsc_opt.metrics.parts import FeaturePart, WholeEvaluation
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.statistics import ReferenceStatistics, reference_warning


@dataclasses.dataclass(frozen=True)
class CrossCheckSpace:
    """A metric in features that the loss does not see. ``build`` makes its view, or gives None where it cannot."""

    metric: MetricName
    build: Callable[[], View | None]


class Scores:
    """Images → loss and metrics.

    The loss is a weighted sum, in which metrics are subtracted where higher is better; metrics are reported as they
    are.

    Args:
        views: extractor's name in the metrics → extractor and reference.
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed beside the loss in every evaluation.
        held_out_metrics: computed only where an accumulator is made with ``held_out``.
        keep: a metric that may not get worse than at EMA*: ``precision``, ``near``, ``hinge``.
        loss_scale: ``trace`` divides each distance in the loss by the spread of the real images' features.
        device: where distances between features are computed.
        cross_check: reported beside the held-out metrics, unless these already have a distance in other features than
            the loss. It decides nothing, and is no part of the description.
        judge_reference: builds the reference of the default judges, in the features of the loss; without it there are
            no judges. They decide nothing either, and are no part of the description.

    Raises:
        MetricError: for an unknown metric, an extractor or a reference that is missing or does not fit, or a metric
            that needs more than mean and covariance of the reference.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        *,
        loss: str | Mapping[str, float] = "fid",
        metrics: Sequence[str] = (),
        held_out_metrics: Sequence[str] = (),
        keep: str | None = None,
        loss_scale: LossScale | None = None,
        device: torch.device | str = "cpu",
        cross_check: CrossCheckSpace | None = None,
        judge_reference: JudgeReference | None = None,
    ) -> None:
        weights = parse_loss(loss)
        kept = None if keep is None else kept_metric(keep, weights)
        self._metrics = tuple(dict.fromkeys((*weights, *parse_names(metrics), *([] if kept is None else [kept]))))
        self._held_out_metrics = tuple(dict.fromkeys((*self._metrics, *parse_names(held_out_metrics))))
        self._cross_check, self._judge_reference = cross_check, judge_reference
        names = dict.fromkeys(metric.extractor for metric in self._held_out_metrics)
        missing = [name for name in names if name not in views]
        if missing:
            raise MetricError(f"no extractor {missing[0]!r} was given, which a metric names")
        self._views = {name: views[name] for name in names}
        for metric in self._held_out_metrics:
            _check(metric, self._views[metric.extractor])
        self._weights, self._loss_scale = weights, loss_scale
        scaled = weights if loss_scale is None else scaled_by_trace(weights, self._views)
        self.loss = Loss(scaled, self._views, device, keep=kept)

    @classmethod
    def fid(
        cls,
        extractor: FeatureExtractor,
        reference: ReferenceStatistics,
        *,
        cross_check: Callable[[], View] | None = None,
    ) -> Scores:
        """The loss is FID; ``cross_check`` builds the view of ``fid@cross_check`` when it is first needed.

        Raises:
            MetricError: extractor and reference do not belong together.
        """
        views = {"inception": View(extractor, Reference.from_statistics(reference))}
        return cls(
            views,
            cross_check=None if cross_check is None else CrossCheckSpace(MetricName("fid", CROSS_CHECK), cross_check),
        )

    @functools.cached_property
    def cross_check_metric(self) -> MetricName | None:
        """The held-out metric that shows whether a gain is there in other features, too; lower is better.

        None where there is none.
        """
        searched = set(self.loss.extractors)
        named = [m for m in self._held_out_metrics if m.extractor not in searched and m.formula in DISTANCES]
        if named:
            return min(named, key=lambda metric: DISTANCES.index(metric.formula))
        if self._cross_check is None:
            return None
        metric = self._cross_check.metric
        view = self._views.get(metric.extractor)
        if view is None or view.reference is None:
            view = self._cross_check.build()
        if view is None:
            return None
        _check(metric, view)
        self._views[metric.extractor] = view
        return metric

    @functools.cached_property
    def judges(self) -> tuple[MetricName, ...]:
        """The held-out metrics that are not the loss; the references of default ones are built here.

        Where a metric is kept, and the loss may have a penalty, the metrics of the loss are among them.
        """
        cross_check = () if self.cross_check_metric is None else (self.cross_check_metric,)
        judges = dict.fromkeys((*self._held_out_metrics, *cross_check, *self._default_judges()))
        return tuple(judge for judge in judges if self.loss.keep is not None or judge not in self.loss.weights)

    def _default_judges(self) -> list[MetricName]:
        found: list[MetricName] = []
        if self._judge_reference is None:
            return found
        for name in self.loss.extractors:
            view = self._views[name]
            reference = self._judge_reference(name, view)
            if reference is not None:
                self._views[name] = View(view.extractor, reference)
                found += judges_in(name, reference)
        return found

    @functools.cached_property
    def splits(self) -> dict[str, float]:
        """Extractor → FID of real images to real images, for all extractors that ``fdr`` in held-out reports uses."""
        if self._judge_reference is None:
            return {}
        metrics = [metric for metric in (*self.loss.weights, *self.judges) if metric.needs_reference]
        references = {metric.extractor: self._views[metric.extractor].reference for metric in metrics}
        found = {name: split_distance(known) for name, known in references.items() if known is not None}
        return {name: distance for name, distance in found.items() if distance is not None}

    @property
    def signs(self) -> dict[str, int]:
        """Judge → 1, or −1 where higher is better; ``fdr``, of all extractors together, is one of them."""
        return {**{str(judge): judge.sign for judge in self.judges}, **({FDR: 1} if self.splits else {})}

    def floors(self) -> dict[str, float]:
        """Judge → its value for held-out real images in place of samples; empty where none are held out."""
        found = floors(self.judges, self._views, self.loss)
        references = [self._views[name].reference for name in self.splits]
        if references and all(reference is not None and reference.held_out is not None for reference in references):
            found[FDR] = 1.0  # by its definition
        return found

    @property
    def extractor(self) -> FeatureExtractor:
        """The extractor of the loss's first metric; it orders image pairs."""
        return self._views[next(iter(self.loss.weights)).extractor].extractor

    @property
    def dimension(self) -> int:
        """The largest number of features that a metric of a search works with."""
        return max(self._views[metric.extractor].extractor.dimension for metric in self._metrics)

    def accumulator(
        self, images: int, *, held_out: bool = False, gradient: bool = False, total: int | None = None
    ) -> Accumulator:
        """An accumulator for the images of one evaluation, or of a part of it.

        Args:
            images: how many will be added.
            held_out: whether held-out metrics are computed, too.
            gradient: whether the gradient of the loss will be needed.
            total: how many the whole evaluation has; ``None`` where these are all.

        Raises:
            MetricError: ``images`` is below 1, or above ``total``.
        """
        metrics = self._computed(held_out=held_out)
        splits = self.splits if held_out else None
        return Accumulator(self.loss, self._views, metrics, images, total=total, gradient=gradient, splits=splits)

    def whole(self, parts: Sequence[FeaturePart], *, held_out: bool = False) -> WholeEvaluation:
        """The whole evaluation from its parts, in the order of their images.

        Raises:
            MetricError: they are not the parts of one evaluation with these metrics and extractors.
        """
        computed = self._computed(held_out=held_out)  # which may need to build the cross-check's view
        whole = WholeEvaluation(self.loss, parts, self.splits if held_out else None)
        if whole.metrics != computed:
            raise MetricError(
                f"parts: are for {', '.join(map(str, whole.metrics))} and not for {', '.join(map(str, computed))}; "
                "make them with the same metrics and the same held_out"
            )
        return whole

    def _computed(self, *, held_out: bool) -> tuple[MetricName, ...]:
        if not held_out:
            return self._metrics
        return tuple(dict.fromkeys((*self._held_out_metrics, *self.judges)))

    def warnings(self, images: int) -> list[str]:
        """Warnings about metrics of ``images`` samples against these references, a line each."""
        lines = []
        for metric in self._metrics:
            view = self._views[metric.extractor]
            if view.reference is None:
                continue
            if metric.formula == "fid":
                sets = ((view.reference.statistics.count, "reference set"), (images, "set of samples"))
                lines += [reference_warning(count, view.extractor.dimension, what=what) for count, what in sets]
            elif metric.formula == "kid":
                lines.append(_kid_warning(metric, images, len(view.reference.features)))
        return [line for line in dict.fromkeys(lines) if line is not None]

    def describe(self) -> dict[str, Any]:
        """The loss, all metrics, and each extractor's name and reference, for the study's fingerprint."""
        extractors = {metric.extractor for metric in self._held_out_metrics}
        views = {
            name: {"name": view.extractor.name, "reference": view.reference and view.reference.identity}
            for name, view in sorted(self._views.items())
            if name in extractors
        }
        return {
            "loss": {str(metric): weight for metric, weight in self._weights.items()},
            **({} if self._loss_scale is None else {"loss_scale": self._loss_scale}),
            **({} if self.loss.keep is None else {"keep": str(self.loss.keep)}),
            "metrics": sorted(str(metric) for metric in self._metrics),
            "held_out_metrics": sorted(str(metric) for metric in self._held_out_metrics),
            "extractors": views,
        }


def _check(metric: MetricName, view: View) -> None:
    if metric.formula == "is" and not isinstance(view.extractor, ClassifyingExtractor):
        raise MetricError(f"{metric}: the extractor {view.extractor.name} tells no classes apart; use is@inception")
    if not metric.needs_reference:
        return
    if view.reference is None:
        raise MetricError(f"{metric}: needs a reference; only the Inception Score (is) does without")
    dimension = view.reference.statistics.dimension
    if dimension != view.extractor.dimension:
        raise MetricError(
            f"{metric}: the reference statistics have {dimension} features and the extractor "
            f"{view.extractor.name} {view.extractor.dimension}; compute them with the same extractor"
        )
    if metric.formula in OF_REFERENCE_FEATURES:
        try:
            _ = view.reference.features
            _ = view.reference.unseen if metric.formula in OF_HELD_OUT else None
        except MetricError as error:
            raise MetricError(f"{metric}: {error}") from error


def _kid_warning(metric: MetricName, images: int, real: int) -> str | None:
    size = subset_size(images, real)
    if size == SUBSET_SIZE:
        return None
    return (
        f"{metric}: subsets of {size} images, since there are {images} samples and {real} reference images; "
        f"published values have subsets of {SUBSET_SIZE}"
    )
