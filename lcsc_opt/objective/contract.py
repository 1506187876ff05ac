"""The contract of objectives, and any Python callable over coefficients as one."""

from __future__ import annotations

import abc
import contextvars
import dataclasses
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.coefficients.layer_groups import LayerGroups, Rule
from lcsc_opt.coefficients.profiles import check_coefficients, check_steps

if TYPE_CHECKING:  # torch is imported by objectives that need it
    from torch import Tensor

    from lcsc_opt.sampling import Sampler

stop_flag: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("stop_flag", default=None)
"""Once the event is set, evaluations in this thread end at their next :func:`stop_if_told`."""


class Mergeable(Protocol):
    """Checkpoints that can be merged: a trajectory, or anything else that merges linearly in the coefficients.

    After :meth:`in_rows`, coefficients and gradients may have a row for each layer group, ``[S, K]``.
    """

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""

    @property
    def sha256(self) -> str:
        """Identifies what is merged, and how."""

    @property
    def touched(self) -> bool:
        """Whether the weights were written again since the identity was computed."""

    @property
    def layer_groups(self) -> LayerGroups | None:
        """The S groups of tensors that may be merged with a row of coefficients each; ``None`` for one row."""

    def in_rows(self, rule: Rule | None) -> Mergeable:
        """The same checkpoints for coefficients ``[S, K]``; StudySpecError if the rule does not fit their tensors."""

    def verify(self) -> None:
        """Compare the weights with the hashes in the identity; TrajectoryError if they differ."""

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:
        """The linear combination for ``[K]`` coefficients that sum to one."""

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints; ``[S, K, K]`` in rows."""

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """The gradient in the merged tensors, by name → the gradient in the coefficients, ``[K]`` or ``[S, K]``."""


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

    @property
    def real_images_per_feature(self) -> float | None:
        """How many real images the loss compares with, for each dimension of its features; ``None`` if unknown."""
        return None

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:  # noqa: ARG002 - of those who have some
        """Tensors of the merged model that are computed, not merged, by name in the state dict. Exports hold them."""
        return {}

    def gram(self) -> npt.NDArray[np.float64] | None:
        """``[K, K]`` or ``[S, K, K]`` inner products of the centered checkpoints, or ``None`` without weights."""
        return None if self.trajectory is None else self.trajectory.gram()

    @property
    def layer_groups(self) -> LayerGroups | None:
        """The S groups of tensors that may have a row of coefficients each; ``None`` for one row."""
        return None if self.trajectory is None else self.trajectory.layer_groups

    def merge_in_rows(self, rule: Rule | None) -> None:
        """From now on coefficients may be ``[S, K]``, a row for each layer group; ``None`` goes back to one row.

        Raises:
            StudySpecError: the objective merges no weights, or the rule does not divide them.
        """
        if self.trajectory is not None:
            object.__setattr__(self, "trajectory", self.trajectory.in_rows(rule))  # it may be a frozen dataclass
        elif rule is not None:
            raise StudySpecError("space.rows: this objective merges no weights; leave the key out")

    def __call__(self, coefficients: npt.ArrayLike) -> float:
        """The loss of ``[K]`` or ``[S, K]`` coefficients that sum to one."""
        groups = self.layer_groups
        checked = check_coefficients(coefficients, len(self.steps), rows=None if groups is None else len(groups))
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
        """The evaluation, from all parts in the order of their images; with ``gradient`` also what :meth:`vjp` needs.

        Returns:
            The :class:`Evaluation`, still without its gradient, and one picklable object for each part; ``None`` for
            each without ``gradient``.
        """

    @abc.abstractmethod
    def vjp(self, candidate: Candidate, first: int, last: int, back: Any) -> tuple[Coefficients, Cost]:
        """The vector-Jacobian product of the images ``[first, last)``: their part of the gradient ``[K]``; its cost.

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
        cost, product = evaluation.cost, None
        if gradient:
            product, extra = self.vjp(candidate, 0, count, back)
            cost += extra
        cost = dataclasses.replace(cost, seconds=time.perf_counter() - start)
        return dataclasses.replace(evaluation, cost=cost, gradient=product)


def stop_if_told() -> None:
    """Stop here, between two batches, if nobody waits for this evaluation any more.

    Raises:
        KeyboardInterrupt: nobody waits for it.
    """
    flag = stop_flag.get()
    if flag is not None and flag.is_set():
        raise KeyboardInterrupt


class CoefficientFunction(Objective):
    """Any Python callable over coefficients as an objective.

    Args:
        function: ``[K]`` float64 → float, lower is better.
        steps: ``[K]`` training steps.
        name: its name in the study's fingerprint.
        gradient: ``[K]`` float64 → ``[K]``, the function's gradient, for optimizers that need one.
        held_out: ``[K]`` float64 → float, lower is better: the final loss of the answer, on data that the search does
            not see. The answer is still chosen by ``function``.
        held_out_name: the name of ``held_out`` in the study's fingerprint.
    """

    def __init__(
        self,
        function: Callable[[Coefficients], float],
        steps: Sequence[int],
        *,
        name: str,
        gradient: Callable[[Coefficients], npt.ArrayLike] | None = None,
        held_out: Callable[[Coefficients], float] | None = None,
        held_out_name: str | None = None,
    ) -> None:
        self._function, self._steps, self._name = function, check_steps(steps), name
        self._gradient, self._held_out, self._held_out_name = gradient, held_out, held_out_name

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        return self._steps

    def why_no_gradient(self) -> str | None:
        """``None`` if a gradient was given."""
        return f"no gradient of {self._name} was given" if self._gradient is None else None

    def why_nothing_held_out(self) -> str | None:
        """``None`` if a held-out function was given."""
        return f"no held_out function was given with {self._name}" if self._held_out is None else None

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Call the function, and its gradient if wanted, on copies of the coefficients.

        The final loss of the answer is that of ``held_out``; else the function has no noise.

        Raises:
            TypeError, ValueError, RuntimeError: the function does not give a number.
            ObjectiveError: the gradient does not give K numbers, or a held-out loss is wanted and there is no held-out
                function.
        """
        function, coefficients = self._function, candidate.coefficients
        if candidate.noise.group == HELD_OUT.group:
            if self._held_out is None:
                raise ObjectiveError(f"nothing is held out: {self.why_nothing_held_out()}")
            if candidate.noise.seed != HELD_OUT.seed:
                raise ObjectiveError("a held-out function has one group of noise; leave --groups and --first-group out")
            function = self._held_out
        value: Any = function(coefficients.copy())
        loss = float(value.detach() if hasattr(value, "detach") else value)
        if not gradient:
            return Evaluation(loss)
        if self._gradient is None:
            raise ObjectiveError(f"a gradient was asked for, and {self.why_no_gradient()}")
        found = np.asarray(self._gradient(coefficients.copy()), dtype=np.float64)
        if found.shape != coefficients.shape:
            raise ObjectiveError(f"the gradient has the shape {list(found.shape)}, expected {list(coefficients.shape)}")
        return Evaluation(loss, gradient=found)

    def describe(self) -> dict[str, Any]:
        """The callables' names and the steps."""
        held_out = {} if self._held_out is None else {"held_out": self._held_out_name}
        return {"callable": self._name, "steps": list(self._steps), **held_out}
