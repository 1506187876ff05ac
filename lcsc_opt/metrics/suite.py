"""The loss, the metrics, and the references of an objective over images, put together.

:mod:`~lcsc_opt.metrics.loss` says what is minimized, :mod:`~lcsc_opt.metrics.report_metrics` what held-out reports
have. :class:`~lcsc_opt.metrics.image_metrics.ImageMetrics` computes both for the images of one evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Yardstick
from lcsc_opt.metrics.extractors.base import FeatureExtractor, image_gradient
from lcsc_opt.metrics.extractors.pixels import Outside, Thumbnails
from lcsc_opt.metrics.image_metrics import ImageMetrics, extractor_for
from lcsc_opt.metrics.loss import Loss, LossSetting, in_features_of
from lcsc_opt.metrics.names import (
    FID_HELD_OUT,
    HELD_OUT_REWARD,
    OUTSIDE,
    REWARD,
    THUMBNAILS,
    Kept,
    MetricName,
    need_real_features,
)
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.report_metrics import BuildReferences, ReportMetrics


class MetricSuite:
    """Images → loss and metrics.

    The loss is a weighted sum, in which metrics are subtracted where higher is better; metrics are reported as they
    are.

    Args:
        references: extractor's name in the metrics → its reference. ``reward`` and ``held_out_reward`` are reported if
            they are among them; with a reward in the loss, ``spread`` is, too. ``outside`` always is.
        loss: a metric, the weights of a sum of metrics, or ``fdr``.
        metrics: computed with the loss in every evaluation.
        held_out_metrics: computed only in held-out reports.
        keep: a metric that may not get worse than at the yardstick, or metric → bound: ``precision``, ``near``,
            ``hinge``.
        device: where distances between features are computed.
        report_references: builds references that only held-out reports need, when they are first needed. One for an
            extractor of the loss replaces that in ``references``, and the metrics of
            :data:`~lcsc_opt.metrics.report_metrics.REPORTED` are in reports. In another extractor FID is. These metrics
            decide nothing, and are no part of the description.

    Attributes:
        loss: the loss, with the metric that is kept.
        references: extractor's name → its reference.
        reports: the metrics of held-out reports.

    Raises:
        MetricError: for an unknown metric, a reference that is missing, or a metric that needs more than mean and
            covariance of it.
    """

    def __init__(
        self,
        references: Mapping[str, Reference],
        *,
        loss: LossSetting = "fid",
        metrics: Sequence[str] = (),
        held_out_metrics: Sequence[str] = (),
        keep: Kept | None = None,
        device: torch.device | str = "cpu",
        report_references: BuildReferences | None = None,
    ) -> None:
        self.loss = Loss.parse(loss, keep)
        self._device = device

        metric_texts = in_features_of(self.loss.weights, metrics)
        held_out_texts = in_features_of(self.loss.weights, held_out_metrics)
        available = dict(references)
        if MetricName(REWARD, REWARD) in self.loss.weights:  # a reward collapses diversity: report how images vary
            held_out_texts.append("spread")
            available.setdefault(THUMBNAILS, Reference(Thumbnails()))
        if REWARD in available:
            metric_texts.append(REWARD)
        if HELD_OUT_REWARD in available:
            held_out_texts.append(HELD_OUT_REWARD)
        # in the order of reports: terms of the loss, further metrics, then what bounds it; each is computed once
        search_metrics = (*self.loss.weights, *MetricName.parse_all(metric_texts), *self.loss.metrics)
        self._metrics = tuple(dict.fromkeys(search_metrics))
        self._held_out_metrics = tuple(dict.fromkeys((*self._metrics, *MetricName.parse_all(held_out_texts))))

        self.references: dict[str, Reference] = {}
        for metric in self._held_out_metrics:
            if metric.extractor not in available:
                raise MetricError(f"no extractor {metric.extractor!r} was given, which a metric names")
            self.references[metric.extractor] = available[metric.extractor]
        for metric in self._held_out_metrics:  # after all extractors are known to be there: this computes features
            _check(metric, self.references[metric.extractor])
        self.references[OUTSIDE] = Reference(Outside())
        self.reports = ReportMetrics(
            self.loss,
            self._held_out_metrics,
            self.references,
            build_references=report_references,
            device=device,
        )

    @property
    def weights(self) -> Mapping[MetricName, float]:
        """Metric → its weight in the loss."""
        return self.loss.weights

    @property
    def extractors(self) -> tuple[str, ...]:
        """The names of the extractors whose features the loss is made of."""
        return self.loss.extractors

    @property
    def extractor(self) -> FeatureExtractor:
        """The extractor of the loss's first metric; it orders image pairs. A reward alone leaves that to pixels."""
        name = self.loss.extractors[0]
        if name == REWARD:
            name = THUMBNAILS
        return self.references[name].extractor

    @property
    def dimension(self) -> int:
        """D of the largest D × D matrices that a metric of a search needs."""
        with_matrices = [metric for metric in self._metrics if not metric.has_own_features]
        return max((self.references[metric.extractor].extractor.dimension for metric in with_matrices), default=1)

    def image_metrics(
        self,
        total: int,
        *,
        group: str = SEARCH.group,
        gradient: bool = False,
        unbiased: bool = False,
        yardstick: Yardstick | None = None,
    ) -> ImageMetrics:
        """The metrics of one evaluation of ``total`` images, or of a part of it, which has no images yet.

        Reports have metrics of their own. The choice of an answer has the cross-check, and its loss is the distance to
        real images that no search sees, where there are some.

        Args:
            total: how many images.
            group: of their noise.
            gradient: keep the features that the gradient of the loss needs.
            unbiased: extrapolate distances to infinitely many images.
            yardstick: what the loss is relative to; without it, its metrics have no units and no bound.
        """
        loss = self.loss if yardstick is None else self.loss.relative_to(yardstick)
        metrics = self._metrics
        if group == HELD_OUT.group:
            metrics = tuple(dict.fromkeys((*self._held_out_metrics, *self.reports.evaluation_metrics)))
        elif group == SELECTION.group and self.cross_check_metric is not None:
            metrics = tuple(dict.fromkeys((*metrics, self.cross_check_metric)))
        references = self.references
        if group != HELD_OUT.group:
            references = {name: reference.of_choice for name, reference in references.items()}
        return ImageMetrics(
            loss,
            metrics,
            references,
            total=total,
            gradient=gradient,
            unbiased=unbiased,
            chooses=group == SELECTION.group,
            intervals=group in (SELECTION.group, HELD_OUT.group),
            device=self._device,
        )

    def image_gradient(
        self, images: Tensor, gradients: Mapping[str, Tensor], prompts: Sequence[str] | None = None
    ) -> Tensor:
        """The derivative of the loss in ``images``: ``[B, C, H, W]``, in their type and on their device.

        Args:
            images: ``[B, C, H, W]`` as the sampler gives them; their own graph is not followed.
            gradients: the rows ``[B, D]`` of these images out of :meth:`ImageMetrics.gradients`.
            prompts: the prompts of the images, if they have some.

        Raises:
            MetricError: an extractor cuts the graph.
        """
        terms = []
        for name, rows in gradients.items():
            extractor = extractor_for(self.references[name], prompts)
            terms.append(image_gradient(extractor, images, rows))
        return torch.stack(terms).sum(dim=0)

    @property
    def cross_check_metric(self) -> MetricName | None:
        """The metric of reports that shows whether a gain is real in other features, too."""
        return self.reports.cross_check_metric

    @property
    def signs(self) -> dict[str, int]:
        """Metric of reports → 1, or −1 if higher is better."""
        return self.reports.signs

    def real_halves(self) -> dict[str, float]:
        """Metric of reports → its value for held-out real images in place of samples."""
        return self.reports.real_halves()

    def warnings(self, images: int) -> list[str]:
        """Warnings about FID of ``images`` samples against these references, a line each."""
        lines: list[str] = []
        for metric in self._metrics:
            if metric.formula != "fid":
                continue
            reference = self.references[metric.extractor]
            dimension = reference.extractor.dimension
            for count, name in ((reference.count, "reference set"), (images, "set of samples")):
                if count is not None and count <= dimension:
                    lines.append(
                        f"the {name} has {count} images for {dimension} features, so FID is biased upwards and "
                        "compares only with FIDs of as many images; use more, or an extractor with fewer features"
                    )
        return list(dict.fromkeys(lines))

    def describe(self) -> dict[str, Any]:
        """The loss, all metrics, and each extractor's name and reference, for the study's fingerprint."""
        extractors = {}
        for name in sorted({metric.extractor for metric in self._held_out_metrics}):
            reference = self.references[name]
            extractors[name] = {"name": reference.extractor.name, "reference": reference.identity}
        description: dict[str, Any] = {"loss": self.loss.describe()}
        if self.loss.keep is not None:
            description["keep"] = str(self.loss.keep)
        if self.loss.bound is not None:
            description["bound"] = self.loss.bound
        description["metrics"] = sorted(str(metric) for metric in self._metrics)
        description["held_out_metrics"] = sorted(str(metric) for metric in self._held_out_metrics)
        description["extractors"] = extractors
        return description


def _check(metric: MetricName, reference: Reference) -> None:
    """Raise MetricError if the metric cannot be computed with this reference."""
    if metric.formula == "is" and not hasattr(reference.extractor, "features_and_logits"):
        raise MetricError(f"{metric}: the extractor {reference.extractor.name} has no classes; use is@inception")
    try:
        if metric.needs_reference:
            _ = reference.frechet
        if need_real_features([metric.formula]):
            _ = reference.known_features
        if metric.formula == FID_HELD_OUT:
            _ = reference.unseen
    except MetricError as error:
        raise MetricError(f"{metric}: {error}") from error
