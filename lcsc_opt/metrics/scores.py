"""The metrics of an evaluation, and the loss that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.errors import MetricError
from lcsc_opt.metrics.build_reference import ReferenceSetting, build_reference, references_by_extractor
from lcsc_opt.metrics.comparison import Comparison, Features
from lcsc_opt.metrics.extractors import build_extractor
from lcsc_opt.metrics.features import ClassifyingExtractor, FeatureExtractor, checked_features, checked_logits
from lcsc_opt.metrics.kernel import SUBSET_SIZE, subset_size
from lcsc_opt.metrics.names import (
    OF_REFERENCE_FEATURES,
    Formula,
    MetricName,
    check_extractor_name,
    parse_loss,
    parse_names,
)
from lcsc_opt.metrics.reference import Reference
from lcsc_opt.metrics.statistics import ReferenceStatistics, reference_warning
from lcsc_opt.progress import notice


@dataclasses.dataclass(frozen=True)
class View:
    """One extractor, and the reference as it sees it; the Inception Score needs no reference."""

    extractor: FeatureExtractor
    reference: Reference | None = None


class Scores:
    """Images → loss and metrics.

    The loss is a weighted sum, in which a metric whose higher values are better counts negative; metrics are
    reported as they are.

    Args:
        views: extractors and references by the extractor's name in the metrics.
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed beside the loss in every evaluation.
        held_out_metrics: computed only where an accumulator is made with ``held_out``.
        device: where distances between features are computed.

    Raises MetricError for an unknown metric, an extractor or a reference that is missing or does not fit, or a metric
    that needs more than mean and covariance of the reference.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        *,
        loss: str | Mapping[str, float] = "fid",
        metrics: Sequence[str] = (),
        held_out_metrics: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self._loss = parse_loss(loss)
        self._metrics = tuple(dict.fromkeys((*self._loss, *parse_names(metrics))))
        self._held_out_metrics = tuple(dict.fromkeys((*self._metrics, *parse_names(held_out_metrics))))
        self._device = device
        self._size_checked = False
        names = dict.fromkeys(metric.extractor for metric in self._held_out_metrics)
        missing = [name for name in names if name not in views]
        if missing:
            raise MetricError(f"no extractor {missing[0]!r} was given, which a metric names")
        self._views = {name: views[name] for name in names}
        for metric in self._held_out_metrics:
            _check(metric, self._views[metric.extractor])

    @classmethod
    def fid(cls, extractor: FeatureExtractor, reference: ReferenceStatistics) -> Scores:
        """The simple case: the loss is FID. Raises MetricError when the two do not belong together."""
        return cls({"inception": View(extractor, Reference.from_statistics(reference))})

    @property
    def extractor(self) -> FeatureExtractor:
        """That of the loss (of its first metric): the one that orders image pairs."""
        return self._views[next(iter(self._loss)).extractor].extractor

    @property
    def dimension(self) -> int:
        """The largest number of features that a metric of a search works with."""
        return max(self._views[metric.extractor].extractor.dimension for metric in self._metrics)

    def accumulator(self, images: int, *, held_out: bool = False) -> Accumulator:
        """Takes the ``images`` of one evaluation, batch by batch."""
        metrics = self._held_out_metrics if held_out else self._metrics
        return Accumulator(self, self._views, metrics, images)

    def loss(self, values: Mapping[MetricName, float]) -> float:
        """The weighted sum of metrics that the search minimizes."""
        return sum(weight * metric.sign * values[metric] for metric, weight in self._loss.items())

    def comparison(self, name: str, features: Features | None, logits: Features | None) -> Comparison:
        """Samples, as the extractor ``name`` sees them, beside its reference."""
        return Comparison(features, logits, self._views[name].reference, device=self._device)

    def warnings(self, images: int) -> list[str]:
        """A line for each thing to know about metrics of ``images`` samples against these references."""
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

    def describe(self) -> dict[str, Any]:
        """The loss, all metrics, and each extractor's name and reference, for the study's fingerprint."""
        views = {
            name: {"name": view.extractor.name, "reference": view.reference and view.reference.identity}
            for name, view in sorted(self._views.items())
        }
        return {
            "loss": {str(metric): weight for metric, weight in self._loss.items()},
            "metrics": sorted(str(metric) for metric in self._metrics),
            "held_out_metrics": sorted(str(metric) for metric in self._held_out_metrics),
            "extractors": views,
        }


