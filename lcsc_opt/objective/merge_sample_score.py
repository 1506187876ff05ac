"""The objective that this project exists for: coefficients → merged weights → images → features → loss and metrics."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.base.reproducibility import blas_threads
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.metrics import MetricSuite, extract
from lcsc_opt.metrics.image_metrics import ImageMetrics, ImageState
from lcsc_opt.metrics.loss import Constraint
from lcsc_opt.metrics.names import MetricName
from lcsc_opt.objective.contract import Mergeable, StagedObjective, stop_if_told
from lcsc_opt.objective.gradient import WeightGradient
from lcsc_opt.sampling import DifferentiableSampler, Sampler
from lcsc_opt.sampling.base import prompts_of
from lcsc_opt.sampling.batch_norm import BATCH, IMAGES, BatchNormStatistics
from lcsc_opt.trajectory import Trajectory

SMALL_MATRICES = 256  # features, below which a second BLAS thread does not help
DEFAULT_IMAGES = 10_000  # Liu et al. 2024, Section 5.1
DEFAULT_BATCH = 500
AUTO: Literal["auto"] = "auto"
GRAPH_MEMORY = 4  # with batch_size: auto; a graph multiplies the memory of a batch by about this
FEWEST_KEPT = 5_000  # images of EMA*, whose precision is kept: a standard error of at most 0.007

T = TypeVar("T")

FeatureGradients = dict[str, npt.NDArray[np.floating[Any]]]
"""Extractor's name → the derivative of the loss in the features of some images, ``[n, D]``."""

Merged = tuple[dict[str, Tensor], Cost]
"""The merged weights of one candidate, name → tensor, until they are in the model; and what merging took."""

Sampled = tuple[ImageState, Cost]
"""What the images of a part gave, which can be pickled; and what they cost, merging included."""


