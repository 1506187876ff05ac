"""The loss of a search, the metrics that are reported with it, and the references that they compare with.

Held-out reports have metrics that show what a search may lose while its loss falls. Precision and recall tell fidelity
and diversity apart, ``near`` measures single images, ``sliced`` is a distance other than FID, and FID in features that
the loss does not use shows whether a gain is real. ``fdr`` is FID in all feature spaces as one number. If real images
are held out, there are also FID to these, the share of samples that are nearer to an image of the reference than to any
held-out one, and authenticity. Most need the features of the real images, which a file of statistics does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import NEIGHBOURHOOD
from lcsc_opt.metrics.extractors.base import FeatureExtractor, image_gradient
from lcsc_opt.metrics.extractors.rewards import Reward, Thumbnails
from lcsc_opt.metrics.feature_metrics import FeatureMetrics
from lcsc_opt.metrics.frechet import FrechetReference, Moments
from lcsc_opt.metrics.image_metrics import Constraint, ImageMetrics
from lcsc_opt.metrics.names import (
    DISTANCES,
    FDR,
    HELD_OUT_REWARD,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    REWARD,
    Formula,
    Kept,
    MetricName,
)
from lcsc_opt.metrics.reference.reference import Reference

REPORTED: tuple[Formula, ...] = ("precision", "recall", "sliced", "near")
REPORTED_WITH_HELD_OUT: tuple[Formula, ...] = ("fid_held_out", "nearer_train", "authenticity")
FEWEST_SPLIT = 4  # images: a covariance of each half


class MetricSuite:
    """Images → loss and metrics.

    The loss is a weighted sum, in which metrics are subtracted where higher is better; metrics are reported as they
    are.

    Args:
        references: extractor's name in the metrics → its reference. ``reward`` and ``held_out_reward`` are reported if
            they are among them; with a reward in the loss, ``spread`` is, too.
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed with the loss in every evaluation.
        held_out_metrics: computed only in held-out reports.
        keep: a metric that may not get worse than at EMA*, or metric → bound: ``precision``, ``near``, ``hinge``.
        device: where distances between features are computed.
        report_references: builds references that only held-out reports need, when they are first needed. For an
            extractor of the loss it takes the place of the one in ``references``, and the metrics of :data:`REPORTED`
            are in reports. In another extractor FID is. These metrics decide nothing, and are no part of the
            description.

    Attributes:
        weights: metric → its weight in the sum.
        keep: the metric that is kept.
        bound: its worst value; ``None`` for EMA*'s.
        extractors: the names of the extractors whose features the loss is made of.
        constraint: its bound; ``None`` while it is not known, and nothing is bounded.

    Raises:
        MetricError: for an unknown metric, a reference that is missing, or a metric that needs more than mean and
            covariance of it.
    """

    def __init__(
        self,
        references: Mapping[str, Reference],
        *,
        loss: str | Mapping[str, float] = "fid",
        metrics: Sequence[str] = (),
        held_out_metrics: Sequence[str] = (),
        keep: Kept | None = None,
        device: torch.device | str = "cpu",
        report_references: Callable[[], Mapping[str, Reference]] | None = None,
    ) -> None:
        self.weights = MetricName.parse_loss(loss)
        if MetricName(REWARD, REWARD) in self.weights:
            held_out_metrics = [*held_out_metrics, "spread"]
            references = {"pixels": Reference(Thumbnails()), **references}
        metrics = [*metrics, *{REWARD}.intersection(references)]
        held_out_metrics = [*held_out_metrics, *{HELD_OUT_REWARD}.intersection(references)]
        self.keep = None if keep is None else MetricName.parse_kept(keep, self.weights)
        self.bound = next(iter(keep.values())) if isinstance(keep, Mapping) else None
        self.constraint: Constraint | None = None
        searched = [*self.weights, *([] if self.keep is None else [self.keep, self.keep.guide])]
        self.extractors = tuple(dict.fromkeys(metric.extractor for metric in searched))
        self._metrics = tuple(dict.fromkeys((*self.weights, *MetricName.parse_all(metrics), *searched)))
        self._held_out_metrics = tuple(dict.fromkeys((*self._metrics, *MetricName.parse_all(held_out_metrics))))
        names = dict.fromkeys(metric.extractor for metric in self._held_out_metrics)
        if missing := [name for name in names if name not in references]:
            raise MetricError(f"no extractor {missing[0]!r} was given, which a metric names")
        self.references = {name: references[name] for name in names}
        for metric in self._held_out_metrics:
            _check(metric, self.references[metric.extractor])
        self.device, self._report_references = device, report_references

    @property
    def extractor(self) -> FeatureExtractor:
        """The extractor of the loss's first metric; it orders image pairs. A reward alone leaves that to pixels."""
        first = self.extractors[0]
        return self.references["pixels" if first == REWARD else first].extractor

    def extractor_of(self, name: str, prompts: Sequence[str] | None) -> FeatureExtractor:
        """The extractor of this name; a reward for images of these prompts."""
        extractor = self.references[name].extractor
        return extractor.about(prompts) if isinstance(extractor, Reward) else extractor

    @property
    def dimension(self) -> int:
        """The largest number of features that a metric of a search works with."""
        return max(self.references[metric.extractor].extractor.dimension for metric in self._metrics)

    def image_metrics(self, total: int, *, held_out: bool = False, gradient: bool = False) -> ImageMetrics:
        """The metrics of one evaluation, or of a part of it, which has no images yet."""
        return ImageMetrics(self, total, held_out=held_out, gradient=gradient)

    def computed(self, *, held_out: bool) -> tuple[MetricName, ...]:
        """The metrics of an evaluation of a search, or of a held-out report."""
        return tuple(dict.fromkeys((*self._held_out_metrics, *self.evaluation_metrics))) if held_out else self._metrics

    def image_gradient(
        self, images: Tensor, gradients: Mapping[str, Tensor], prompts: Sequence[str] | None = None
    ) -> Tensor:
        """The derivative of the loss in ``images``: ``[B, C, H, W]``, in their type and on their device.

        Args:
            images: ``[B, C, H, W]`` in [−1, 1]; their own graph is not followed.
            gradients: the rows ``[B, D]`` of these images out of :meth:`ImageMetrics.gradients`.
            prompts: of the images, if they have some.

        Raises:
            MetricError: an extractor cuts the graph.
        """
        parts = [image_gradient(self.extractor_of(name, prompts), images, rows) for name, rows in gradients.items()]
        return torch.stack(parts).sum(dim=0)

    @functools.cached_property
    def _report(self) -> Mapping[str, Reference]:
        found = {} if self._report_references is None else self._report_references()
        self.references.update(found)
        return found

    @functools.cached_property
    def cross_check_metric(self) -> MetricName | None:
        """The held-out metric that shows whether a gain is there in other features, too; lower is better."""
        named = [m for m in self._held_out_metrics if m.extractor not in self.extractors and m.formula in DISTANCES]
        if named:
            return min(named, key=lambda metric: DISTANCES.index(metric.formula))
        other = [name for name in self._report if name not in self.extractors]
        return MetricName("fid", other[0]) if other else None

    @functools.cached_property
    def evaluation_metrics(self) -> tuple[MetricName, ...]:
        """The metrics of held-out reports that are not the loss.

        If a metric is kept, and the loss may have a penalty, the metrics of the loss are among them.
        """
        found = [*self._held_out_metrics, *([] if self.cross_check_metric is None else [self.cross_check_metric])]
        for name in [*self._report][:1] if self.extractors == (REWARD,) else self.extractors:
            reference = self._report.get(name)
            if reference is not None and reference.features is not None and len(reference.features) > NEIGHBOURHOOD:
                formulas = REPORTED if reference.held_out is None else (*REPORTED, *REPORTED_WITH_HELD_OUT)
                found += [MetricName(formula, name) for formula in formulas]
        return tuple(metric for metric in dict.fromkeys(found) if self.keep or metric not in self.weights)

    @functools.cached_property
    def splits(self) -> dict[str, float]:
        """Extractor → FID of real images to real images, for all extractors that ``fdr`` in held-out reports uses.

        FDr is that of FD-loss (arXiv 2604.28190): FID over that of real images, mean over feature spaces.
        """
        if not any(name in self.extractors for name in self._report):
            return {}
        metrics = [metric for metric in (*self.weights, *self.evaluation_metrics) if metric.needs_reference]
        names = dict.fromkeys(metric.extractor for metric in metrics)
        found = {name: _split_distance(self.references[name]) for name in names}
        return {name: distance for name, distance in found.items() if distance}

    @property
    def signs(self) -> dict[str, int]:
        """Evaluation metric → 1, or −1 if higher is better; and ``fdr``, which is of all extractors together."""
        return {**{str(metric): metric.sign for metric in self.evaluation_metrics}, **({FDR: 1} if self.splits else {})}

    def real_halves(self) -> dict[str, float]:
        """Metric → its value for held-out real images in place of samples: about that of a perfect model.

        It is empty if fewer than four images are held out.
        """
        found: dict[str, float] = {}
        computed: dict[str, FeatureMetrics] = {}
        for metric in self.evaluation_metrics:
            name, reference = metric.extractor, self.references[metric.extractor]
            if reference.held_out is None or not metric.needs_reference:
                continue
            unseen = reference.held_out.known_features
            if len(unseen) <= NEIGHBOURHOOD:
                continue
            if metric.formula == "nearer_train":
                real = len(reference.known_features)
                found[str(metric)] = real / (real + len(unseen))
                continue
            if name not in computed:
                computed[name] = FeatureMetrics(reference, device=self.device)
                computed[name].update(torch.from_numpy(unseen))
            # the distance between the two sets of real images, either way
            found[str(metric)] = computed[name].compute("fid" if metric.formula == "fid_held_out" else metric.formula)
        if self.splits and all(self.references[name].held_out is not None for name in self.splits):
            found[FDR] = 1.0  # by its definition
        return found

    def warnings(self, images: int) -> list[str]:
        """Warnings about FID of ``images`` samples against these references, a line each."""
        lines: list[str] = []
        for reference in [self.references[metric.extractor] for metric in self._metrics if metric.formula == "fid"]:
            dimension = reference.extractor.dimension
            for count, what in ((reference.count, "reference set"), (images, "set of samples")):
                if count is not None and count <= dimension:
                    lines.append(
                        f"the {what} has {count} images for {dimension} features, so FID is biased upwards and "
                        "compares only with FIDs of as many images; use more, or an extractor with fewer features"
                    )
        return list(dict.fromkeys(lines))

    def describe(self) -> dict[str, Any]:
        """The loss, all metrics, and each extractor's name and reference, for the study's fingerprint."""
        extractors = sorted({metric.extractor for metric in self._held_out_metrics})
        described = [(name, self.references[name]) for name in extractors]
        return {
            "loss": {str(metric): weight for metric, weight in self.weights.items()},
            **({} if self.keep is None else {"keep": str(self.keep)}),
            **({} if self.bound is None else {"bound": self.bound}),
            "metrics": sorted(str(metric) for metric in self._metrics),
            "held_out_metrics": sorted(str(metric) for metric in self._held_out_metrics),
            "extractors": {name: {"name": it.extractor.name, "reference": it.identity} for name, it in described},
        }


def _split_distance(reference: Reference) -> float | None:
    """FID of real images to real images: of the held-out ones to the reference, else of its halves to each other.

    ``None`` if there are neither.
    """
    if reference.held_out is not None:
        other = reference.held_out.frechet
        return reference.frechet.distance(other.mean, other.cov)
    if reference.features is None or len(reference.features) < FEWEST_SPLIT:
        return None
    one, two = (Moments.of(reference.features[first::2]) for first in (0, 1))
    return FrechetReference(one.mean, one.covariance).distance(two.mean, two.covariance)


def _check(metric: MetricName, reference: Reference) -> None:
    """Raise MetricError if the metric cannot be computed with this reference."""
    if metric.formula == "is" and not hasattr(reference.extractor, "features_and_logits"):
        raise MetricError(
            f"{metric}: the extractor {reference.extractor.name} tells no classes apart; use is@inception"
        )
    try:
        if metric.needs_reference:
            _ = reference.frechet
        if metric.formula in OF_REFERENCE_FEATURES:
            _ = reference.known_features
        if metric.formula in OF_HELD_OUT:
            _ = reference.unseen
    except MetricError as error:
        raise MetricError(f"{metric}: {error}") from error