class Accumulator:
    """Takes the images of one evaluation; every extractor sees each image once.

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
        if self._added + len(images) > self._images:
            raise MetricError(f"more than the {self._images} images that were announced")
        self._scores.notice_size(images)
        with torch.inference_mode():
            for buffers in self._buffers.values():
                buffers.add(images, self._added)
        self._added += len(images)

    def result(self) -> tuple[float, dict[str, float]]:
        """The loss, and every metric by its name. Raises MetricError when images are missing."""
        if self._added != self._images:
            raise MetricError(f"{self._added} images were added and {self._images} announced")
        comparisons = {
            name: self._scores.comparison(name, buffers.features, buffers.logits)
            for name, buffers in self._buffers.items()
        }
        values = {metric: comparisons[metric.extractor].compute(metric.formula) for metric in self._metrics}
        return self._scores.loss(values), {str(metric): value for metric, value in values.items()}


class _Buffers:
    """What one extractor answers: features where a metric compares them, logits for the Inception Score."""

    def __init__(self, extractor: FeatureExtractor, formulas: Set[Formula], images: int) -> None:
        self._extractor, self._images = extractor, images
        self._wants_logits = "is" in formulas
        self.features: Features | None = None
        if formulas - {"is"}:
            self.features = np.empty((images, extractor.dimension), dtype=np.float32)
        self.logits: Features | None = None

    def add(self, images: Tensor, first: int) -> None:
        rows = slice(first, first + len(images))
        if self._wants_logits and isinstance(self._extractor, ClassifyingExtractor):
            features, logits = self._extractor.features_and_logits(images)
            if self.logits is None:
                self.logits = np.empty((self._images, logits.shape[1]), dtype=np.float32)
            self.logits[rows] = checked_logits(self._extractor, logits).float().cpu().numpy()
        else:
            features = self._extractor(images)
        if self.features is not None:
            self.features[rows] = checked_features(self._extractor, features, len(images)).float().cpu().numpy()


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


def build_scores(
    *,
    loss: str | Mapping[str, float] = "fid",
    metrics: Sequence[str] = (),
    held_out_metrics: Sequence[str] = (),
    reference: ReferenceSetting | None = None,
    weights: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
    cache: Path,
) -> Scores:
    """Scores from the settings of a study file; loads the networks and looks at the reference images.

    Args:
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed beside the loss in every evaluation.
        held_out_metrics: computed only on noise that the search does not use.
        reference: a folder, a file or a dataset, for all extractors; or a mapping from extractors to these.
        weights: extractor → file; without one, published weights are downloaded where they are not there yet.
        device: where networks run and distances are computed.
        batch_size: reference images through a network at once.
        cache: a folder for what is computed from the reference.

    Raises MetricError for an unknown metric or extractor, or weights or a reference that cannot be used.
    """
    names = dict.fromkeys((*parse_loss(loss), *parse_names(metrics), *parse_names(held_out_metrics)))
    extractors = list(dict.fromkeys(name.extractor for name in names))
    files = _weights_by_extractor(weights or {}, extractors)
    references = references_by_extractor(reference, extractors)
    views = {}
    for alias in extractors:
        formulas = {name.formula for name in names if name.extractor == alias}
        extractor = build_extractor(alias, weights=files.get(alias), device=device)
        built = None
        if formulas != {"is"}:
            if alias not in references:
                raise MetricError(f"reference: is missing for {alias}; give a folder of images, a file or a dataset")
            built = build_reference(
                references[alias],
                alias,
                extractor,
                features=bool(formulas & OF_REFERENCE_FEATURES),
                batch_size=batch_size,
                cache=cache,
            )
        views[alias] = View(extractor, built)
    return Scores(views, loss=loss, metrics=metrics, held_out_metrics=held_out_metrics, device=device)


def _weights_by_extractor(weights: Mapping[str, str], extractors: Sequence[str]) -> dict[str, Path]:
    for name in weights:
        check_extractor_name(name)
        if name not in extractors:
            notice(f"weights: no metric uses {name}; its file is not read")
    return {name: Path(path).expanduser() for name, path in weights.items()}