class MergeSampleScore(StagedObjective):
    """Loss and metrics of the images that the merged model samples, and the gradient of the loss.

    The gradient takes two passes. The first one samples all images without a graph; their features give the gradient of
    the loss in the features. The second one samples the images again with a graph, batch by batch. The last batch keeps
    its graph from the first pass and is not sampled again. Memory does not depend on the number of images.

    Args:
        trajectory: K checkpoints.
        sampler: puts merged weights into the model and samples.
        scores: images → loss and metrics.
        images: the number of images in an evaluation of a search.
        batch_size: images that are sampled at once; ``auto`` is the default, and half of it whenever memory runs out.
        gradient_batch_size: images with a graph at once, which take as much memory as training does. The default is the
            batch size, or a quarter of an automatic one. It does not change the loss.
        device: of the sampler's model; candidates are merged in its memory.
        batch_norm: estimates the statistics of batch normalization again for each candidate; ``None`` merges them.
    """

    trajectory: Mergeable
    sampler: Sampler

    def __init__(
        self,
        trajectory: Mergeable,
        sampler: Sampler,
        scores: MetricSuite,
        *,
        images: int = DEFAULT_IMAGES,
        batch_size: int | Literal["auto"] = DEFAULT_BATCH,
        gradient_batch_size: int | None = None,
        device: torch.device | str = "cpu",
        batch_norm: BatchNormStatistics | None = None,
    ) -> None:
        for warning in scores.warnings(images):
            notice(warning)
        self.trajectory, self.sampler, self.scores = trajectory, sampler, scores
        self._images, self._halves, self.device = images, batch_size == AUTO, torch.device(device)
        self._batch_size = min(DEFAULT_BATCH, images) if batch_size == AUTO else batch_size
        usual = max(self._batch_size // GRAPH_MEMORY, 1) if self._halves else self._batch_size
        self._gradient_batch_size = min(gradient_batch_size or usual, self._batch_size)
        self.overlaps = self.device.type != "cpu"  # on a CPU, merging and metrics take the same cores as sampling
        self._batch_norm = batch_norm
        self._moved: tuple[Mergeable, Mergeable] | None = None
        self._kept: WeightGradient | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the trajectory."""
        return self.trajectory.steps

    @property
    def images_per_evaluation(self) -> int:
        """The number of images of a candidate of a search."""
        return self._images

    @property
    def cross_check_metric(self) -> str | None:
        """The held-out metric in features that the loss does not see."""
        return None if (metric := self.scores.cross_check_metric) is None else str(metric)

    @property
    def evaluation_metrics(self) -> Mapping[str, int]:
        """The held-out metrics that are not the loss."""
        with self._metric_threads():
            return self.scores.signs

    def real_halves(self) -> Mapping[str, float]:
        """Metric → its value for held-out real images in place of samples."""
        with self._metric_threads():
            return self.scores.real_halves()

    @property
    def real_images_per_feature(self) -> float | None:
        """In the features of the loss that have the fewest."""
        references = [self.scores.references[name] for name in self.scores.extractors]
        known = [one.count / one.extractor.dimension for one in references if one.count is not None]
        return min(known, default=None)

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, or ``None``."""
        if reason := MetricName.why_no_gradient(self.scores.weights):
            return reason
        if not isinstance(self.sampler, DifferentiableSampler):
            return f"{type(self.sampler).__name__} samples without a graph"
        return self.sampler.weights.why_no_gradient(self.trajectory.varying)

    def on_weights(self, weights: Mergeable) -> MergeSampleScore:
        """The same objective for weights on the device of the sampler's model. Never use both at the same time."""
        other = copy.copy(self)
        other.trajectory, other._moved, other._kept = weights, None, None
        return other

    def release(self) -> None:
        """Free the device's memory that holds checkpoints; the next merge puts them there again."""
        self._forget_graph()
        self._moved = None

    def images_of(self, candidate: Candidate) -> int:
        """How many images a candidate is evaluated on."""
        return self._images if candidate.images is None else candidate.images

    def prepare(self, candidate: Candidate) -> Merged:
        """Merge."""
        watch = _Stopwatch()
        with watch.timing("merge"):
            weights = self._source.merge(candidate.coefficients)
        return weights, watch.cost()

    def sample(
        self, candidate: Candidate, prepared: Merged, first: int, last: int, *, gradient: bool = False
    ) -> Sampled:
        """Put the merged weights into the model, sample the images ``[first, last)``, and take their features.

        ``prepared`` is used once: its weights are freed before images are sampled.

        Raises:
            MetricError: an image, or its features, are not finite.
        """
        self.know_constraint()
        watch = _Stopwatch()
        weights, merging = prepared
        with watch.timing("merge"):
            self._load(weights)
            weights.clear()
        metrics = self._fitting(lambda: self._sampled(candidate, first, last, gradient, watch))
        with watch.timing("features"):
            state = metrics.state
        return state, merging + watch.cost(images=last - first, model_calls=(last - first) * self.sampler.nfe)

    def know_constraint(self) -> None:
        """Evaluate EMA*, the best of the window's EMA rates, once, if a metric is kept; none of it counts as searched.

        Where EMA*'s precision is the bound, it is measured on at least :data:`FEWEST_KEPT` images.
        """
        keep = self.scores.keep
        if keep is None or self.scores.constraint is not None:
            return

        def measured(rate: float, images: int) -> Constraint:
            candidate = Candidate(ema_coefficients(self.steps, rate), images=images)
            self._load(self._source.merge(candidate.coefficients))
            metrics = self._fitting(lambda: self._sampled(candidate, 0, images, False, _Stopwatch()))
            with self._metric_threads():
                return metrics.constraint()

        found = [(measured(rate, self._images), rate) for rate in window_ema_rates(self.steps)]
        best, rate = min(found, key=lambda pair: pair[0].loss)
        if self.scores.bound is not None:
            best = dataclasses.replace(best, value=self.scores.bound)
        elif keep.formula == "precision" and self._images < FEWEST_KEPT:
            best = dataclasses.replace(measured(rate, FEWEST_KEPT), loss=best.loss)
        self.scores.constraint = best

    def _fitting(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; after each time that memory runs out again, with batches half as large."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self._halves or self._batch_size == 1:
                    raise
            free_memory()  # out here the exception is gone, and with it the memory that it held
            self._batch_size //= 2
            self._gradient_batch_size = max(self._gradient_batch_size // 2, 1)
            notice(f"batch_size: auto: out of memory; going on with {self._batch_size} images at once")

    def _sampled(self, candidate: Candidate, first: int, last: int, gradient: bool, watch: _Stopwatch) -> ImageMetrics:
        """The metrics of these images."""
        held_out = candidate.noise.group == HELD_OUT.group
        metrics = self.scores.image_metrics(self.images_of(candidate), held_out=held_out, gradient=gradient)
        kept = self._last_batch(first, last) if gradient else last
        self._update(metrics, candidate.noise, first, kept, watch)
        if gradient:
            self._keep_graph(metrics, candidate, (first, last), kept, watch)
        return metrics

    def score(
        self, candidate: Candidate, parts: Sequence[Sampled], *, gradient: bool = False
    ) -> tuple[Evaluation, list[FeatureGradients | None]]:
        """Loss and metrics from all parts in the order of their images; with ``gradient`` also what :meth:`vjp` needs.

        Raises:
            MetricError: the features cannot be scored.
        """
        self.know_constraint()
        watch = _Stopwatch()
        held_out = candidate.noise.group == HELD_OUT.group
        back: list[FeatureGradients | None] = [None] * len(parts)
        with watch.timing("metric"), self._metric_threads():
            whole = self.scores.image_metrics(self.images_of(candidate), held_out=held_out, gradient=gradient)
            for state, _ in parts:
                whole.merge(state)
            if gradient:
                ends = np.cumsum([cost.images for _, cost in parts])[:-1]
                rows = {name: np.split(all_, ends) for name, all_ in whole.gradients(candidate.keep_weight).items()}
                back = [{name: split[i] for name, split in rows.items()} for i in range(len(parts))]
            loss, metrics = whole.compute()
            violation, unseen = whole.violation(), None if gradient else whole.unseen(loss)
        cost = Cost.of_parts([cost for _, cost in parts]) + watch.cost()
        return Evaluation(loss, metrics, cost, violation=violation, unseen=unseen), back

    def vjp(self, candidate: Candidate, first: int, last: int, back: FeatureGradients) -> tuple[Coefficients, Cost]:
        """The vector-Jacobian product of the images ``[first, last)``: what they contribute to the gradient.

        If they were sampled with ``gradient`` just before, the last batch still has its graph. All other batches are
        sampled again.

        Raises:
            MetricError: the gradient is not finite.
        """
        return self._fitting(lambda: self._product(candidate, first, last, back))

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def _product(self, candidate: Candidate, first: int, last: int, back: FeatureGradients) -> tuple[Any, Cost]:
        watch, sampler = _Stopwatch(), self.sampler
        assert isinstance(sampler, DifferentiableSampler)  # why_no_gradient would have said so

        def rows(start: int, stop: int) -> dict[str, Tensor]:
            return {name: torch.from_numpy(part[start - first : stop - first]) for name, part in back.items()}

        kept = self._kept is not None and self._kept.keeps(candidate, first, last)
        if self._kept is None or not kept:
            with watch.timing("merge"):
                self._load(self._source.merge(candidate.coefficients))
            self._kept = WeightGradient(sampler.weights.differentiable(self._source.varying))
        total = self._kept
        end = total.first if kept else self._last_batch(first, last)
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget_graph)
            for start, stop in [(end, last), *_ranges(first, end, self._gradient_batch_size)]:
                stop_if_told()
                with watch.timing("sample"):
                    again = not kept or start != end
                    images = self._sample_finite(candidate.noise, start, stop) if again else total.images
                with watch.timing("features"):
                    prompts = prompts_of(sampler, candidate.noise, start, stop)
                    gradient = self.scores.image_gradient(images, rows(start, stop), prompts)
                with watch.timing("sample"):
                    total.add(images, gradient)
            with watch.timing("merge"):
                product = self._source.project(total.sums)
                if product.ndim > candidate.coefficients.ndim:
                    product = product.sum(axis=0)
        if not np.isfinite(product).all():
            raise MetricError("the gradient is not finite")
        calls = ((end if kept else last) - first) * sampler.nfe + (last - first) * sampler.recomputed
        return product, watch.cost(model_calls=calls + 2 * (last - first) * sampler.nfe)

    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:
        """The first ``count`` images of a group of noise: ``[count, C, H, W]`` in [-1, 1]."""
        self._load(self._source.merge(coefficients))
        return self._fitting(
            lambda: torch.cat([self._sample(noise, *batch).cpu() for batch in _ranges(0, count, self._batch_size)])
        )

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if they are estimated again."""
        if self._batch_norm is None:
            return {}
        self._load(self._source.merge(coefficients))
        return self._batch_norm.values()

    def features(self, images: Tensor) -> npt.NDArray[np.float64]:
        """``[N, C, H, W]`` → ``[N, D]``, by the extractor of the loss."""
        return extract(self.scores.extractor, images, batch_size=self._batch_size)

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash, the sampler, the metrics with extractors and references, and the number of images."""
        return {
            "trajectory": self.trajectory.sha256,
            "sampler": self.sampler.describe(),
            "scores": self.scores.describe(),
            "images": self._images,
            "batch_size": AUTO if self._halves else self._batch_size,
            "batch_norm": None if self._batch_norm is None else {"images": IMAGES, "batch": BATCH},
        }

    @property
    def _source(self) -> Mergeable:
        """The trajectory on the model's device if it can be merged there, else the one in this machine's memory."""
        if self._moved is None or self._moved[0] is not self.trajectory:
            own = self.trajectory
            self._moved = own, own.on(self.device) if isinstance(own, Trajectory) else own
        return self._moved[1]

    def _metric_threads(self) -> contextlib.AbstractContextManager[None]:
        """One BLAS thread for small matrices: a second one would wait until the sampler's threads stop spinning."""
        return blas_threads(1 if self.scores.dimension <= SMALL_MATRICES else None)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        self._forget_graph()
        self.sampler.load(weights)
        if self._batch_norm is not None:
            self._batch_norm.estimate()

    def _update(self, metrics: ImageMetrics, noise: Noise, first: int, last: int, watch: _Stopwatch) -> None:
        for start, stop in _ranges(first, last, self._batch_size):
            stop_if_told()
            with watch.timing("sample"):
                images = self._sample(noise, start, stop)
            with watch.timing("features"):
                metrics.update(images, prompts=prompts_of(self.sampler, noise, start, stop))

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def _keep_graph(
        self, metrics: ImageMetrics, candidate: Candidate, part: tuple[int, int], first: int, watch: _Stopwatch
    ) -> None:
        """Take the features of the last batch, and keep its graph until :meth:`vjp`."""
        assert isinstance(self.sampler, DifferentiableSampler)  # why_no_gradient would have said so
        total = WeightGradient(self.sampler.weights.differentiable(self._source.varying))
        try:
            with watch.timing("sample"):
                images = self._sample_finite(candidate.noise, first, part[1])
            with watch.timing("features"):
                prompts = prompts_of(self.sampler, candidate.noise, first, part[1])
                metrics.update(images.detach(), prompts=prompts)
        except BaseException:
            total.close()
            raise
        total.keep(candidate, part, images)
        self._kept = total

    def _last_batch(self, first: int, last: int) -> int:
        """The first image of the last batch, whose graph is kept."""
        return last - min((last - first - 1) % self._batch_size + 1, self._gradient_batch_size)

    def _forget_graph(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    @torch.no_grad()  # inference mode saves nothing, and a later graph cannot use tensors that networks keep from it
    def _sample(self, noise: Noise, first: int, last: int) -> Tensor:
        return self._sample_finite(noise, first, last)

    def _sample_finite(self, noise: Noise, first: int, last: int) -> Tensor:
        images = self.sampler.sample(noise, first, last)
        if not bool(torch.isfinite(images).all()):
            raise MetricError("the merged model samples values that are not finite")
        return images


def _ranges(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """``[first, last)`` as ranges of at most ``size`` images."""
    for start in range(first, last, size):
        yield start, min(start + size, last)


class _Stopwatch:
    """Wall-clock seconds of the stages of an evaluation: ``merge``, ``sample``, ``features``, ``metric``."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("merge", "sample", "features", "metric"), 0.0)

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the time while this is open for that part."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def cost(self, *, images: int = 0, model_calls: int = 0) -> Cost:
        """The seconds of all parts."""
        parts = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        return Cost(images=images, model_calls=model_calls, seconds=sum(parts.values()), **parts)
