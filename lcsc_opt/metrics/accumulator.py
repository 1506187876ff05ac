"""The images of one evaluation, batch by batch: their features, and what the loss and its gradient make of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.errors import MetricError
from lcsc_opt.metrics.comparison import Comparison, Features
from lcsc_opt.metrics.features import (
    ClassifyingExtractor,
    FeatureExtractor,
    checked_features,
    checked_logits,
    full_precision,
)
from lcsc_opt.metrics.names import Formula, MetricName

if TYPE_CHECKING:
    from lcsc_opt.metrics.scores import Scores, View


class Accumulator:
    """Takes the images of one evaluation; every extractor sees each image once.

    The gradient of the loss needs two passes where all images do not fit into one batch::

        for images in batches:  accumulator.add(images)                              # without a graph
        gradients = accumulator.loss_gradients()                                     # d loss / d features
        for images in batches:  images.backward(scores.image_gradient(images, ...))  # sampled again, with a graph

    and one where they do::

        features = accumulator.add_with_graph(images)
        torch.autograd.backward([...features], [...accumulator.loss_gradients()])

    Args:
        scores: make the loss.
        views: extractors and references by name.
        metrics: what to compute.
        images: how many will be added.
    """

    def __init__(self, scores: Scores, views: Mapping[str, View], metrics: Sequence[MetricName], images: int) -> None:
        self._scores, self._metrics, self._images = scores, metrics, images
        self._added = 0
        formulas: dict[str, set[Formula]] = {}
        for metric in metrics:
            formulas.setdefault(metric.extractor, set()).add(metric.formula)
        self._buffers = {name: _Buffers(views[name].extractor, wanted, images) for name, wanted in formulas.items()}

    def add(self, images: Tensor) -> None:
        """Take the features of ``[B, C, H, W]`` in [−1, 1].

        Raises MetricError when features are not finite, or when there are more images than were announced.
        """
        rows = self._next_rows(images)
        with torch.no_grad():  # inference mode would save nothing, and what extractors keep from it fits into no graph
            for buffers in self._buffers.values():
                buffers.add(images, rows)
        self._added += len(images)

    def add_with_graph(self, images: Tensor) -> dict[str, Tensor]:
        """Take the features of ``[B, C, H, W]`` in [−1, 1], which have a graph, and give those of the loss with it.

        Returns:
            Extractor's name → features ``[B, D]``, as :meth:`Scores.differentiable_features` gives them.

        Raises MetricError as :meth:`add`, and when a metric of the loss or an extractor has no gradient.
        """
        rows = self._next_rows(images)
        features = {name: self._scores.differentiable_features(name, images) for name in self._scores.loss_extractors}
        with torch.no_grad():
            for name, buffers in self._buffers.items():
                buffers.add(images, rows, known=features.get(name))
        self._added += len(images)
        return features

    def result(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name. Raises MetricError when images are missing."""
        comparisons = self._comparisons
        values = {metric: comparisons[metric.extractor].compute(metric.formula) for metric in self._metrics}
        return self._scores.loss(values), {str(metric): value for metric, value in values.items()}

    def loss_gradients(self) -> dict[str, Tensor]:
        """Extractor's name → the derivative of the loss in its features, ``[N, D]``, in their type and on their device.

        Where it is asked for before :meth:`result`, both share one decomposition. Raises MetricError when images are
        missing, or when a metric of the loss has no gradient.
        """
        gradients = self._scores.loss_gradients(self._comparisons)
        return {name: self._buffers[name].as_features(gradient) for name, gradient in gradients.items()}

    def _next_rows(self, images: Tensor) -> slice:
        last = self._added + len(images)
        if last > self._images:
            raise MetricError(f"more than the {self._images} images that were announced")
        self._scores.notice_size(images)
        return slice(self._added, last)

    @property
    def _comparisons(self) -> Mapping[str, Comparison]:
        if self._added != self._images:
            raise MetricError(f"{self._added} images were added and {self._images} announced")
        return self._complete_comparisons

    @cached_property
    def _complete_comparisons(self) -> dict[str, Comparison]:
        return {
            name: self._scores.comparison(name, buffers.features, buffers.logits)
            for name, buffers in self._buffers.items()
        }


class _Buffers:
    """What one extractor answers: features where a metric compares them, logits for the Inception Score."""

    def __init__(self, extractor: FeatureExtractor, formulas: Set[Formula], images: int) -> None:
        self._extractor, self._images = extractor, images
        self._wants_features, self._wants_logits = bool(formulas - {"is"}), "is" in formulas
        self._like = torch.empty(0)
        self.features: Features | None = None
        self.logits: Features | None = None

    def add(self, images: Tensor, rows: slice, *, known: Tensor | None = None) -> None:
        """Ask the extractor about ``images``, unless their features are ``known`` and nothing else is wanted."""
        features = known
        if self._wants_logits and isinstance(self._extractor, ClassifyingExtractor):
            answered, logits = self._extractor.features_and_logits(images)
            features = answered if features is None else features
            self.logits = self._filled(self.logits, checked_logits(self._extractor, logits), rows)
        elif features is None:
            features = self._extractor(images)
        if self._wants_features and features is not None:
            self._like = full_precision(features.new_empty(0))
            self.features = self._filled(self.features, checked_features(self._extractor, features, len(images)), rows)

    def as_features(self, gradient: Features) -> Tensor:
        """``gradient`` in the type and on the device of the features."""
        return torch.from_numpy(gradient).to(self._like)

    def _filled(self, buffer: Features | None, part: Tensor, rows: slice) -> Features:
        """``buffer``, made when it is first needed, with ``part`` in its ``rows``."""
        array: Features = full_precision(part.detach()).cpu().numpy()
        if buffer is None:
            buffer = np.empty((self._images, array.shape[1]), dtype=array.dtype)
        buffer[rows] = array
        return buffer
