"""The metrics of held-out reports: what a search may lose while its loss falls.

Precision and recall tell fidelity and diversity apart, and FID in features that the loss does not use shows whether a
gain is real. ``outside`` is the share of values that saving an image clips. If real images are held out, there is also
FID to these. Precision and recall need the features of the real images, which a file of statistics does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from lcsc_opt.metrics.distances import NEIGHBOURHOOD
from lcsc_opt.metrics.feature_metrics import FeatureMetrics
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import DISTANCES, FID_HELD_OUT, OUTSIDE, REWARD, WITHOUT_NETWORK, Formula, MetricName
from lcsc_opt.metrics.reference.reference import Reference

REPORTED: tuple[Formula, ...] = ("precision", "recall")

BuildReferences = Callable[[], Mapping[str, Reference]]


class ReportMetrics:
    """Which metrics held-out reports have, and what real images get in them.

    Args:
        loss: the loss of the search.
        held_out_metrics: the metrics of the search and those of the settings.
        references: extractor's name in the metrics → its reference. Those that only reports need are added to it, or
            replace the search's, when they are first needed.
        build_references: builds these; ``None`` if there are none.
        device: where distances between features are computed.
    """

    def __init__(
        self,
        loss: Loss,
        held_out_metrics: Sequence[MetricName],
        references: dict[str, Reference],
        *,
        build_references: BuildReferences | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._loss = loss
        self._held_out_metrics = tuple(held_out_metrics)
        self._references = references
        self._build_references = build_references
        self._device = device

    @functools.cached_property
    def _report_references(self) -> Mapping[str, Reference]:
        """The references that only reports need, built once."""
        if self._build_references is None:
            return {}
        built = self._build_references()
        self._references.update(built)
        return built

    @functools.cached_property
    def cross_check_metric(self) -> MetricName | None:
        """The held-out metric that shows whether a gain is real in other features, too; lower is better."""
        distances = [
            metric
            for metric in self._held_out_metrics
            if metric.extractor not in self._loss.extractors and metric.formula in DISTANCES
        ]
        if distances:
            return min(distances, key=lambda metric: DISTANCES.index(metric.formula))
        for name in self._report_references:
            if name not in self._loss.extractors:
                return MetricName("fid", name)
        return None

    @functools.cached_property
    def evaluation_metrics(self) -> tuple[MetricName, ...]:
        """The metrics of held-out reports that are not the loss.

        If a metric is kept, and the loss may have a penalty, the metrics of the loss are among them; so they are if it
        is a sum or has a reward: a sum may fall while a distance in it rises.
        """
        metrics = list(self._held_out_metrics)
        if self.cross_check_metric is not None:
            metrics.append(self.cross_check_metric)
        for name in self._compared_extractors():
            reference = self._report_references.get(name)
            if reference is None or reference.features is None or len(reference.features) <= NEIGHBOURHOOD:
                continue
            metrics += [MetricName(formula, name) for formula in REPORTED]
            if reference.held_out is not None:
                metrics.append(MetricName(FID_HELD_OUT, name))
        if REWARD in self._loss.extractors or len(self._loss.weights) > 1:
            metrics = [*self._loss.weights, *metrics]
        elif self._loss.keep is None:
            metrics = [metric for metric in metrics if metric not in self._loss.weights]
        metrics.append(MetricName(OUTSIDE, OUTSIDE))
        return tuple(dict.fromkeys(metrics))

    def _compared_extractors(self) -> Sequence[str]:
        """The extractors whose features reports compare with those of real images."""
        if self._loss.extractors == (REWARD,):  # which compares with no images
            return list(self._report_references)[:1]
        return [name for name in self._loss.extractors if name not in WITHOUT_NETWORK] or self._loss.extractors

    @property
    def signs(self) -> dict[str, int]:
        """Evaluation metric → 1, or −1 if higher is better."""
        return {str(metric): metric.sign for metric in self.evaluation_metrics}

    def real_halves(self) -> dict[str, float]:
        """Metric → its value for held-out real images in place of samples: about that of a perfect model.

        It is empty if fewer than four images are held out.
        """
        values: dict[str, float] = {}
        feature_metrics: dict[str, FeatureMetrics] = {}
        for metric in self.evaluation_metrics:
            name = metric.extractor
            reference = self._references[name]
            if reference.held_out is None or not metric.needs_reference:
                continue
            held_out_features = reference.held_out.known_features
            if len(held_out_features) <= NEIGHBOURHOOD:
                continue
            if name not in feature_metrics:
                feature_metrics[name] = FeatureMetrics(reference, device=self._device)
                feature_metrics[name].update(torch.from_numpy(held_out_features))
            # The held-out images stand for samples, so their FID to themselves becomes that to the reference.
            formula = "fid" if metric.formula == FID_HELD_OUT else metric.formula
            values[str(metric)] = feature_metrics[name].compute(formula)
        return values
