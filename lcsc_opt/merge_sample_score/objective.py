"""The objective that this project exists for: coefficients → merged weights → images → features → loss and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lcsc_opt.errors import ObjectiveError
from lcsc_opt.merge_sample_score.gradient import WeightGradient, says_out_of_memory
from lcsc_opt.metrics import Scores, extract
from lcsc_opt.metrics.accumulator import Accumulator
from lcsc_opt.objective import Objective
from lcsc_opt.progress import notice
from lcsc_opt.records import HELD_OUT, SELECTION, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.sampling import DifferentiableSampler, Sampler

SMALL_MATRICES = 256  # features, below which a second BLAS thread does not help
REPORTED = (SELECTION.group, HELD_OUT.group)  # noise on which held-out metrics are computed, too
DEFAULT_IMAGES = 10_000  # Liu et al. 2024, Section 5.1


@dataclasses.dataclass
class _Stopwatch:
    """Wall-clock seconds of each part of an evaluation."""

    merge: float = 0.0
    sample: float = 0.0
    features: float = 0.0
    metric: float = 0.0

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - start)


class Combinable(Protocol):
    """What candidates are merged from: a trajectory, or one whose LoRA products are combined."""

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        ...

    @property
    def sha256(self) -> str:
        """The identity of what is combined, and how."""
        ...

    @property
    def touched(self) -> bool:
        """Whether the weights were written again since the identity was computed."""
        ...

    def verify(self) -> None:
        """Compare the weights with the hashes that the identity is made of; raises where they differ."""
        ...

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:
        """The combination for ``[K]`` coefficients that sum to one."""
        ...

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints."""
        ...


@runtime_checkable
class DifferentiableCombinable(Combinable, Protocol):
    """One whose merge is linear in the coefficients."""

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""
        ...

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """The gradient in the merged tensors, by name → the gradient in the coefficients, ``[K]``."""
        ...


