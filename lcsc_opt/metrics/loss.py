"""The loss of a search: a weighted sum of metrics in the features of extractors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.comparison import DIFFERENTIATED, Comparison, Features, Samples
from lcsc_opt.metrics.extractors.base import FeatureExtractor, features_with_graph, image_gradient
from lcsc_opt.metrics.keeping import Baseline
from lcsc_opt.metrics.names import Formula, MetricName
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.statistics import Array


@dataclasses.dataclass(frozen=True)
class View:
    """An extractor and the reference in its features; the Inception Score needs no reference."""

    extractor: FeatureExtractor
    reference: Reference | None = None


LossScale = Literal["trace"]
TRACE_POWERS: Mapping[Formula, float] = {"fid": 1.0, "clusters": 1.0, "sliced": 1.0, "near": 0.5}
"""Formula → the power of the trace of the features' covariance with which it grows. Other formulas do not have the
unit of features."""


def scaled_by_trace(weights: Mapping[MetricName, float], views: Mapping[str, View]) -> dict[MetricName, float]:
    """The weights of distances over the trace of the real images' covariance, in the unit of each distance.

    A feature space then counts the same whatever the unit of its features.

    Raises MetricError where all real images look alike in a space.
    """
    scaled = dict(weights)
    for metric in weights:
        power, reference = TRACE_POWERS.get(metric.formula), views[metric.extractor].reference
        if power is None or reference is None:
            continue
        trace = float(np.trace(reference.statistics.cov))
        if trace <= 0:
            raise MetricError(f"loss_scale: trace: {metric} sees no difference between real images; leave it out")
        scaled[metric] = weights[metric] / trace**power
    return scaled


def why_no_gradient(loss: Iterable[MetricName]) -> str | None:
    """Why a sum of these metrics has no gradient in the features, as one clause; ``None`` if it has one."""
    for metric in loss:
        if metric.formula not in DIFFERENTIATED:
            return f"{metric} in the loss has no gradient, only {', '.join(DIFFERENTIATED)} have one"
    return None


class Loss:
    """A weighted sum of metrics, lower is better, and the way back from it to features and images.

    Args:
        weights: metric → its weight in the sum.
        views: by the extractor's name in the metrics, also for metrics beside the loss.
        device: where distances between features are computed.
        keep: a metric that may not get worse than at EMA*.

    Attributes:
        baseline: the bound of the kept metric; ``None`` while it is not known, and nothing is bounded.
    """

    def __init__(
        self,
        weights: Mapping[MetricName, float],
        views: Mapping[str, View],
        device: torch.device | str = "cpu",
        *,
        keep: MetricName | None = None,
    ) -> None:
        self.weights, self._views, self._device = weights, views, device
        self.keep = keep
        self.baseline: Baseline | None = None
        self._size_checked = False

    @property
    def extractors(self) -> tuple[str, ...]:
        """The names of the extractors whose features the loss is made of."""
        kept = () if self.keep is None else (self.keep,)
        return tuple(dict.fromkeys(metric.extractor for metric in (*self.weights, *kept)))

    @property
    def extractor_names(self) -> dict[str, str]:
        """Extractor's name in the metrics → its own name, which identifies its weights. Only extractors that are
        built.
        """
        return {name: view.extractor.name for name, view in self._views.items()}

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, as one clause; ``None`` where the loss has a gradient in the features."""
        return why_no_gradient(self.weights)

    def value(self, values: Mapping[MetricName, float], images: int) -> float:
        """The loss for this many images: the weighted sum of metrics, and the penalty of the kept one."""
        penalty = 0.0
        if self.keep is not None and self.baseline is not None:
            penalty = self.baseline.penalty(values[self.keep], images)
        return sum(weight * metric.sign * values[metric] for metric, weight in self.weights.items()) + penalty

    def gradients(
        self, comparisons: Mapping[str, Comparison], images: int, keep_weight: float | None = None
    ) -> dict[str, Array]:
        """Extractor's name → the derivative of the loss in the features ``[N, D]`` of its comparison, float64.

        Args:
            comparisons: by the extractor's name.
            images: N.
            keep_weight: the weight of the kept metric in the sum, in place of its penalty. With 1, its value at EMA*
                counts as much as the loss at EMA*.

        Raises:
            MetricError: a metric of the loss has no gradient.
        """
        if reason := self.why_no_gradient():
            raise MetricError(f"{reason}; take another loss, or search without gradients")
        gradients: dict[str, Array] = {}
        weights = dict(self.weights)
        if self.keep is not None and self.baseline is not None:
            # the gradient first: it computes the value, too
            comparisons[self.keep.extractor].gradient(self.keep.formula)
            value = comparisons[self.keep.extractor].compute(self.keep.formula)
            slope = (
                self.baseline.penalty_slope(value, images) if keep_weight is None else keep_weight * self.baseline.scale
            )
            weights[self.keep] = weights.get(self.keep, 0.0) + slope
        for metric, weight in weights.items():
            part = weight * metric.sign * comparisons[metric.extractor].gradient(metric.formula)
            gradients[metric.extractor] = gradients.get(metric.extractor, 0) + part
        return gradients

    def comparison(self, name: str, samples: Samples | None, logits: Features | None) -> Comparison:
        """The samples beside the reference, both in the features of the extractor ``name``."""
        return Comparison(samples, logits, self._views[name].reference, device=self._device)

    def differentiable_features(self, name: str, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of the extractor ``name``, with the graph that leads back to ``images`` [B, C, H, W].

        They are the features that an accumulator takes; the gradient passes unchanged through the rounding to bytes.
        Raises MetricError when the images have no graph, or when the extractor cuts it.
        """
        return features_with_graph(self._views[name].extractor, images)

    def image_gradient(self, images: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """The derivative of the loss in ``images``: ``[B, C, H, W]``, in their type and on their device.

        Args:
            images: ``[B, C, H, W]`` in [−1, 1]; their own graph is not followed.
            gradients: the rows ``[B, D]`` of these images out of :meth:`Accumulator.loss_gradients`.

        Raises:
            MetricError: an extractor cuts the graph.
        """
        parts = [image_gradient(self._views[name].extractor, images, rows) for name, rows in gradients.items()]
        return torch.stack(parts).sum(dim=0)

    def notice_size(self, images: Tensor) -> None:
        """Say once when samples ``[B, C, H, W]`` have another size than the reference images."""
        if self._size_checked:
            return
        self._size_checked = True
        size = (images.shape[-2], images.shape[-1])
        for name, view in self._views.items():
            real = None if view.reference is None else view.reference.size
            if real is not None and real != size:
                notice(
                    f"{name}: samples are {size[0]}x{size[1]} and reference images {real[0]}x{real[1]}; the extractor "
                    "scales both to its own size, and nothing else is done about it"
                )
