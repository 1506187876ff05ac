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
from lcsc_opt.base.records import Candidate, Evaluation
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


def checked(outcome: object, candidate: Candidate) -> Outcome:
    """The evaluation, or a failure.

    It is a failure where it is none, where the loss or the gradient is not finite, or where a gradient that was asked
    for is missing or has another shape. Metrics may be NaN.
    """
    if isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome, Evaluation):
        return _failure_of(ObjectiveError(f"evaluate gave {type(outcome).__name__}, expected an Evaluation"))
    seconds = outcome.cost.seconds
    if not math.isfinite(outcome.loss):
        return Failure(f"the loss is {outcome.loss}", seconds)
    if outcome.gradient is None:
        if candidate.gradient:
            return Failure("the objective gave no gradient", seconds, retry=False)
        return outcome
    shape = list(outcome.gradient.shape)
    expected_shape = list(candidate.coefficients.shape)
    if shape != expected_shape:
        return Failure(f"the gradient has the shape {shape}, expected {expected_shape}", seconds, retry=False)
    if not np.isfinite(outcome.gradient).all():
        return Failure("the gradient is not finite", seconds)
    return outcome


def evaluate_safely(objective: Objective, candidate: Candidate) -> Outcome:
    """Evaluate; an exception, or what :func:`checked` refuses, becomes a :class:`Failure` with its reason."""
    start = time.perf_counter()
    outcome = attempt(lambda: objective.evaluate(candidate))
    if isinstance(outcome, Evaluation) and not outcome.cost.seconds:  # an objective that measured its time keeps that
        cost = dataclasses.replace(outcome.cost, seconds=time.perf_counter() - start)
        outcome = dataclasses.replace(outcome, cost=cost)
    return checked(outcome, candidate)


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
