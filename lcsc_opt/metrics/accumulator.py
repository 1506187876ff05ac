"""Takes the images of one evaluation, batch by batch: their features, then the loss and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.comparison import Features
from lcsc_opt.metrics.extractors.base import (
    ClassifyingExtractor,
    FeatureExtractor,
    checked_features,
    checked_logits,
    full_precision,
)
from lcsc_opt.metrics.loss import Loss, View
from lcsc_opt.metrics.names import OF_REFERENCE_FEATURES, Formula, MetricName
from lcsc_opt.metrics.parts import FeaturePart, SeenPart, WholeEvaluation
from lcsc_opt.metrics.statistics import FeatureStatistics


class Accumulator:
    """Takes the images of one evaluation, or of a part of it; every extractor sees each image once.

    Where an extractor is used for FID alone, and there are at least D images, its features are reduced to count, mean
    and scatter on its device, batch by batch. Else features are kept: the gradient and metrics of single images need
    them, and fewer than D of them take less memory than a scatter.

    Several processes or devices may take a part of the images each; the parts are joined::

        parts = [accumulator.part() for each]  # each accumulator made with total=, the images of all
        loss, metrics = scores.whole(parts).result()

    The gradient of the loss needs two passes. The features of all images give the gradient of the loss in the features.
    Then images are sampled again with a graph, which leads the gradient back. The last batch keeps its graph between
    the passes::

        accumulator = scores.accumulator(count, gradient=True)
        for images in batches[:-1]:
            accumulator.add(images)
        features = accumulator.add_with_graph(batches[-1])
        gradients = accumulator.loss_gradients()  # d loss / d features, [N, D]
        torch.autograd.backward([*features.values()], [rows of the last batch in gradients[name] for name in features])
        for images in batches[:-1], sampled again:
            rows = {name: their rows in gradients[name] for name in features}
            images.backward(scores.loss.image_gradient(images, rows))
        loss, metrics = accumulator.result()

    Args:
        loss: the weighted sum of metrics.
        views: extractors and references by name.
        metrics: what to compute.
        images: how many will be added here.
        total: how many the whole evaluation has; ``None`` where these are all.
        gradient: keep the features that the gradient of the loss needs.
        splits: as of :class:`WholeEvaluation`.

    Raises:
        MetricError: ``images`` is below 1, or above ``total``.
    """

    def __init__(
        self,
        loss: Loss,
        views: Mapping[str, View],
        metrics: Sequence[MetricName],
        images: int,
        *,
        total: int | None = None,
        gradient: bool = False,
        splits: Mapping[str, float] | None = None,
    ) -> None:
        self._loss, self._metrics, self._images, self._splits = loss, tuple(metrics), images, splits
        self._total = images if total is None else total
        if images < 1 or images > self._total:
            most = "" if total is None else f", and at most the {total} of the evaluation"
            raise MetricError(f"images: expected at least 1{most}, got {images}")
        self._added = 0
        formulas: dict[str, set[Formula]] = {}
        for metric in metrics:
            formulas.setdefault(metric.extractor, set()).add(metric.formula)
        differentiated = loss.extractors if gradient else ()
        self._seen = {
            name: _Seen(views[name].extractor, wanted, images, self._total, gradient=name in differentiated)
            for name, wanted in formulas.items()
        }

    def add(self, images: Tensor) -> None:
        """Take the features of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: features are not finite, or there are more images than were announced.
        """
        rows = self._next_rows(images)
        with torch.no_grad():  # tensors that extractors keep from inference mode could not be used in a graph
            for seen in self._seen.values():
                seen.add(images, rows)
        self._added += len(images)

    def add_with_graph(self, images: Tensor) -> dict[str, Tensor]:
        """Take the features of ``[B, C, H, W]`` in [−1, 1], and return those that the loss uses, with a graph.

        Returns:
            Extractor's name → features ``[B, D]``, as :meth:`Loss.differentiable_features` gives them.

        Raises:
            MetricError: as :meth:`add`, and when a metric of the loss or an extractor has no gradient.
        """
        rows = self._next_rows(images)
        features = {name: self._loss.differentiable_features(name, images) for name in self._loss.extractors}
        with torch.no_grad():
            for name, seen in self._seen.items():
                seen.add(images, rows, known=features.get(name))
        self._added += len(images)
        return features

    def part(self) -> FeaturePart:
        """The part of the evaluation that these images make.

        Raises:
            MetricError: images are missing.
        """
        if self._added != self._images:
            raise MetricError(f"{self._added} images were added and {self._images} announced")
        seen = {name: one.part() for name, one in self._seen.items()}
        return FeaturePart(self._images, self._total, self._metrics, seen)

    def result(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name.

        Raises:
            MetricError: images are missing.
        """
        return self._whole.result()

    def loss_gradients(self) -> dict[str, Tensor]:
        """Extractor's name → the derivative of the loss in its features, ``[N, D]``, in their type and on their device.

        Called before :meth:`result`, both share one decomposition.

        Raises:
            MetricError: images are missing, a metric of the loss has no gradient, or its features were not
                kept.
        """
        gradients = self._whole.loss_gradients()
        return {name: self._seen[name].as_features(gradient) for name, gradient in gradients.items()}

    def _next_rows(self, images: Tensor) -> slice:
        last = self._added + len(images)
        if last > self._images:
            raise MetricError(f"more than the {self._images} images that were announced")
        self._loss.notice_size(images)
        return slice(self._added, last)

    @cached_property
    def _whole(self) -> WholeEvaluation:
        return WholeEvaluation(self._loss, [self.part()], self._splits)


