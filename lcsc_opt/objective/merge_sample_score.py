"""The main objective of this project: coefficients → merged weights → images → features → loss and metrics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError, raised_as
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import (
    CONTIGUOUS,
    HELD_OUT,
    SEARCH,
    Candidate,
    Coefficients,
    Cost,
    Evaluation,
    Noise,
    ReportedMetrics,
    Yardstick,
)
from lcsc_opt.base.reproducibility import blas_threads
from lcsc_opt.coefficients.profiles import is_saved, power_ema_coefficients
from lcsc_opt.metrics import MetricSuite, extract
from lcsc_opt.metrics.frechet import effective_dimension
from lcsc_opt.metrics.image_metrics import ImageMetrics, ImageState
from lcsc_opt.metrics.loss import why_no_gradient
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.metrics.shrinking import ENOUGH, PROBE
from lcsc_opt.objective.batch_sizes import BatchSizes, Size, images_at_once
from lcsc_opt.objective.contract import OF_MACHINE, Role, Samples, StagedObjective, stop_if_told
from lcsc_opt.objective.gradient_pass import GradientPass
from lcsc_opt.objective.image_stages import FeatureGradients, ImageStages
from lcsc_opt.objective.stopwatch import Stopwatch
from lcsc_opt.sampling import DifferentiableSampler, Sampler
from lcsc_opt.sampling.base import fewest_report_images, prompts_of, title_of, why_no_graph
from lcsc_opt.sampling.batch_norm import BATCH, IMAGES, BatchNormStatistics
from lcsc_opt.sampling.layout import fastest_layout, lay_out
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import merged_or_base
from lcsc_opt.trajectory.trajectory import describe_renaming

SMALL_MATRICES = 256  # features, below which a second BLAS thread does not help
DEFAULT_IMAGES = 10_000  # Liu et al. 2024, Section 5.1
_ASKED = ("metrics", "held_out_metrics", "held_out_reward", "trainer_ema")  # settings of reports alone
REHEARSED = 16  # images, of which every metric can be computed
FIXED_AVERAGE = 0.10  # its sigma_rel: near EMA* of most training runs
AVERAGE = Noise("average")  # of the samples of this average, towards which targets of few real images are shrunk

Merged = tuple[dict[str, Tensor], Cost]
"""The merged weights of one candidate, name → tensor, until they are in the model; and the cost of merging."""

Sampled = tuple[ImageState, Cost]
"""What the metrics need to know about some images, picklable, and the cost of these images with merging."""


class MergeSampleScore(StagedObjective):
    """Loss and metrics of the images that the merged model samples, and the gradient of the loss.

    Stages compute with :class:`ImageStages`, gradients with a :class:`GradientPass`. What is kept between calls is the
    trajectory on the device, the batch sizes, and the graph of the last :meth:`sample` with ``gradient``.

    Args:
        trajectory: K checkpoints.
        sampler: puts merged weights into the model and samples.
        scores: images → loss and metrics.
        images: the number of images in an evaluation of a search.
        batch_size: images that are sampled at once. ``auto``, the default on a device, follows its memory; on the CPU
            the default is 500.
        gradient_batch_size: images with a graph at once, which need as much memory as training does. The default is the
            batch size; an automatic one follows the memory, too. It does not change the loss.
        device: the device of the sampler's model; candidates are merged in its memory.
        batch_norm: estimates the statistics of batch normalization again for each candidate; ``None`` merges them.
        also: samples from the same model in another way, for reports.
        real_images: some real images to look at beside samples, ``count -> [count, C, H, W]`` in [-1, 1]; ``None``
            where there are none.
    """

    trajectory: Trajectory
    sampler: Sampler

    def __init__(
        self,
        trajectory: Trajectory,
        sampler: Sampler,
        scores: MetricSuite,
        *,
        images: int = DEFAULT_IMAGES,
        batch_size: Size | None = None,
        gradient_batch_size: int | None = None,
        device: torch.device | str = "cpu",
        batch_norm: BatchNormStatistics | None = None,
        also: Sampler | None = None,
        real_images: Callable[[int], Tensor | None] = lambda _count: None,
    ) -> None:
        for warning in scores.warnings(images):
            notice(warning)
        self.trajectory = trajectory
        self.sampler = sampler
        self.scores = scores
        self.device = torch.device(device)
        self.overlaps = self.device.type != "cpu"  # on a CPU, merging and metrics use the same cores as sampling
        self._images = images
        self._batch_sizes = BatchSizes(
            images_at_once(batch_size, self.device), with_graph=gradient_batch_size, images=images, device=self.device
        )
        self._batch_norm = batch_norm
        self._some_real_images = real_images
        self._samplers = (sampler,) if also is None else (sampler, also)
        self._stages = [ImageStages(each, scores, batch_norm) for each in self._samplers]  # by candidate.sampler
        self._layout = CONTIGUOUS
        self.samples = Samples(
            per_evaluation=images,
            prompts_per_report=fewest_report_images(sampler),
            samplers=tuple(title_of(each) for each in self._samplers),
            real_per_dimension=_real_images_per_dimension(scores),
        )
        self._is_placed = False
        self._images_of_average: int | None = None  # that were scored last, for targets
        self._knows_targets = not scores.shrinkable
        self._gradient_pass: GradientPass | None = None

    @property
    def layout(self) -> str:
        """How the weights of the network lie in memory."""
        return self._layout

    @layout.setter
    def layout(self, layout: str) -> None:
        if layout != self._layout:
            self._layout = layout
            lay_out(self._samplers, layout)

    def fastest_layout(self, *, gradient: bool) -> str:
        """The layout in which few images are sampled in the shortest time; a notice names it if it is another one."""
        layout, relative = fastest_layout(self.sampler, trial_images=self._images, gradient=gradient)
        if layout != self.layout:
            notice(f"the network's weights are stored {layout}: sampling takes {relative:.2f} times as long")
        return layout

    @property
    def fixed_average(self) -> Coefficients | None:
        """EDM2's power-function profile with sigma_rel 0.10, for ``fdr``, for sums and a metric that is kept."""
        if not self.scores.loss.has_units and self.scores.loss.keep is None:
            return None
        return power_ema_coefficients(self.steps, FIXED_AVERAGE)

    def yardstick(self, measured: Evaluation) -> Yardstick:
        """The values by which ``fdr`` divides, and the bound of the metric that is kept.

        Raises:
            MetricError: a value is zero, or nothing beside the others.
        """
        return self.scores.loss.yardstick(measured.metrics, measured.cost.images)

    def reported_metrics(self) -> ReportedMetrics:
        """The held-out metrics that are not the loss; among them is FID in features that the loss does not see."""
        return self._reported

    @functools.cached_property
    def _reported(self) -> ReportedMetrics:
        with self._metric_threads():
            cross_check = self.scores.cross_check_metric
            return ReportedMetrics(
                signs=self.scores.signs,
                terms=self.scores.terms,
                cross_check=None if cross_check is None else str(cross_check),
                cross_check_text=self.scores.cross_check_text,
                judges=tuple(self.scores.judges),
                real_halves=self.scores.real_halves(),
                real_count=self.scores.real_count,
                few_real_images=self.scores.few_real_count,
            )

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, or ``None``."""
        reason = why_no_gradient(self.scores.loss.weights)
        if reason:
            return reason
        if not isinstance(self.sampler, DifferentiableSampler):
            return f"{type(self.sampler).__name__} samples without a graph"
        return self.sampler.weights.why_no_gradient(self.trajectory.varying) or self._why_no_graph

    @functools.cached_property
    def _why_no_graph(self) -> str | None:
        """What the user's own sampler and features say. They sample for it, and every gradient asks."""
        return why_no_graph(self.sampler) or self.scores.why_no_graph(self._few_images)

    @torch.no_grad()
    def _few_images(self) -> tuple[Tensor, list[str] | None]:
        """Two images of the weights that are in the network, and their prompts.

        Raises:
            ObjectiveError: the sampler cannot sample them.
        """
        with raised_as(ObjectiveError, "sampling"):
            return self.sampler.sample(SEARCH, 0, 2), prompts_of(self.sampler, SEARCH, 0, 2)

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash, the sampler, the loss with extractors and references, and the number of images."""
        batch_norm = None
        if self._batch_norm is not None:
            batch_norm = {"images": IMAGES, "batch": BATCH}
        shrunk = {}
        if self.scores.shrinkable:
            shrunk = {"target": {"sigma_rel": FIXED_AVERAGE, "images": max(ENOUGH, self._images)}}
        return {
            **shrunk,
            "trajectory": self.trajectory.sha256,
            **describe_renaming(self.trajectory),
            "sampler": self.sampler.describe(),
            "scores": self.scores.describe(),
            "images": self._images,
            "batch_norm": batch_norm,
        }

    def describe_reports(self) -> dict[str, Any]:
        """The extractors that only metrics of reports need. A second sampler has measurements of its own."""
        return {"scores": self.scores.describe_reports()}

    def role_of(self, setting: tuple[str, ...]) -> Role:
        """What only reports measure, and what the machine is, decide no loss of a search."""
        if setting == ("model",) and self.sampler.describe().get("architecture"):
            return "none"  # the folder of a configuration, which is described
        if setting[0] in _ASKED or "also" in setting:
            return "asked"
        if setting[0] == "reference" and "held_out" in setting:
            return "reported"
        return "none" if setting[-1] in OF_MACHINE else super().role_of(setting)

    def name_of(self, setting: tuple[str, ...]) -> str:
        """What people call a setting; of real images, whose they are."""
        if setting[0] != "reference" or setting[-1] == "held_out_fraction":
            return super().name_of(setting)
        extractors = [key for key in setting[1:] if key not in ("train", "held_out")]
        of_extractor = "".join(f" of {name}" for name in extractors)
        return f"the {'held-out' if 'held_out' in setting else 'real'} images{of_extractor}"

    def content_of(self, place: Path, files: Path) -> tuple[str, str] | None:
        """Images in a folder, by their content; of other folders, such as models', nothing is known here."""
        if not place.is_dir():
            return super().content_of(place, files)
        try:
            images = ImageSet.of_files(place, folder=files)
        except MetricError:  # no images, or pictures beside a model
            return None
        return images.content, f"{images.count:,} images"

    def images_of(self, candidate: Candidate) -> int:
        """How many images a candidate is evaluated on.

        A rehearsal that says no number has a few; on a GPU a whole batch, which shows whether the memory suffices.
        """
        if candidate.rehearsal and candidate.images is None:
            return min(self._images, REHEARSED if self.device.type == "cpu" else self._batch_sizes.usual)
        if candidate.images is None:
            return self._images
        return candidate.images

    def needs(self, candidate: Candidate) -> Candidate | None:
        """Samples of the average that few real images are shrunk towards: few of them, which tell whether more are.

        Nobody compares losses of a rehearsal, and what reports have is plain.
        """
        if self._knows_targets or candidate.rehearsal or candidate.noise.group in (AVERAGE.group, HELD_OUT.group):
            return None
        images = PROBE if self._images_of_average is None else max(ENOUGH, self._images)
        return Candidate(power_ema_coefficients(self.steps, FIXED_AVERAGE), images=images, noise=AVERAGE)

    def prepare(self, candidate: Candidate) -> Merged:
        """Merge."""
        watch = Stopwatch()
        with watch.timing("merge"):
            weights = merged_or_base(self._placed_trajectory, candidate.coefficients)
        return weights, watch.cost()

    def sample(self, candidate: Candidate, prepared: Merged, first: int, last: int) -> Sampled:
        """Put the merged weights into the model, sample the images ``[first, last)``, and compute their features.

        ``prepared`` is used once: its weights are freed before images are sampled.

        Raises:
            MetricError: an image, or its features, are not finite.
        """
        watch = Stopwatch()
        weights, merging_cost = prepared
        with watch.timing("merge"):
            self._load(weights, candidate.coefficients)
            weights.clear()
        try:
            metrics = self._batch_sizes.retry_smaller(lambda: self._sample(candidate, first, last, watch))
        except MetricError:
            if candidate.noise.group == AVERAGE.group:  # which other models need not share
                return {}, watch.cost(images=last - first)
            raise
        with watch.timing("features"):
            state = metrics.state
        count = last - first
        return state, merging_cost + watch.cost(images=count, model_calls=count * self._samplers[candidate.sampler].nfe)

    def score(self, candidate: Candidate, parts: Sequence[Sampled]) -> tuple[Evaluation, list[FeatureGradients | None]]:
        """Loss and metrics from all parts in the order of their images; for a gradient also what :meth:`vjp` needs.

        Raises:
            MetricError: the features cannot be scored.
        """
        watch = Stopwatch()
        if candidate.noise.group == AVERAGE.group:
            return self._score_average(parts), [None] * len(parts)
        feature_gradients: list[FeatureGradients | None] = [None] * len(parts)
        unseen = None
        with watch.timing("metric"), self._metric_threads():
            metrics = self.scores.image_metrics(candidate, self.images_of(candidate))
            for state, _ in parts:
                metrics.merge(state)
            if candidate.gradient:  # first: the loss then shares its decomposition
                counts = [cost.images for _, cost in parts]
                feature_gradients = [*_divided(metrics.gradients(candidate.keep_weight), counts)]
            loss, values = metrics.compute()
            violation = metrics.violation()
            without_groups = metrics.without_each_group()
            if candidate.error:
                unseen = metrics.unseen()
        cost = Cost.of_parts([cost for _, cost in parts]) + watch.cost()
        evaluation = Evaluation(
            loss,
            values,
            cost,
            violation=violation,
            unseen=unseen,
            without_groups=without_groups,
        )
        return evaluation, feature_gradients

    def _score_average(self, parts: Sequence[Sampled]) -> Evaluation:
        """Shrink the targets towards the average that was sampled, or learn that they stay as they are.

        Raises:
            MetricError: the real images say nothing that the average does not.
        """
        cost = Cost.of_parts([cost for _, cost in parts])
        metrics = self.scores.metrics_of_average(cost.images)
        if not all(state for state, _ in parts):
            notice("an average of the checkpoints cannot sample, so the loss compares with few real images alone")
            self._knows_targets = True
            return Evaluation(0.0, cost=cost)
        for state, _ in parts:
            metrics.merge(state)
        is_probe = self._images_of_average is None
        with self._metric_threads():
            is_shrunk = self.scores.shrink(metrics.state, is_probe=is_probe)
        self._images_of_average = cost.images
        self._knows_targets = not (is_probe and is_shrunk)
        return Evaluation(0.0, cost=cost)

    def vjp(
        self,
        candidate: Candidate,
        first: int,
        last: int,
        back: FeatureGradients,
    ) -> tuple[Coefficients, Cost]:
        """The vector-Jacobian product of the images ``[first, last)``: what they contribute to the gradient.

        If they were sampled just before, the last batch still has its graph. All other batches are
        sampled again.

        Raises:
            MetricError: the gradient is not finite.
        """
        return self._batch_sizes.retry_smaller(lambda: self._second_gradient_pass(candidate, first, last, back))

    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:
        """The first ``count`` images of a group of noise as they are saved: ``[count, C, H, W]`` in [-1, 1].

        Coefficients that are all zero are the base model without a LoRA.
        """
        self._load(merged_or_base(self._placed_trajectory, coefficients), coefficients)
        return self._batch_sizes.images(count, functools.partial(self._stages[0].sample, noise))

    def real_images(self, count: int) -> Tensor | None:
        """Some of those that searches compare with.

        Raises:
            MetricError: they cannot be read.
        """
        return self._some_real_images(count)

    def features(self, images: Tensor) -> npt.NDArray[np.float64]:
        """``[N, C, H, W]`` → ``[N, D]``, by the extractor of the loss."""
        return extract(self.scores.extractor, images, batch_size=self._batch_sizes.without_graph)

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if they are estimated again."""
        if self._batch_norm is None or is_saved(coefficients):
            return {}
        self._load(self._placed_trajectory.merge(coefficients), coefficients)
        return self._batch_norm.values()

    @property
    def _placed_trajectory(self) -> Trajectory:
        """The trajectory, from the first use on merged on the model's device if that can merge.

        It is not placed when the objective is built, since an export that only merges needs no copy on the device.
        """
        if not self._is_placed:
            self.trajectory = self.trajectory.on(self.device)
            self._is_placed = True
        return self.trajectory

    def _metric_threads(self) -> contextlib.AbstractContextManager[None]:
        """One BLAS thread for small matrices: a second one would wait until the sampler's threads stop spinning."""
        return blas_threads(1 if self.scores.dimension <= SMALL_MATRICES else None)

    def _load(self, weights: Mapping[str, Tensor], coefficients: Coefficients) -> None:
        """Put merged weights into the model. The graph of its former weights is useless then.

        What was saved keeps the statistics of batch normalization that it was saved with.
        """
        self._close_gradient_pass()
        self._stages[0].load(weights, as_saved=is_saved(coefficients))

    def _sample(
        self,
        candidate: Candidate,
        first: int,
        last: int,
        watch: Stopwatch,
    ) -> ImageMetrics:
        """The metrics of the images ``[first, last)``; for a gradient, :meth:`vjp` gets the graph of the last batch."""
        if candidate.noise.group == AVERAGE.group:
            metrics = self.scores.metrics_of_average(self.images_of(candidate))
        else:
            metrics = self.scores.image_metrics(candidate, self.images_of(candidate))
        stages = self._stages[candidate.sampler]
        end_without_graph = last
        if candidate.gradient:
            end_without_graph = self._batch_sizes.start_of_last(first, last)
        for start, stop in self._batch_sizes.batches(first, end_without_graph):
            stop_if_told()
            with watch.timing("sample"):
                images = stages.sample(candidate.noise, start, stop)
            with watch.timing("features"):
                stages.add_features(metrics, images, candidate.noise, start)
        if candidate.gradient:
            self._gradient_pass = GradientPass(stages, self._placed_trajectory, candidate, first, last)
            try:
                self._gradient_pass.sample_last_batch(metrics, end_without_graph, watch)
            except BaseException:  # the graph holds memory, which another try with smaller batches needs
                self._close_gradient_pass()
                raise
        return metrics

    def _second_gradient_pass(
        self, candidate: Candidate, first: int, last: int, back: FeatureGradients
    ) -> tuple[Coefficients, Cost]:
        """As :meth:`vjp`. Where :meth:`sample` left no graph of these images, their weights are merged again."""
        watch = Stopwatch()
        gradient_pass = self._gradient_pass
        if gradient_pass is None or not gradient_pass.is_of(candidate, first, last):
            with watch.timing("merge"):
                self._load(self._placed_trajectory.merge(candidate.coefficients), candidate.coefficients)
            stages = self._stages[candidate.sampler]
            gradient_pass = GradientPass(stages, self._placed_trajectory, candidate, first, last)
            self._gradient_pass = gradient_pass
        try:
            return gradient_pass.product(back, self._batch_sizes, watch)
        finally:
            self._close_gradient_pass()

    def _close_gradient_pass(self) -> None:
        if self._gradient_pass is not None:
            self._gradient_pass.close()
            self._gradient_pass = None


def _real_images_per_dimension(scores: MetricSuite) -> float | None:
    """Real images per effective dimension of their features; the lowest of the loss's extractors."""
    ratios = []
    for metric in scores.loss.metrics:
        reference = scores.references[metric.extractor]
        if metric.has_own_features or reference.count is None or reference.gaussian is None:
            continue  # no distance to real images in features of a network
        dimension = effective_dimension(reference.gaussian.cov)
        if dimension:  # zero where all real images are the same
            ratios.append(reference.count / dimension)
    return min(ratios, default=None)


def _divided(gradients: Mapping[str, npt.NDArray[Any]], counts: Sequence[int]) -> list[FeatureGradients]:
    """The rows of ``gradients`` for consecutive parts of ``counts`` images."""
    ends = np.cumsum(counts)
    return [
        {name: gradient[start:end] for name, gradient in gradients.items()}
        for start, end in zip(ends - counts, ends, strict=True)
    ]
