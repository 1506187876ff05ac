"""The loss and all metrics of one evaluation, and the gradient of the loss in the features."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.base import checked_features
from lcsc_opt.metrics.feature_metrics import FeatureMetrics, FeatureState
from lcsc_opt.metrics.frechet import Array
from lcsc_opt.metrics.names import FDR, Formula, MetricName

if TYPE_CHECKING:
    from lcsc_opt.metrics.suite import MetricSuite

ImageState = dict[str, FeatureState]
"""Extractor's name → what a part of the images gave."""

PENALTY = 10.0  # times the loss at EMA*, for a value that is twice the bound


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The bound of the kept metric, and what is measured at EMA* on the noise of the search.

    Attributes:
        loss: EMA*'s loss.
        value: EMA*'s value of the kept metric, or the bound that was given.
        deviation: the standard deviation of the kept metric between images.
        guide: EMA*'s value of the metric whose gradient is followed.
        sign: −1 if higher values of the kept metric are better, else 1.
    """

    loss: float
    value: float
    deviation: float
    guide: float
    sign: float = 1.0

    @property
    def scale(self) -> float:
        """The loss at EMA* divided by the guide there: the factor between their units."""
        return abs(self.loss) / (self.guide or 1.0)

    def violation(self, value: float, images: int) -> float:
        """By how many standard errors, for this many images, ``value`` is worse than the bound."""
        worse, error = self.sign * (value - self.value), self.deviation / math.sqrt(images)
        return worse / error if error > 0 else float(worse > 0)

    def penalty(self, value: float) -> float:
        """What is added to the loss."""
        return PENALTY * abs(self.loss) / (self.value or 1.0) * max(0.0, self.sign * (value - self.value))


class ImageMetrics:
    """Takes the images of one evaluation, or of a part of it; every extractor sees each image once.

    Several processes or devices may take a part of the images each::

        whole = scores.image_metrics(total)
        for state in [part.state for part in parts]:  # in the order of their images
            whole.merge(state)
        loss, metrics = whole.compute()

    The gradient of the loss needs two passes. The features of all images give :meth:`gradients`, d loss / d features.
    Then images are sampled again with a graph, and :meth:`MetricSuite.image_gradient` leads the gradient back to them.

    Args:
        scores: the loss, the metrics, and the references.
        total: how many images the whole evaluation has.
        held_out: whether held-out metrics are computed, too.
        gradient: keep the features that the gradient of the loss needs.
    """

    def __init__(self, scores: MetricSuite, total: int, *, held_out: bool = False, gradient: bool = False) -> None:
        self._scores, self._total = scores, total
        self.metrics = scores.computed(held_out=held_out)
        self._splits = scores.splits if held_out else {}
        self._formulas: dict[str, set[Formula]] = {}
        for metric in self.metrics:
            self._formulas.setdefault(metric.extractor, set()).add(metric.formula)
        self._features: dict[str, FeatureMetrics] = {}
        for name, wanted in self._formulas.items():
            options: Any = {"total": total, "gradient": gradient and name in scores.extractors, "device": scores.device}
            self._features[name] = FeatureMetrics(scores.references[name], wanted, **options)

    def update(self, images: Tensor, *, prompts: Sequence[str] | None = None) -> None:
        """Take the features of ``[B, C, H, W]`` in [−1, 1], and of their ``prompts`` if they have some.

        Raises MetricError if features are not finite.
        """
        with torch.no_grad():  # tensors that extractors keep from inference mode could not be used in a graph
            for name, metrics in self._features.items():
                extractor: Any = self._scores.extractor_of(name, prompts)
                logits = None
                if "is" in self._formulas[name]:
                    features, logits = extractor.features_and_logits(images)
                    if not bool(torch.isfinite(logits).all()):
                        raise MetricError(f"extractor {extractor.name}: logits are not finite")
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                else:
                    features = extractor(images)
                wanted = self._formulas[name] != {"is"}
                metrics.update(checked_features(extractor, features, len(images)) if wanted else None, logits)

    @property
    def state(self) -> ImageState:
        """Everything that was taken so far, for :meth:`merge` in another process."""
        return {name: metrics.state for name, metrics in self._features.items()}

    def merge(self, state: ImageState) -> None:
        """Add the images of another part, in the order of all images."""
        for name, metrics in self._features.items():
            metrics.merge(state[name])

    def compute(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name. Raises MetricError if the features do not allow it."""
        scores = self._scores
        values = {m: self._features[m.extractor].compute(m.formula) for m in self.metrics}
        penalty = 0.0
        if scores.keep is not None and scores.constraint is not None:
            penalty = scores.constraint.penalty(values[scores.keep])
        loss = sum(weight * metric.sign * values[metric] for metric, weight in scores.weights.items()) + penalty
        metrics = {str(metric): value for metric, value in values.items()}
        if self._splits:
            splits = self._splits.items()
            metrics[FDR] = statistics.fmean(self._features[name].compute("fid") / split for name, split in splits)
        return loss, metrics

    def gradients(self, keep_weight: float | None = None) -> dict[str, Array]:
        """Extractor's name → the derivative of the loss in its features, ``[N, D]`` float64.

        Called before :meth:`compute`, both share one decomposition.

        Args:
            keep_weight: the weight of the kept metric's guide in the sum. With 1, its value at EMA* counts as much as
                the loss at EMA*. ``None`` gives the guide the weight of the penalty, if there is one.

        Raises:
            MetricError: a metric of the loss has no gradient, or its features were not kept.
        """
        scores = self._scores
        if reason := MetricName.why_no_gradient(scores.weights):
            raise MetricError(f"{reason}; take another loss, or search without gradients")
        weights = dict(scores.weights)
        if scores.keep is not None and scores.constraint is not None:
            guide, kept = scores.keep.guide, self._features[scores.keep.extractor]
            kept.gradient(guide.formula)  # it computes the value, too
            if keep_weight is None:
                penalty = scores.constraint.penalty(kept.compute(scores.keep.formula))
                keep_weight = PENALTY if penalty > 0 else 0.0
            weights[guide] = weights.get(guide, 0.0) + keep_weight * scores.constraint.scale
        gradients: dict[str, Array] = {}
        for metric, weight in weights.items():
            part = weight * metric.sign * self._features[metric.extractor].gradient(metric.formula)
            gradients[metric.extractor] = gradients.get(metric.extractor, 0) + part
        return gradients

    def violation(self) -> float | None:
        """By how many standard errors the kept metric is worse than its bound; ``None`` if none is kept."""
        keep, constraint = self._scores.keep, self._scores.constraint
        if keep is None or constraint is None:
            return None
        return constraint.violation(self._features[keep.extractor].compute(keep.formula), self._total)

    def unseen(self, loss: float) -> float | None:
        """The loss of :meth:`compute` with each FID to the held-out real images in place of that to the reference.

        ``None`` if it has no FID, or no real images are held out.
        """
        weights = [(self._features[m.extractor], w) for m, w in self._scores.weights.items() if m.formula == "fid"]
        if not weights or any(features.reference.held_out is None for features, _ in weights):
            return None
        return loss + sum(w * (found.compute("fid_held_out") - found.compute("fid")) for found, w in weights)

    def constraint(self) -> Constraint:
        """The bound of the kept metric; these must be the images of EMA*."""
        keep = self._scores.keep
        assert keep is not None
        kept, loss = self._features[keep.extractor], self.compute()[0]
        value, guide = kept.compute(keep.formula), kept.compute(keep.guide.formula)
        return Constraint(loss, value, kept.deviation(keep.formula), guide, keep.sign)
