"""The contract of an evaluator, and failures in place of exceptions."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np

from lcsc_opt.base.errors import RAISED_BY_USERS, LcscError, MetricError, ObjectiveError, one_line
from lcsc_opt.base.files import same_working_folder
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import without_bars
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.base.streams import printable
from lcsc_opt.objective.contract import Objective

Value = TypeVar("Value")
_TRACEBACK_CHARACTERS = 8000  # the last ones are stored, since the error stands at the end


@dataclasses.dataclass(frozen=True)
class Failure:
    """An evaluation without a finite loss.

    Attributes:
        reason: one line for people.
        seconds: how long it took, wall-clock.
        retry: whether another attempt may succeed; not after errors of this library, which it would meet again.
        traceback: Python's text of the exception; empty where the candidate failed and not the code.
    """

    reason: str
    seconds: float
    retry: bool = True
    traceback: str = ""

    @property
    def raised_at(self) -> str:
        """The last frame of the traceback: its file and line, and the code there; empty without a traceback."""
        lines = self.traceback.splitlines()
        frames = [index for index, line in enumerate(lines) if line.startswith("  File ")]
        if not frames:
            return ""
        place, *rest = lines[frames[-1] :]
        code = itertools.takewhile(lambda line: line.startswith("    "), rest)  # then comes the reason
        return "\n".join([place, *code])

    def as_attempt(self) -> dict[str, Any]:
        """The failed attempt as the database stores it with its trial."""
        attempt: dict[str, Any] = {"reason": self.reason, "seconds": round(self.seconds, 3)}
        if self.traceback:
            attempt["traceback"] = self.traceback
        return attempt


Outcome = Evaluation | Failure


class Evaluator(Protocol):
    """Evaluates candidates, as many at once as it has workers."""

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Start an evaluation.

        The future never raises what the objective raised: it gives a :class:`Failure`.
        """

    def close(self) -> None:
        """Stop the workers. Unfinished evaluations are given up; the database still has their candidates."""


def persistently(evaluator: Evaluator, retries: int) -> Callable[[Candidate], Outcome]:
    """A function that evaluates one candidate at a time, and one that fails up to ``retries`` times more."""

    def evaluate(candidate: Candidate) -> Outcome:
        for _ in range(retries + 1):
            outcome = evaluator.submit(candidate).result()
            if not (isinstance(outcome, Failure) and outcome.retry):
                break
        return outcome

    return evaluate


def attempt(function: Callable[[], Value]) -> Value | Failure:
    """Call a function; an exception, also ``sys.exit``, becomes a :class:`Failure` with its reason.

    KeyboardInterrupt does not: with it the user, or a pipeline that is closed, ends the evaluation.
    """
    start = time.perf_counter()
    try:
        with same_working_folder(), without_bars():
            return function()
    except RAISED_BY_USERS as error:
        failure = _failure_of(error)
    # out here the exception is gone, and with it the frames that held the failed attempt's tensors
    free_memory()
    return dataclasses.replace(failure, seconds=time.perf_counter() - start)


def _failure_of(error: BaseException) -> Failure:
    """The failure that an exception means; its time is not filled in yet."""
    text = ""
    if not isinstance(error, MetricError):  # these are about the candidate, not about code
        text = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    return Failure(
        reason=printable(one_line(error)),
        seconds=0.0,
        retry=not isinstance(error, LcscError),
        traceback=printable(text),
    )


def checked(outcome: Outcome, candidate: Candidate) -> Outcome:
    """The evaluation in Python's own numbers, or a failure.

    It is a failure where something is no number, the loss or the gradient is not finite, or a gradient that was asked
    for is missing or has another shape. Metrics may be NaN.
    """
    if isinstance(outcome, Failure):
        return outcome
    try:
        evaluation = _plain(outcome)
    except Exception as error:  # whatever stands where a number should be
        return _failure_of(error)
    seconds = evaluation.cost.seconds
    if not math.isfinite(evaluation.loss):
        return Failure(f"the loss is {evaluation.loss}", seconds)
    if evaluation.gradient is None:
        if candidate.gradient:
            return Failure("the objective gave no gradient", seconds, retry=False)
        return evaluation
    shape = list(evaluation.gradient.shape)
    expected_shape = list(candidate.coefficients.shape)
    if shape != expected_shape:
        return Failure(f"the gradient has the shape {shape}, expected {expected_shape}", seconds, retry=False)
    if not np.isfinite(evaluation.gradient).all():
        return Failure("the gradient is not finite", seconds)
    return evaluation


def _plain(answer: object) -> Evaluation:
    """An objective's answer in Python's own numbers, and a float64 gradient: JSON has no numbers of numpy and torch.

    Raises:
        ObjectiveError: it is no evaluation.
        TypeError, ValueError: something else stands where a number should be.
    """
    if not isinstance(answer, Evaluation):
        raise ObjectiveError(f"evaluate gave {type(answer).__name__}, expected an Evaluation")
    gradient = answer.gradient
    if gradient is not None:
        gradient = np.asarray(gradient, dtype=np.float64)
    optional = {"violation": answer.violation, "unseen": answer.unseen}
    cost = dataclasses.asdict(answer.cost)
    return dataclasses.replace(
        answer,
        loss=float(answer.loss),
        **{name: float(value) for name, value in optional.items() if value is not None},
        metrics={name: float(value) for name, value in answer.metrics.items()},
        # counts stay integers
        cost=Cost(**{name: value.item() if hasattr(value, "item") else value for name, value in cost.items()}),
        gradient=gradient,
        without_groups={name: tuple(map(float, values)) for name, values in answer.without_groups.items()},
    )


def evaluate_safely(objective: Objective, candidate: Candidate) -> Outcome:
    """Evaluate; an exception, or what :func:`checked` refuses, becomes a :class:`Failure` with its reason."""

    def evaluate() -> Evaluation:
        start = time.perf_counter()
        evaluation = objective.evaluate(candidate)
        # an objective that measured its time keeps that; checked() refuses what is no evaluation
        if not isinstance(evaluation, Evaluation) or evaluation.cost.seconds:
            return evaluation
        cost = dataclasses.replace(evaluation.cost, seconds=time.perf_counter() - start)
        return dataclasses.replace(evaluation, cost=cost)

    return checked(attempt(evaluate), candidate)


class InProcessEvaluator:
    """Evaluates in the calling thread; its futures are done when they are returned."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Evaluate now."""
        future: Future[Outcome] = Future()
        future.set_result(evaluate_safely(self._objective, candidate))
        return future

    def close(self) -> None:
        """There is nothing to stop."""