class _Seen:
    """What one extractor gives: features or, where these are enough, their statistics; logits for the Inception Score.

    Args:
        extractor: the network.
        formulas: the formulas of the metrics in its features.
        images: how many will be added.
        total: how many the whole evaluation has.
        gradient: keep the features in any case.
    """

    def __init__(
        self, extractor: FeatureExtractor, formulas: Set[Formula], images: int, total: int, *, gradient: bool
    ) -> None:
        self._extractor, self._images = extractor, images
        self._wants_features, self._wants_logits = bool(formulas - {"is"}), "is" in formulas
        keeps = gradient or bool(formulas & OF_REFERENCE_FEATURES) or total < extractor.dimension
        self._reduction = Reduction() if self._wants_features and not keeps else None
        self._like = torch.empty(0)
        self._features: Features | None = None
        self._logits: Features | None = None

    def add(self, images: Tensor, rows: slice, *, known: Tensor | None = None) -> None:
        """Run the extractor on ``images``, unless their features are ``known`` and nothing else is needed."""
        features = known
        if self._wants_logits and isinstance(self._extractor, ClassifyingExtractor):
            answered, logits = self._extractor.features_and_logits(images)
            features = answered if features is None else features
            self._logits = self._filled(self._logits, checked_logits(self._extractor, logits), rows)
        elif features is None:
            features = self._extractor(images)
        if self._wants_features and features is not None:
            self._add_features(checked_features(self._extractor, features.detach(), len(images)), rows)

    def part(self) -> SeenPart:
        """The part that all images make."""
        samples = self._features if self._reduction is None else self._reduction.statistics()
        return SeenPart(self._extractor.name, samples, self._logits)

    def as_features(self, gradient: Features) -> Tensor:
        """``gradient`` in the type and on the device of the features."""
        return torch.from_numpy(gradient).to(self._like)

    def _add_features(self, features: Tensor, rows: slice) -> None:
        if self._reduction is not None:
            self._reduction.add(full_precision(features))
            return
        self._like = full_precision(features.new_empty(0))
        self._features = self._filled(self._features, features, rows)

    def _filled(self, buffer: Features | None, part: Tensor, rows: slice) -> Features:
        """``buffer``, made when it is first needed, with ``part`` in its ``rows``."""
        array: Features = full_precision(part.detach()).cpu().numpy()
        if buffer is None:
            buffer = np.empty((self._images, array.shape[1]), dtype=array.dtype)
        buffer[rows] = array
        return buffer


BLOCK = 256  # rows of the scatter at once; only blocks from the diagonal on are computed, half of the work


class Reduction:
    """Takes features in batches of any size; holds ``[D, D]`` float64 on their device."""

    def __init__(self) -> None:
        self._count = 0
        self._origin, self._sum, self._scatter = (torch.empty(0) for _ in range(3))

    @torch.inference_mode(mode=False)  # tensors made in inference mode could not be changed outside of it
    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Take ``[B, D]`` of any floating-point type, all batches on one device, without waiting for the device."""
        if not len(features):
            return
        here = features.to(double_device(features.device))
        if self._count == 0:
            self._origin = here.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._origin)
            self._scatter = self._origin.new_zeros(here.shape[1], here.shape[1])
        deviations = here - self._origin  # float64, since one of the two is
        self._sum += deviations.sum(dim=0)
        for start in range(0, here.shape[1], BLOCK):
            rows = deviations[:, start : start + BLOCK]
            self._scatter[start : start + BLOCK, start:].addmm_(rows.T, deviations[:, start:])
        self._count += len(features)

    def statistics(self) -> FeatureStatistics:
        """Count, mean and scatter of all features so far, at least one. More can be added afterwards."""
        scatter = torch.addr(_mirrored(self._scatter), self._sum, self._sum, alpha=-1 / self._count)
        mean = self._origin + self._sum / self._count
        return FeatureStatistics(self._count, mean.cpu().numpy(), scatter.cpu().numpy())


@functools.cache
def double_device(device: torch.device) -> torch.device:
    """``device`` where it can compute in float64, which Apple's GPUs cannot; else the CPU."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def _mirrored(upper: Tensor) -> Tensor:
    """``upper`` [D, D], with the blocks below the diagonal filled in from those above."""
    for start in range(0, len(upper), BLOCK):
        stop = start + BLOCK
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper
