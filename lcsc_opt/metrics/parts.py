"""An evaluation whose images are spread over processes or devices: its parts, and the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.comparison import Comparison, Features, Samples
from lcsc_opt.metrics.judges import FDR, frechet_ratio
from lcsc_opt.metrics.keeping import Baseline
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import MetricName
from lcsc_opt.metrics.statistics import Array, FeatureStatistics


@dataclasses.dataclass(frozen=True, eq=False)
class SeenPart:
    """What one extractor gives for the images of a part.

    Attributes:
        extractor: its name, which identifies its weights.
        samples: features ``[n, D]`` in the order of the images, or their statistics where these are enough.
        logits: ``[n, classes]`` for the Inception Score, else ``None``.
    """

    extractor: str
    samples: Samples | None
    logits: Features | None


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturePart:
    """A part of an evaluation: what some of its images give. It can be pickled, and holds only numpy arrays.

    Attributes:
        count: images in this part.
        total: images of the whole evaluation.
        metrics: the metrics of the whole evaluation.
        seen: by the extractor's name in the metrics.
    """

    count: int
    total: int
    metrics: tuple[MetricName, ...]
    seen: Mapping[str, SeenPart]


class WholeEvaluation:
    """All parts of an evaluation beside the references. Loss and gradient share what they have in common.

    Args:
        loss: the weighted sum of metrics.
        parts: in the order of their images.
        splits: FID of real images to real images by the extractor's name, where FDr is computed, too.

    Raises:
        MetricError: they are not all parts of one evaluation.
    """

    def __init__(self, loss: Loss, parts: Sequence[FeaturePart], splits: Mapping[str, float] | None = None) -> None:
        check_parts(parts, loss.extractor_names)
        self._loss, self._parts, self._splits = loss, parts, splits or {}
        self._comparisons: dict[str, Comparison] = {}

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """The metrics that are computed."""
        return self._parts[0].metrics

    def result(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name.

        Raises:
            MetricError: the features do not allow it.
        """
        values = {m: self._comparison(m.extractor).compute(m.formula) for m in self.metrics}
        loss = self._loss.value(values, self._parts[0].total)
        metrics = {str(metric): value for metric, value in values.items()}
        if self._splits:
            distances = {name: self._comparison(name).compute("fid") for name in self._splits}
            metrics[FDR] = frechet_ratio(distances, self._splits)
        return loss, metrics

    def excess(self) -> float | None:
        """By how many standard errors the kept metric is above its value at EMA*; ``None`` where none is kept."""
        keep, baseline = self._loss.keep, self._loss.baseline
        if keep is None or baseline is None:
            return None
        return baseline.excess(self._comparison(keep.extractor).compute(keep.formula), self._parts[0].total)

    def baseline(self, keep: MetricName) -> Baseline:
        """The baseline of the kept metric; these must be the images of EMA*."""
        comparison = self._comparison(keep.extractor)
        return Baseline(self.result()[0], comparison.compute(keep.formula), comparison.deviation(keep.formula))

    def loss_gradients(self, keep_weight: float | None = None) -> dict[str, Array]:
        """Extractor's name → the derivative of the loss in its features, ``[N, D]`` float64.

        ``keep_weight`` is that of :meth:`Loss.gradients`. Called before :meth:`result`, both share one decomposition.

        Raises:
            MetricError: a metric of the loss has no gradient, or its features were not kept.
        """
        comparisons = {name: self._comparison(name) for name in self._loss.extractors}
        return self._loss.gradients(comparisons, self._parts[0].total, keep_weight)

    def _comparison(self, name: str) -> Comparison:
        if name not in self._comparisons:
            self._comparisons[name] = self._loss.comparison(name, *_joined([part.seen[name] for part in self._parts]))
        return self._comparisons[name]


def check_parts(parts: Sequence[FeaturePart], extractors: Mapping[str, str]) -> None:
    """Raise MetricError unless these are all parts of one evaluation.

    Args:
        parts: to check.
        extractors: name in the metrics → the extractor's own name, of those that are known here.
    """
    if not parts:
        raise MetricError("parts: there are none; give all parts of one evaluation")
    first = parts[0]
    for part in parts:
        if part.metrics != first.metrics:
            raise MetricError(
                f"parts: one is for {_listed(part)} and one for {_listed(first)}; make all with the same metrics and "
                "the same held_out"
            )
        if part.total != first.total:
            raise MetricError(
                f"parts: of evaluations of {first.total} and of {part.total} images; give the parts of one evaluation"
            )
        for name, seen in part.seen.items():
            known = extractors.get(name, first.seen[name].extractor)
            if seen.extractor != known:
                raise MetricError(
                    f"parts: {name} is {seen.extractor} for one and {known} for others; give all the same weights"
                )
    count = sum(part.count for part in parts)
    if count != first.total:
        raise MetricError(f"parts: hold {count} images of {first.total}; give all parts of the evaluation, each once")


def _listed(part: FeaturePart) -> str:
    return ", ".join(str(metric) for metric in part.metrics)


def _joined(seen: Sequence[SeenPart]) -> tuple[Samples | None, Features | None]:
    """Samples and logits of all parts."""
    samples = [one.samples for one in seen if one.samples is not None]
    logits = [one.logits for one in seen if one.logits is not None]
    return _joined_samples(samples), _concatenated(logits)


def _joined_samples(samples: Sequence[Samples]) -> Samples | None:
    statistics = [one for one in samples if isinstance(one, FeatureStatistics)]
    features = [one for one in samples if not isinstance(one, FeatureStatistics)]
    if statistics and features:
        raise MetricError("parts: some keep features for a gradient and some do not; make all with the same gradient")
    return FeatureStatistics.merged(statistics) if statistics else _concatenated(features)


def _concatenated(arrays: Sequence[Features]) -> Features | None:
    if len(arrays) < 2:
        return arrays[0] if arrays else None
    return np.concatenate(arrays, dtype=np.result_type(*arrays))
