"""The objective that this project exists for: coefficients → merged weights → images → features → loss and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lcsc_opt.errors import ObjectiveError
from lcsc_opt.metrics import Scores, extract
from lcsc_opt.objective import Objective
from lcsc_opt.progress import notice
from lcsc_opt.records import SEARCH, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.sampling import Sampler

SMALL_MATRICES = 256  # features, below which a second BLAS thread does not help
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


class MergeSampleScore(Objective):
    """Loss and metrics of the images that the merged model samples.

    Args:
        trajectory: K checkpoints.
        sampler: puts merged weights into the model and samples.
        scores: images → loss and metrics.
        images: how many one evaluation of a search samples.
        batch_size: images at once.

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
    ) -> None:
        if images < 2 or batch_size < 1:
            raise ObjectiveError(f"expected at least 2 images and a batch_size from 1, got {images} and {batch_size}")
        for warning in scores.warnings(images):
            notice(warning)
        self.trajectory, self.sampler, self.scores = trajectory, sampler, scores
        self._images, self._batch_size = images, batch_size
        self._threads = ThreadpoolController()

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the trajectory."""
        return self.trajectory.steps

    @property
    def images_per_evaluation(self) -> int:
        """How many images a candidate of a search costs."""
        return self._images

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints."""
        return self.trajectory.gram()

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Merge, sample, extract features, and compute the metrics: the held-out ones too, unless on search noise.

        Raises:
            ObjectiveError: when a sample is not finite.
            MetricError: when features are not, or cannot be scored.
        """
        start = time.perf_counter()
        watch = _Stopwatch()
        count = self._images if candidate.images is None else candidate.images
        accumulator = self.scores.accumulator(count, held_out=candidate.noise.group != SEARCH.group)
        with watch.timing("merge"):
            self._load(candidate.coefficients)
        for first, last in self._batches(count):
            with watch.timing("sample"):
                images = self._sample(candidate.noise, first, last)
            with watch.timing("features"):
                accumulator.add(images)
        with watch.timing("metric"), self._metric_threads():
            loss, metrics = accumulator.result()
        cost = Cost(
            images=count,
            model_calls=count * self.sampler.nfe,
            seconds=time.perf_counter() - start,
            merge_seconds=watch.merge,
            sample_seconds=watch.sample,
            features_seconds=watch.features,
            metric_seconds=watch.metric,
        )
        return Evaluation(loss, metrics, cost)

    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:
        """The first ``count`` images of a group of noise: ``[count, C, H, W]`` in [-1, 1]."""
        self._load(coefficients)
        return torch.cat([self._sample(noise, first, last).cpu() for first, last in self._batches(count)])

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

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        for first in range(0, count, self._batch_size):
            yield first, min(first + self._batch_size, count)

    @torch.inference_mode()
    def _sample(self, noise: Noise, first: int, last: int) -> Tensor:
        images = self.sampler.sample(noise, first, last)
        if not bool(torch.isfinite(images).all()):
            raise ObjectiveError("the merged model samples values that are not finite")
        return images