class MergeSampleScore(Objective):
    """Loss and metrics of the images that the merged model samples, and the gradient of the loss.

    The gradient takes two passes: the features of all images without a graph give the gradient of the loss in them;
    then the images are sampled again, batch by batch, with a graph. The last batch keeps its graph between the two, so
    that one batch of images is sampled once. Memory does not depend on the number of images.

    Args:
        trajectory: K checkpoints.
        sampler: puts merged weights into the model and samples.
        scores: images → loss and metrics.
        images: how many one evaluation of a search samples.
        batch_size: images at once.
        gradient_batch_size: images that have a graph at once, which takes as much memory as training does; ``None``
            takes the batch size. It does not change the loss.

    Raises:
        ObjectiveError: when the numbers make no sense.
    """

    def __init__(
        self,
        trajectory: Combinable,
        sampler: Sampler,
        scores: Scores,
        *,
        images: int = DEFAULT_IMAGES,
        batch_size: int = 500,
        gradient_batch_size: int | None = None,
    ) -> None:
        if images < 2 or batch_size < 1:
            raise ObjectiveError(f"expected at least 2 images and a batch_size from 1, got {images} and {batch_size}")
        if gradient_batch_size is not None and gradient_batch_size < 1:
            raise ObjectiveError(f"gradient_batch_size: expected at least 1, got {gradient_batch_size}")
        for warning in scores.warnings(images):
            notice(warning)
        self.trajectory, self.sampler, self.scores = trajectory, sampler, scores
        self._images, self._batch_size = images, batch_size
        self._gradient_batch_size = batch_size if gradient_batch_size is None else min(gradient_batch_size, batch_size)
        self._threads = ThreadpoolController()

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the trajectory."""
        return self.trajectory.steps

    @property
    def images_per_evaluation(self) -> int:
        """How many images a candidate of a search costs."""
        return self._images

    @property
    def second_metric(self) -> str | None:
        """The held-out metric in features that the loss does not look at."""
        metric = self.scores.second_metric
        return None if metric is None else str(metric)

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints."""
        return self.trajectory.gram()

    def why_no_gradient(self) -> str | None:
        """What of scores, sampler and trajectory has no gradient; ``None`` where all have one."""
        return self.scores.why_no_gradient() or _why_no_weight_gradient(self.trajectory, self.sampler)

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Merge, sample, extract features, and compute the metrics: the held-out ones too on the noise of a report.

        In ``cost``, model calls count every call, those of a backward pass as two; its seconds belong to the part that
        it goes back through.

        Raises:
            ObjectiveError: when a sample is not finite, or when there is no gradient where one is asked for.
            MetricError: when features are not, or cannot be scored.
        """
        start = time.perf_counter()
        if gradient and (reason := self.why_no_gradient()):
            raise ObjectiveError(f"a gradient was asked for, and {reason}")
        watch = _Stopwatch()
        count = self._images if candidate.images is None else candidate.images
        accumulator = self.scores.accumulator(count, held_out=candidate.noise.group in REPORTED)
        with watch.timing("merge"):
            self._load(candidate.coefficients)
        slope, calls = None, count * self.sampler.nfe
        if gradient:
            slope, extra = self._gradient(candidate.noise, count, accumulator, watch)
            calls += extra
        else:
            self._add_batches(accumulator, candidate.noise, count, watch)
        with watch.timing("metric"), self._metric_threads():
            loss, metrics = accumulator.result()
        cost = Cost(
            images=count,
            model_calls=calls,
            seconds=time.perf_counter() - start,
            merge_seconds=watch.merge,
            sample_seconds=watch.sample,
            features_seconds=watch.features,
            metric_seconds=watch.metric,
        )
        return Evaluation(loss, metrics, cost, slope)

    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:
        """The first ``count`` images of a group of noise: ``[count, C, H, W]`` in [-1, 1]."""
        self._load(coefficients)
        return torch.cat([self._sample(noise, first, last).cpu() for first, last in _ranges(count, self._batch_size)])

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
            "batch_size": self._batch_size,
        }

    def _metric_threads(self) -> contextlib.AbstractContextManager[object]:
        """One BLAS thread for small matrices: a second one only waits for the threads that sampled to stop spinning."""
        small = self.scores.dimension <= SMALL_MATRICES
        return self._threads.limit(limits=1, user_api="blas") if small else contextlib.nullcontext()

    def _load(self, coefficients: Coefficients) -> None:
        self.sampler.load(self.trajectory.merge(coefficients))

    def _add_batches(self, accumulator: Accumulator, noise: Noise, count: int, watch: _Stopwatch) -> None:
        for first, last in _ranges(count, self._batch_size):
            with watch.timing("sample"):
                images = self._sample(noise, first, last)
            with watch.timing("features"):
                accumulator.add(images)

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def _gradient(
        self, noise: Noise, count: int, accumulator: Accumulator, watch: _Stopwatch
    ) -> tuple[Coefficients, int]:
        """The gradient ``[K]``, and the model calls that an evaluation without it would not take."""
        trajectory, sampler = self.trajectory, self.sampler
        assert isinstance(trajectory, DifferentiableCombinable)  # why_no_gradient would have said so
        assert isinstance(sampler, DifferentiableSampler)
        kept = min((count - 1) % self._batch_size + 1, self._gradient_batch_size)
        self._add_batches(accumulator, noise, count - kept, watch)
        with says_out_of_memory(), sampler.weights.differentiable(trajectory.varying) as leaves:
            total = WeightGradient(leaves)
            gradients = self._back_through_last(total, noise, count - kept, count, accumulator, watch)
            for first, last in _ranges(count - kept, self._gradient_batch_size):
                self._back_through(total, noise, first, last, gradients, watch)
        with watch.timing("merge"):
            slope = trajectory.project(total.sums)
        if not np.isfinite(slope).all():
            raise ObjectiveError("the gradient is not finite")
        again = (count - kept) * sampler.nfe + count * sampler.recomputed
        return slope, again + 2 * count * sampler.nfe

    def _back_through_last(
        self, total: WeightGradient, noise: Noise, first: int, last: int, accumulator: Accumulator, watch: _Stopwatch
    ) -> Mapping[str, Tensor]:
        """Complete the features with those of the last batch, whose graph is kept; the loss's gradients in them all."""
        with watch.timing("sample"):
            images = self._sample_finite(noise, first, last)
        leaf = images.detach().requires_grad_()
        with watch.timing("features"):
            features = accumulator.add_with_graph(leaf)
        with watch.timing("metric"), self._metric_threads():
            gradients = accumulator.loss_gradients()
        with watch.timing("features"):
            names = tuple(gradients)
            rows = [gradients[name][first:last] for name in names]
            [gradient] = torch.autograd.grad([features[name] for name in names], leaf, rows)
        with watch.timing("sample"):
            total.add(images, gradient)
        return gradients

    def _back_through(
        self,
        total: WeightGradient,
        noise: Noise,
        first: int,
        last: int,
        gradients: Mapping[str, Tensor],
        watch: _Stopwatch,
    ) -> None:
        """Sample one batch again, with a graph, and go back through it."""
        with watch.timing("sample"):
            images = self._sample_finite(noise, first, last)
        with watch.timing("features"):
            gradient = self.scores.image_gradient(images, {name: g[first:last] for name, g in gradients.items()})
        with watch.timing("sample"):
            total.add(images, gradient)

    @torch.no_grad()  # inference mode would save nothing, and what networks keep from it has no place in a graph
    def _sample(self, noise: Noise, first: int, last: int) -> Tensor:
        return self._sample_finite(noise, first, last)

    def _sample_finite(self, noise: Noise, first: int, last: int) -> Tensor:
        images = self.sampler.sample(noise, first, last)
        if not bool(torch.isfinite(images).all()):
            raise ObjectiveError("the merged model samples values that are not finite")
        return images


def _ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """``[first, last)`` of at most ``size`` images each."""
    for first in range(0, count, size):
        yield first, min(first + size, count)


def _why_no_weight_gradient(trajectory: Combinable, sampler: Sampler) -> str | None:
    if not isinstance(trajectory, DifferentiableCombinable):
        return f"{type(trajectory).__name__} combines checkpoints in a way that has no gradient"
    if not isinstance(sampler, DifferentiableSampler):
        return f"{type(sampler).__name__} samples without a graph"
    return sampler.weights.why_no_gradient(trajectory.varying)
