"""The loss, the metrics, and the references of an objective over images, put together.

:mod:`~lcsc_opt.metrics.loss` says what is minimized, :mod:`~lcsc_opt.metrics.suite_metrics` what else is measured.
:class:`~lcsc_opt.metrics.image_metrics.ImageMetrics` computes both for the images of one evaluation.

Reports show what a search may lose while its loss falls. Precision and recall tell fidelity and diversity apart. FID in
features that the loss does not use shows whether a gain is real, and ``outside`` how much clipping changes an image. If
real images are held out, there is also FID to these. Precision and recall need the features of the real images, which a
file of statistics does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import RAISED_BY_USERS, MetricError, one_line
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate
from lcsc_opt.metrics.distances import NEIGHBOURHOOD
from lcsc_opt.metrics.extractors.base import FeatureExtractor, image_gradient
from lcsc_opt.metrics.extractors.pixels import Outside
from lcsc_opt.metrics.feature_metrics import FeatureMetrics, MetricPlan
from lcsc_opt.metrics.image_metrics import ImageMetrics, ImageState, extractor_for
from lcsc_opt.metrics.names import (
    FID_HELD_OUT,
    OUTSIDE,
    REWARD,
    TO_HELD_OUT,
    TO_SHRUNK,
    WITHOUT_NETWORK,
    Formula,
    MetricName,
    need_real_features,
)
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.shrinking import FEW_REAL, MOST_REAL, NEGLIGIBLE, NOTHING_ELSE, PROBE_DOUBT, shrinkage_of
from lcsc_opt.metrics.suite_metrics import SuiteMetrics
from lcsc_opt.metrics.value_range import LOOKED_AT, value_range

REPORTED: tuple[Formula, ...] = ("precision", "recall")


class MetricSuite:
    """Images → loss and metrics.

    The loss is a weighted sum, in which metrics are subtracted where higher is better; metrics are reported as they
    are.

    Args:
        references: extractor's name in the metrics → its reference.
        metrics: those of searches, and those that settings name for reports. ``outside`` is always reported.
        device: where distances between features are computed.
        report_references: builds references that only held-out reports need, when they are first needed. One for an
            extractor of the loss replaces that in ``references``, and the metrics of :data:`REPORTED` are in reports.
            In another extractor FID is. These metrics decide nothing, and are in no description.
        real_images: at most so many real images ``[M, C, H, W]`` in [-1, 1], whose values show the range of samples;
            ``None`` where only statistics are known.

    Attributes:
        loss: the loss, with the metric that is kept.
        references: extractor's name → its reference.

    Raises:
        MetricError: a reference is missing, or a metric needs more than mean and covariance of it.
    """

    def __init__(
        self,
        references: Mapping[str, Reference],
        metrics: SuiteMetrics,
        *,
        device: torch.device | str = "cpu",
        report_references: Callable[[], Mapping[str, Reference]] = dict,
        real_images: Callable[[int], Tensor | None] = lambda _count: None,
    ) -> None:
        self.loss = metrics.loss
        self._metrics = metrics
        self._device = device
        self._build_report_references = report_references
        self._some_real_images = real_images
        self._known_ranges: set[int] = set()  # of samplers
        self._targets: dict[str, Reference] = {}  # extractor's name → its reference, shrunk, for the loss
        self.references: dict[str, Reference] = {OUTSIDE: Reference(Outside()), **references}
        for metric in metrics.reported:
            if metric.extractor not in self.references:
                raise MetricError(f"no extractor {metric.extractor!r} was given, which a metric names")
            _check(metric, self.references[metric.extractor])

    @property
    def extractor(self) -> FeatureExtractor:
        """The extractor of the loss's first metric; it orders image pairs."""
        return self.references[self.loss.extractors[0]].extractor

    @property
    def dimension(self) -> int:
        """D of the largest D × D matrices that a metric of a search needs."""
        with_matrices = [metric for metric in self._metrics.searched if not metric.has_own_features]
        return max((self.references[metric.extractor].extractor.dimension for metric in with_matrices), default=1)

    @torch.no_grad()
    def warn_of_range(self, images: Tensor, sampler: object) -> None:
        """Warn if images, ``[n, C, H, W]``, are in another range than [-1, 1]; nothing is done once that is known.

        Args:
            images: of any model, as it gives them.
            sampler: by which they were sampled.
        """
        if id(sampler) in self._known_ranges:
            return
        found = value_range(images, self._real_images)
        if found.is_known:
            self._known_ranges.add(id(sampler))
        if found.problem is not None:
            notice(f"the sampler's images {found.problem}")

    @functools.cached_property
    def _real_images(self) -> Tensor | None:
        """Some real images."""
        return self._some_real_images(LOOKED_AT)

    def why_no_graph(self, sample: Callable[[], tuple[Tensor, Sequence[str] | None]]) -> str | None:
        """Why features in the loss have no graph back to the images, as the end of a sentence; ``None`` if they have.

        Only a user's own extractors and rewards are tried, on the few images that ``sample`` gives, with their prompts.
        """
        own = [name for name in self.loss.extractors if ":" in name or name == REWARD]
        if not own:
            return None
        images, prompts = sample()
        for name in own:
            extractor = extractor_for(self.references[name], prompts)
            try:
                image_gradient(extractor, images, torch.ones(len(images), extractor.dimension))
            except MetricError as error:
                return str(error)
            except torch.OutOfMemoryError:  # which says nothing about the extractor
                raise
            except RAISED_BY_USERS as error:  # such as of numpy(), which refuses tensors with a graph
                return f"with an autograd graph, {name} raised {one_line(error)}"
        return None

    def image_metrics(self, candidate: Candidate, total: int) -> ImageMetrics:
        """The metrics of one evaluation, or of a part of it, which has no images yet.

        Reports have metrics of their own. The choice of an answer has the cross-check, to both the real images that
        a search sees and those that it does not, where there are some.

        Args:
            candidate: what is evaluated, of which the coefficients do not matter here.
            total: how many images it has, in all parts.
        """
        group = candidate.noise.group
        targets = self._targets
        if group == HELD_OUT.group or candidate.rehearsal:  # what is reported is plain, and what nobody compares
            targets = {}
        loss = self.loss.shrunk(targets)
        if candidate.yardstick is not None:
            loss = loss.relative_to(candidate.yardstick)
        metrics = self._metrics.searched
        if targets:
            if candidate.unbiased:  # a step, where the plain distances would cost as much again for no one
                metrics = tuple(metric for metric in metrics if metric not in self.loss.weights)
            metrics = tuple(dict.fromkeys((*loss.weights, *metrics)))
        if group == HELD_OUT.group:
            metrics = tuple(dict.fromkeys((*self._metrics.reported, *self.evaluation_metrics)))
        elif group == SELECTION.group:
            metrics = tuple(dict.fromkeys((*metrics, *self._metrics_of_choice)))
        references = self.references  # only now: the metrics of a report may have added some
        if group != HELD_OUT.group:  # held-out real images are for reports alone; others take their place here
            references = {name: reference.of_choice for name, reference in references.items()}
        plan = MetricPlan(
            total,
            gradient=candidate.gradient,
            unbiased=candidate.unbiased,
            intervals=candidate.error,
            device=self._device,
        )
        return ImageMetrics(loss, metrics, references, plan, targets)

    @functools.cached_property
    def shrinkable(self) -> dict[str, MetricName]:
        """Extractor's name → the loss's distance there, where real images are few enough for a target to be shrunk."""
        distances: dict[str, MetricName] = {}
        for metric in self.loss.weights:
            reference = self.references[metric.extractor]
            is_few = reference.features is not None and len(reference.features) <= MOST_REAL
            if metric.formula in TO_SHRUNK and is_few and reference.may_be_shrunk:
                distances[metric.extractor] = metric
        return distances

    def metrics_of_average(self, total: int) -> ImageMetrics:
        """Collects what :meth:`shrink` needs of ``total`` samples of the average, or of a part of them."""
        distances = list(self.shrinkable.values())
        return ImageMetrics(self.loss, distances, self.references, MetricPlan(total, unbiased=True))

    def shrink(self, average: ImageState, *, is_probe: bool) -> bool:
        """Shrink the targets of the loss towards an average of the checkpoints, where real images are few.

        Args:
            average: the state of :meth:`metrics_of_average`, of all its samples.
            is_probe: whether these are only so many as tell whether more are needed: then nothing is shrunk.

        Returns:
            Whether some target is shrunk, or would be.

        Raises:
            MetricError: the real images say nothing that the average does not.
        """
        shrinkages = {}
        for name, metric in self.shrinkable.items():
            _, features, _ = average[name]
            assert features is not None  # since the plan keeps them
            doubt = PROBE_DOUBT if is_probe else 1.0
            shrinkages[name] = shrinkage_of(metric.formula, self.references[name], features, doubt=doubt)
        weights = [weight for shrinkage in shrinkages.values() for weight in shrinkage.weights.values()]
        is_shrunk = max(weights) > NEGLIGIBLE
        if is_probe or not is_shrunk:
            return is_shrunk
        texts = []
        for name, shrinkage in shrinkages.items():
            of_space = ", ".join(f"{weight:.2f} ({what})" for what, weight in shrinkage.weights.items())
            texts.append(f"{self.shrinkable[name]} {of_space}")
        count = max(len(self.references[name].known_features) for name in shrinkages)
        said = f"{count:,} real images, weights of the average of the checkpoints: {'; '.join(texts)}"
        if min(weights) > NOTHING_ELSE and len(shrinkages) == len(self.loss.weights):
            raise MetricError(
                f"nothing to search for: as far as the real images can tell, an average of the checkpoints is like "
                f"them ({said}). Keep EMA*, or give more real images"
            )
        notice(
            f"few real images, so the loss compares with a weighted sum of these and of samples of an average of the "
            f"checkpoints; {said}. With more real images the weights fall"
        )
        self._targets = {name: self.references[name].shrunk(each) for name, each in shrinkages.items()}
        return True

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
    def _metrics_of_choice(self) -> Sequence[MetricName]:
        """The cross-check, by the real images that a search sees; and by those that are kept for the choice, if any."""
        seen = self.cross_check_metric
        if seen is None:
            return []
        unseen = MetricName(TO_HELD_OUT.get(seen.formula, seen.formula), seen.extractor)
        if unseen == seen:  # a formula without a variant for other images
            return [seen]
        if self.references[seen.extractor].of_choice.held_out is None:
            return [seen]
        return [seen, unseen]

    @functools.cached_property
    def _report_references(self) -> Mapping[str, Reference]:
        """The references that only reports need, built once; from then on they are in :attr:`references`, too."""
        built = self._build_report_references()
        self.references.update(built)
        return built

    @functools.cached_property
    def cross_check_metric(self) -> MetricName | None:
        """The metric of reports that shows whether a gain is real in other features, too; lower is better."""
        if self._metrics.named_cross_check is not None:
            return self._metrics.named_cross_check
        for name in self._report_references:
            if name not in self.loss.extractors:
                return MetricName("fid", name)
        return None

    @property
    def judges(self) -> list[str]:
        """What no answer may be certainly worse in: the cross-check, and FID in the network of ``fdr``.

        The weights of ``fdr`` are not the user's. A cross-check by random convolutions decides nothing where the loss
        looks at both a network's features and pixels, as ``fdr`` does: it sees no more than the pixels' distances do,
        and in benchmarks/lora.py it refused models whose every other distance had fallen to two thirds or less.
        """
        judges = [str(metric) for metric in self.loss.of_fdr if metric.extractor not in WITHOUT_NETWORK]
        if self._cross_check_refuses:
            judges.insert(0, str(self.cross_check_metric))
        return judges

    @property
    def _cross_check_refuses(self) -> bool:
        """Whether there is a cross-check that no answer may be worse in."""
        metric = self.cross_check_metric
        if metric is None:
            return False
        if getattr(self.references[metric.extractor].extractor, "knows_content", True):
            return True
        looks_at_pixels = any(term.extractor in WITHOUT_NETWORK for term in self.loss.of_fdr)
        looks_at_network = any(term.extractor not in WITHOUT_NETWORK for term in self.loss.of_fdr)
        return not (looks_at_pixels and looks_at_network)

    @property
    def cross_check_text(self) -> str | None:
        """The cross-check, and what sees the images there; ``None`` without one."""
        metric = self.cross_check_metric
        if metric is None:
            return None
        extractor = self.references[metric.extractor].extractor
        network = getattr(extractor, "in_words", "features that the loss does not use")
        if self._cross_check_refuses:
            return f"{metric}: {network}; what is certainly worse there is not the answer"
        return f"{metric}: {network}; it warns, and refuses nothing, since the loss looks at pixels, too"

    @functools.cached_property
    def evaluation_metrics(self) -> tuple[MetricName, ...]:
        """The metrics of held-out reports beside the loss.

        The terms of a sum come first: it may fall while a distance in it rises. A loss that is one metric is not
        repeated, unless a metric is kept, whose penalty makes the loss another number than the metric.
        """
        metrics = list(self._metrics.reported)
        if self.cross_check_metric is not None:
            metrics.append(self.cross_check_metric)
        networks = [name for name in self.loss.extractors if name not in WITHOUT_NETWORK]
        for name in networks or self.loss.extractors:  # whose features are compared with real images
            reference = self._report_references.get(name)
            if reference is None:
                continue
            if reference.features is not None and len(reference.features) > NEIGHBOURHOOD:
                metrics += [MetricName(formula, name) for formula in REPORTED]
            if reference.held_out is not None:
                metrics.append(MetricName(FID_HELD_OUT, name))
        if len(self.loss.weights) > 1:
            metrics = [*self.loss.weights, *metrics]
        elif self.loss.keep is None:
            metrics = [metric for metric in metrics if metric not in self.loss.weights]
        metrics.append(MetricName(OUTSIDE, OUTSIDE))
        return tuple(dict.fromkeys(metrics))

    @property
    def terms(self) -> tuple[str, ...]:
        """The metrics of a loss of several; empty of a single one."""
        if len(self.loss.weights) == 1:
            return ()
        return tuple(map(str, self.loss.weights))

    @property
    def signs(self) -> dict[str, int]:
        """Metric of reports → 1, or −1 if higher is better."""
        return {str(metric): metric.sign for metric in self.evaluation_metrics}

    def real_halves(self) -> dict[str, float]:
        """Metric of reports → its value for held-out real images in place of samples: about that of a perfect model.

        It is empty if fewer than four images are held out.
        """
        values: dict[str, float] = {}
        feature_metrics: dict[str, FeatureMetrics] = {}
        for metric in self.evaluation_metrics:
            name = metric.extractor
            reference = self.references[name]
            if reference.held_out is None or not metric.needs_reference:
                continue
            held_out_features = reference.held_out.known_features
            if len(held_out_features) <= NEIGHBOURHOOD:
                continue
            if name not in feature_metrics:
                feature_metrics[name] = FeatureMetrics(reference, MetricPlan(device=self._device))
                feature_metrics[name].update(torch.from_numpy(held_out_features))
            # The held-out images stand for samples. FID to themselves would be zero; that to the reference says more.
            formula = "fid" if metric.formula == FID_HELD_OUT else metric.formula
            values[str(metric)] = feature_metrics[name].compute(formula)
        return values

    @property
    def real_count(self) -> int:
        """How many images are held out from a reference, at most."""
        held_out = (reference.held_out for reference in self.references.values() if reference.held_out is not None)
        return max((len(images.known_features) for images in held_out), default=0)

    @property
    def few_real_count(self) -> int:
        """How many real images the loss compares with, where they are few: FID to these says little; else 0."""
        counts = (len(self.references[name].known_features) for name in self.shrinkable)
        return min((count for count in counts if count <= FEW_REAL), default=0)

    def warnings(self, images: int) -> list[str]:
        """Warnings about FID of ``images`` samples against these references, a line each."""
        lines: list[str] = []
        for metric in self._metrics.searched:
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
        """What decides the loss: its metrics, and each of their extractors' name and reference."""
        description: dict[str, Any] = {"loss": self.loss.describe()}
        if self.loss.keep is not None:
            description["keep"] = str(self.loss.keep)
        if self.loss.bound is not None:
            description["bound"] = self.loss.bound
        description["extractors"] = self._described(self.loss.extractors)
        return description

    def describe_reports(self) -> dict[str, Any]:
        """The extractors of the metrics that settings name, without those that the loss sees."""
        extractors = {metric.extractor for metric in self._metrics.reported}
        return {"extractors": self._described(extractors.difference(self.loss.extractors))}

    def _described(self, extractors: Iterable[str]) -> dict[str, Any]:
        """Extractor's name in metrics → the names of the network and of the real images, which follow their content."""
        described = {}
        for name in sorted(extractors):
            reference = self.references[name]
            described[name] = {"name": reference.extractor.name, "reference": reference.identity}
        return described


def _check(metric: MetricName, reference: Reference) -> None:
    """Raise MetricError if the metric cannot be computed with this reference."""
    if metric.formula == "is" and not hasattr(reference.extractor, "features_and_logits"):
        raise MetricError(f"{metric}: the extractor {reference.extractor.name} has no classes; use is@inception")
    try:  # these properties raise where the reference lacks something
        if metric.needs_reference:
            _ = reference.frechet
        if need_real_features([metric.formula]):
            _ = reference.known_features
        if metric.formula == FID_HELD_OUT:
            _ = reference.unseen
    except MetricError as error:
        raise MetricError(f"{metric}: {error}") from error
