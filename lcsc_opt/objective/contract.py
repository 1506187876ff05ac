"""The contract of objectives."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import dataclasses
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.coefficients.profiles import check_coefficients

if TYPE_CHECKING:  # torch is imported by objectives that need it
    from torch import Tensor

    from lcsc_opt.sampling import Sampler

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("stop", default=None)


class Mergeable(Protocol):
    """Checkpoints that can be merged: a trajectory, or anything else that merges linearly in the coefficients."""

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        ...

    @property
    def sha256(self) -> str:
        """Identifies what is merged, and how."""
        ...

    @property
    def touched(self) -> bool:
        """Whether the weights were written again since the identity was computed."""
        ...

    def verify(self) -> None:
        """Compare the weights with the hashes in the identity; raises TrajectoryError where they differ."""
        ...

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:
        """The linear combination for ``[K]`` coefficients that sum to one."""
        ...

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints."""
        ...

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""
        ...

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """The gradient in the merged tensors, by name → the gradient in the coefficients, ``[K]``."""
        ...


class Objective(abc.ABC):
    """A black box over coefficients: ``objective(coefficients) -> float``, lower is better.

    Nothing in the runner, the optimizers or the database knows about images; they know this class.

    Attributes:
        trajectory: the checkpoints that it merges, for exports, checks and profiles; ``None`` without weights.
        sampler: samples images with the merged weights; ``None`` without images.
        code: name → digest, of each of the user's modules that the objective was loaded from.
    """

    trajectory: Mergeable | None = None
    sampler: Sampler | None = None
    code: Mapping[str, str] = types.MappingProxyType({})

    @property
    @abc.abstractmethod
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints that coefficients combine, strictly increasing."""

    @abc.abstractmethod
    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Evaluate one candidate; with ``gradient``, also the gradient of the loss in its coefficients.

        Raises:
            Exception: any exception fails this trial, with its text as the reason; the study goes on.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that changes results. A study resumes only while this stays the same."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: :meth:`describe` and the code."""
        return {"objective": self.describe(), "code": dict(self.code)}

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, as the end of a sentence, or ``None``."""
        return "it gives a loss without a gradient"

    def why_nothing_held_out(self) -> str | None:
        """Why answers have no held-out loss, as the end of a sentence; ``None`` if ``candidate.noise`` matters."""
        return None

    @property
    def cross_check_metric(self) -> str | None:
        """The held-out metric that shows whether a gain in the loss is real; lower is better.

        For example FID in features that the loss does not see.
        """
        return None

    @property
    def evaluation_metrics(self) -> Mapping[str, int]:
        """Held-out metrics that are not the loss → 1, or -1 where higher is better.

        Reports compare each with its value at EMA*, and warn if the loss got better and one of these got worse.
        """
        return {} if self.cross_check_metric is None else {self.cross_check_metric: 1}

    def real_halves(self) -> Mapping[str, float]:
        """Metric → its value for held-out real images in place of samples; empty if none are held out."""
        return {}

    @property
    def images_per_evaluation(self) -> int:
        """How many images one evaluation of a search samples; 0 where there are none."""
        return 0

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:  # noqa: ARG002 - of those who have some
        """Tensors of the merged model that are computed, not merged, by name in the state dict. Exports hold them."""
        return {}

    def gram(self) -> npt.NDArray[np.float64] | None:
        """``[K, K]`` inner products of the centered checkpoints, or ``None`` without weights."""
        return None if self.trajectory is None else self.trajectory.gram()

    def __call__(self, coefficients: npt.ArrayLike) -> float:
        """The loss of ``[K]`` coefficients that sum to one."""
        checked = check_coefficients(coefficients, len(self.steps))
        return self.evaluate(Candidate(checked, noise=SEARCH)).loss


class StagedObjective(Objective):
    """An objective in stages. Stages of different candidates overlap, and images can be divided among workers.

    The stages of one candidate follow each other. Stages of different candidates run at the same time in different
    threads, but never two of the same kind. A stage that takes long calls :func:`stop_if_told` now and then.

    Attributes:
        overlaps: whether the stages use different parts of the machine, so that overlapping saves time.
    """

    overlaps: bool = False

    @abc.abstractmethod
    def images_of(self, candidate: Candidate) -> int:
        """How many images a candidate is evaluated on."""

    @abc.abstractmethod
    def prepare(self, candidate: Candidate) -> Any:
        """Merge. The result stays in this process."""

    @abc.abstractmethod
    def sample(self, candidate: Candidate, prepared: Any, first: int, last: int, *, gradient: bool = False) -> Any:
        """Sample the images ``[first, last)`` and reduce them to something small and picklable."""

    @abc.abstractmethod
    def score(
        self, candidate: Candidate, parts: Sequence[Any], *, gradient: bool = False
    ) -> tuple[Evaluation, Sequence[Any]]:
        """The evaluation, from all parts in the order of their images; with ``gradient`` also what :meth:`slope` needs.

        Returns:
            The :class:`Evaluation`, still without its gradient, and one picklable object for each part; ``None`` for
            each without ``gradient``.
        """

    @abc.abstractmethod
    def slope(self, candidate: Candidate, first: int, last: int, back: Any) -> tuple[Coefficients, Cost]:
        """What the images ``[first, last)`` contribute to the gradient ``[K]``, and what that cost.

        Usually called in the process that has just sampled this part with ``gradient``. If that process has died, or
        had several parts, what it kept must be computed again: bit for bit, if trials are to be repeatable.
        """

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Evaluate in one stage after the other, on all images.

        Raises:
            ObjectiveError: a gradient is wanted and unavailable.
            Exception: any that a stage raises.
        """
        start = time.perf_counter()
        if gradient and (reason := self.why_no_gradient()):
            raise ObjectiveError(f"a gradient was asked for, and {reason}")
        count = self.images_of(candidate)
        part = self.sample(candidate, self.prepare(candidate), 0, count, gradient=gradient)
        evaluation, [back] = self.score(candidate, [part], gradient=gradient)
        cost, slope = evaluation.cost, None
        if gradient:
            slope, extra = self.slope(candidate, 0, count, back)
            cost += extra
        cost = dataclasses.replace(cost, seconds=time.perf_counter() - start)
        return dataclasses.replace(evaluation, cost=cost, gradient=slope)


class Stopwatch:
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


class Stopped(BaseException):
    """Ends an evaluation that nobody waits for any more, as KeyboardInterrupt does in the main thread."""


def stop_with(flag: threading.Event) -> None:
    """From now on, setting ``flag`` stops the evaluation in this thread."""
    _stop.set(flag)


def stop_if_told() -> None:
    """Stop here, between two batches, if nobody waits for this evaluation any more.

    Raises:
        Stopped: nobody waits for it.
    """
    flag = _stop.get()
    if flag is not None and flag.is_set():
        raise Stopped
