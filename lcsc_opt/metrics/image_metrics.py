"""The loss and all metrics of one evaluation, and the gradient of the loss in the features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import PENALTY, STANDARD_ERROR
from lcsc_opt.metrics.extractors.base import FeatureExtractor, checked_features, seen_images
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.feature_metrics import FeatureMetrics, FeatureState, MetricPlan
from lcsc_opt.metrics.frechet import Array
from lcsc_opt.metrics.loss import Loss, why_no_gradient
from lcsc_opt.metrics.names import TO_HELD_OUT, Formula, MetricName
from lcsc_opt.metrics.reference.reference import Reference

ImageState = dict[str, FeatureState]
"""Extractor's name → the state of its features."""


def extractor_for(reference: Reference, prompts: Sequence[str] | None) -> FeatureExtractor:
    """The extractor of a reference; if that is a reward, one that knows the ``prompts`` of the images it will see."""
    extractor = reference.extractor
    if isinstance(extractor, Reward):
        return extractor.about(prompts)
    return extractor


class ImageMetrics:
    """Collects the images of one evaluation, or of a part of it; every extractor sees each image once.

    Several processes or devices may process a part of the images each::

        metrics = suite.image_metrics(candidate, total)
        for state in states:  # of the parts, in the order of their images
            metrics.merge(state)
        loss, values = metrics.compute()

    The gradient of the loss needs two passes. The features of all images give :meth:`gradients`, d loss / d features.
    Then images are sampled again with a graph, and ``MetricSuite.image_gradient`` leads the gradient back to them.

    Args:
        loss: the loss.
        metrics: all metrics to compute, those of the loss among them.
        references: extractor's name in the metrics → its reference.
        plan: what will be computed of the images; the gradient is that of the loss.
        targets: extractor's name → the shrunk reference, to which some of the loss's distances are.
    """

    def __init__(
        self,
        loss: Loss,
        metrics: Sequence[MetricName],
        references: Mapping[str, Reference],
        plan: MetricPlan,
        targets: Mapping[str, Reference] = MappingProxyType({}),
    ) -> None:
        self.metrics = tuple(metrics)
        self._loss = loss
        self._references = references
        self._plan = plan
        self._formulas: dict[str, set[Formula]] = {}  # by extractor
        for metric in self.metrics:
            self._formulas.setdefault(metric.extractor, set()).add(metric.formula)
        self._features: dict[str, FeatureMetrics] = {}
        for name, formulas in self._formulas.items():
            plan_of_features = dataclasses.replace(plan, gradient=plan.gradient and name in loss.extractors)
            self._features[name] = FeatureMetrics(references[name], plan_of_features, formulas, targets.get(name))

    def update(self, images: Tensor, *, prompts: Sequence[str] | None = None) -> None:
        """Add the features of images ``[B, C, H, W]``, not clipped, and of their ``prompts`` if they have some.

        Raises ObjectiveError if the images are of another size than real ones, MetricError if features are not finite.
        """
        for reference in self._references.values():
            reference.check_size(images)
        with torch.no_grad():  # tensors that extractors keep from inference mode could not be used in a graph
            for name, feature_metrics in self._features.items():
                extractor: Any = extractor_for(feature_metrics.reference, prompts)  # features_and_logits is optional
                seen = seen_images(extractor, images)
                logits = None
                if "is" in self._formulas[name]:
                    features, logits = _features_and_logits(extractor, seen)
                else:
                    features = extractor(seen)
                if self._formulas[name] == {"is"}:  # which needs the logits alone
                    feature_metrics.update(None, logits)
                else:
                    feature_metrics.update(checked_features(extractor, features, len(images)), logits)

    @property
    def state(self) -> ImageState:
        """Everything that was added so far, for :meth:`merge` in another process."""
        return {name: feature_metrics.state for name, feature_metrics in self._features.items()}

    def merge(self, state: ImageState) -> None:
        """Add the images of another part, in the order of all images."""
        for name, feature_metrics in self._features.items():
            feature_metrics.merge(state[name])

    def compute(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name; also the standard error of a kept metric without a bound yet.

        Raises MetricError if the features do not allow it.
        """
        values = {metric: self._value(metric) for metric in self.metrics}
        loss = self._loss.value(values)
        named = {str(metric): value for metric, value in values.items()}
        keep = self._loss.keep
        if keep is not None and self._loss.constraint is None:  # for a yardstick, whose bound has an error
            deviation = self._features[keep.extractor].deviation(keep.formula)
            named[f"{keep}{STANDARD_ERROR}"] = deviation / math.sqrt(self._plan.total)
        return loss, named

    def _value(self, metric: MetricName) -> float:
        return self._features[metric.extractor].compute(metric.formula)

    def without_each_group(self) -> dict[str, tuple[float, ...]]:
        """``loss``, ``unseen``, or a metric's name → its values without one group of samples or of real images each.

        ``unseen`` is what :meth:`unseen` gives. What has no such values, or not only finite ones, is left out; without
        ``intervals`` everything is.
        """
        if not self._plan.intervals:
            return {}
        columns: dict[MetricName, Array] = {}
        for metric in dict.fromkeys((*self.metrics, *self._unseen_terms.values())):
            values = self._features[metric.extractor].without_each_group(metric.formula)
            if values is not None:
                columns[metric] = values
        named = {str(metric): columns[metric] for metric in self.metrics if metric in columns}
        if all(metric in columns for metric in self._loss.metrics):
            named["loss"] = self._losses({metric: columns[metric] for metric in self._loss.metrics})
            if self._unseen_terms:
                named["unseen"] = self._losses(
                    {metric: columns[self._unseen_terms.get(metric, metric)] for metric in self._loss.metrics}
                )
        return {name: tuple(values.tolist()) for name, values in named.items() if np.isfinite(values).all()}

    def _losses(self, columns: Mapping[MetricName, Array]) -> Array:
        """The loss of each row of values of its metrics: ``[2 G]``, or ``[G]`` if no metric compares with real images.

        Without a group of real images, a metric that does not compare with them has the mean of its other values.
        """
        length = max(map(len, columns.values()))
        padded = {
            metric: np.concatenate([column, np.full(length - len(column), column.mean())])
            for metric, column in columns.items()
        }
        losses = [
            self._loss.value({metric: float(column[at]) for metric, column in padded.items()}) for at in range(length)
        ]
        return np.array(losses)

    def gradients(self, keep_weight: float | None = None) -> dict[str, Array]:
        """Extractor's name → the derivative of the loss in its features, ``[N, D]`` float64.

        Called before :meth:`compute`, both share one decomposition.

        Args:
            keep_weight: the weight of the kept metric's guide in the sum. With 1, its value at the yardstick counts as
                much as the loss there. ``None`` gives the guide the weight of the penalty, if there is one.

        Raises:
            MetricError: a metric of the loss has no gradient, or its features were not kept.
        """
        reason = why_no_gradient(self._loss.weights)
        if reason:
            raise MetricError(f"{reason}; use another loss, or search without gradients")
        weights = self._gradient_weights(keep_weight)
        gradients: dict[str, Array] = {}
        for metric, weight in weights.items():
            term = weight * metric.sign * self._features[metric.extractor].gradient(metric.formula)
            gradients[metric.extractor] = gradients.get(metric.extractor, 0) + term
        return gradients

    def _gradient_weights(self, keep_weight: float | None) -> dict[MetricName, float]:
        """Metric → its weight in the gradient: the weights of the loss, and that of the kept metric's guide."""
        weights = dict(self._loss.weights)
        keep = self._loss.keep
        constraint = self._loss.constraint
        if keep is None or constraint is None:
            return weights
        self._features[keep.extractor].gradient(keep.guide.formula)  # first, since it computes the value, too
        if keep_weight is None:
            keep_weight = 0.0
            if constraint.yardstick.penalty(self._value(keep)) > 0:
                keep_weight = PENALTY
        weights[keep.guide] = weights.get(keep.guide, 0.0) + keep_weight * constraint.scale
        return weights

    def violation(self) -> float | None:
        """By how many standard errors the kept metric is worse than its bound; ``None`` without a bound."""
        if self._loss.keep is None or self._loss.constraint is None:
            return None
        return self._loss.constraint.violation(self._value(self._loss.keep), self._plan.total)

    @property
    def _unseen_terms(self) -> dict[MetricName, MetricName]:
        """Distance in the loss → the same distance to the held-out real images; empty if one has no such images."""
        distances = [metric for metric in self._loss.weights if metric.formula in TO_HELD_OUT]
        if any(self._references[metric.extractor].held_out is None for metric in distances):
            return {}
        return {metric: MetricName(TO_HELD_OUT[metric.formula], metric.extractor) for metric in distances}

    def unseen(self) -> float | None:
        """The loss with its distances to the held-out real images in place of the reference.

        ``None`` if it has no such distance, or no real images are held out.
        """
        unseen_terms = self._unseen_terms
        if not unseen_terms:
            return None
        values = {metric: self._value(unseen_terms.get(metric, metric)) for metric in self._loss.metrics}
        return self._loss.value(values)


def _features_and_logits(extractor: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, D]`` features, and ``[B, classes]`` logits of float32 or float64."""
    features, logits = extractor.features_and_logits(images)
    if not bool(torch.isfinite(logits).all()):
        raise MetricError(f"extractor {extractor.name}: logits are not finite")
    return features, logits.to(torch.promote_types(logits.dtype, torch.float32))
