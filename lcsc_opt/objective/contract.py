"""What an objective is."""

from __future__ import annotations

import abc
import contextvars
import dataclasses
import threading
import time
import types
from collections.abc import Mapping, Sequence
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
    """Checkpoints that are merged, linearly in the coefficients: a trajectory, or an own one in memory."""

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        ...

    @property
    def sha256(self) -> str:
        """The identity of what is merged, and how."""
        ...

    @property
    def touched(self) -> bool:
        """Whether the weights were written again since the identity was computed."""
        ...

    def verify(self) -> None:
        """Compare the weights with the hashes that the identity is made of; raises where they differ."""
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
        trajectory: the checkpoints that it merges, for exports, checks and profiles; ``None`` where it has no weights.
        sampler: what samples images with the merged weights; ``None`` where there are no images.
        code: digests of the user's own modules that it was loaded from, by name.
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
        """Evaluate one candidate, with the gradient of the loss in its coefficients where ``gradient`` asks for it.

        Raises:
            Exception: any; it fails this trial, with its reason, and the study goes on.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that changes results. A study resumes only where this is what it was."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: what :meth:`describe` says, and the code."""
        return {"objective": self.describe(), "code": dict(self.code)}

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, as the end of a sentence, or ``None``."""
        return "it gives a loss without a gradient"

    def why_nothing_held_out(self) -> str | None:
        """Why answers have no held-out loss, as the end of a sentence; ``None`` where ``candidate.noise`` matters."""
        return None

    @property
    def cross_check_metric(self) -> str | None:
        """The metric of held-out evaluations, lower is better, that a search cannot improve by cheating its loss.

        FID in features that the loss does not look at, say. ``None`` where there is none.
        """
        return None

    @property
    def judges(self) -> Mapping[str, int]:
        """Metrics of held-out evaluations that the loss is not made of → 1, or -1 where higher is better.

        Reports set each beside EMA*'s value, and warn where the loss gained and one of them got worse.
        """
        return {} if self.cross_check_metric is None else {self.cross_check_metric: 1}

    def floors(self) -> Mapping[str, float]:
        """Judge → its value for real images that the loss does not see, where some are held out."""
        return {}

    @property
    def images_per_evaluation(self) -> int:
        """How many images one evaluation of a search samples; 0 where there are none."""
        return 0

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:  # noqa: ARG002 - of those who have some
        """What of the merged model is not merged but computed, by its name in the state dict; exports hold it, too."""
        return {}

    def gram(self) -> npt.NDArray[np.float64] | None:
        """``[K, K]`` inner products of the centered checkpoints, or ``None`` where there are no weights."""
        return None if self.trajectory is None else self.trajectory.gram()

    def __call__(self, coefficients: npt.ArrayLike) -> float:
        """The loss of ``[K]`` coefficients that sum to one."""
        checked = check_coefficients(coefficients, len(self.steps))
        return self.evaluate(Candidate(checked, noise=SEARCH)).loss


class StagedObjective(Objective):
    """An objective whose evaluations go through stages, which overlap those of others, and divide into parts by images.

    The stages of one candidate follow each other; those of different candidates run at the same time in different
    threads, one at a time of each kind. A stage that takes long calls :func:`stop_if_told` now and then.

    Attributes:
        overlaps: whether the stages use different parts of the machine, so that it is worth to overlap them.
    """

    overlaps: bool = False

    @abc.abstractmethod
    def images_of(self, candidate: Candidate) -> int:
        """How many images a candidate is evaluated on."""

    @abc.abstractmethod
    def prepare(self, candidate: Candidate) -> Any:
        """Merge; the answer stays in the process."""

    @abc.abstractmethod
    def sample(self, candidate: Candidate, prepared: Any, first: int, last: int, *, gradient: bool = False) -> Any:
        """Sample the images ``[first, last)`` and reduce them to what is small, and travels between processes."""

    @abc.abstractmethod
    def score(
        self, candidate: Candidate, parts: Sequence[Any], *, gradient: bool = False
    ) -> tuple[Evaluation, Sequence[Any]]:
        """The evaluation, of all parts in the order of their images; with ``gradient`` also what each goes back from.

        Returns:
            The :class:`Evaluation`, its gradient still missing, and one object for each part, which travels, too;
            without ``gradient`` these are ``None``.
        """

    @abc.abstractmethod
    def slope(self, candidate: Candidate, first: int, last: int, back: Any) -> tuple[Coefficients, Cost]:
        """What the images ``[first, last)`` contribute to the gradient ``[K]``, and what that cost.

        Mostly called where this part was sampled with ``gradient`` just before, unless that process has died meanwhile,
        or had several parts; what was kept must then be made again, bit for bit where trials are to repeat.
        """

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """One stage after the other, on all images.

        Raises:
            ObjectiveError: a gradient is asked for, and unavailable.
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


class Stopped(BaseException):
    """Ends an evaluation that nobody waits for any more, as KeyboardInterrupt does in the main thread."""


def stop_with(flag: threading.Event) -> None:
    """Let the flag stop what this thread evaluates from now on."""
    _stop.set(flag)


def stop_if_told() -> None:
    """Look, between two batches, whether anybody still waits for this evaluation.

    Raises:
        Stopped: nobody does.
    """
    flag = _stop.get()
    if flag is not None and flag.is_set():
        raise Stopped
