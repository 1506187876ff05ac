"""The contract of an evaluator, and failures in place of exceptions."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np

from lcsc_opt.base.errors import LcscError, MetricError, ObjectiveError
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.objective.contract import Objective

Value = TypeVar("Value")
_MOST_TRACEBACK = 8000  # characters of a traceback that are kept: the last ones


@dataclasses.dataclass(frozen=True)
class Failure:
    """An evaluation without a finite loss: the reason, and how many seconds it took.

    ``retry`` is false for errors of this library, which another attempt would meet again. ``traceback`` is Python's
    text of the exception; it is empty where the candidate failed and not the code.
    """

    reason: str
    seconds: float
    retry: bool = True
    traceback: str = ""

    def as_attempt(self) -> dict[str, Any]:
        """The attempt as the database stores it."""
        known = {"reason": self.reason, "seconds": round(self.seconds, 3)}
        return {**known, "traceback": self.traceback} if self.traceback else known


Outcome = Evaluation | Failure


class Evaluator(Protocol):
    """Evaluates candidates, as many at once as it has workers."""

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Start an evaluation, with its gradient where that is wanted.

        The future never raises what the objective raised: it gives a :class:`Failure`.
        """

    def close(self) -> None:
        """Stop the workers. Unfinished evaluations are given up; the database still has their candidates."""


def attempt(function: Callable[[], Value]) -> Value | Failure:
    """Call a function; an exception, also ``sys.exit``, becomes a :class:`Failure` with its reason."""
    start = time.perf_counter()
    try:
        return function()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line wherever it is shown
        retry = not isinstance(error, LcscError)
        broken = not isinstance(error, MetricError)
        text = "".join(traceback.format_exception(error))[-_MOST_TRACEBACK:] if broken else ""
    # out here the exception is gone, and with it the frames that held the failed attempt's tensors
    free_memory()
    return Failure(reason, time.perf_counter() - start, retry, text)


def checked(outcome: Outcome, candidate: Candidate, *, gradient: bool) -> Outcome:
    """The evaluation in Python's own numbers, if these are finite and a wanted gradient is there; else a failure."""
    answer = outcome
    outcome = answer if isinstance(answer, Failure) else attempt(lambda: _plain(answer))
    if isinstance(outcome, Failure):
        return outcome
    seconds = outcome.cost.seconds
    if not math.isfinite(outcome.loss):
        return Failure(f"the loss is {outcome.loss}", seconds)
    if gradient and outcome.gradient is None:
        return Failure("the objective gave no gradient", seconds, retry=False)
    if outcome.gradient is not None:
        found, expected = list(outcome.gradient.shape), list(candidate.coefficients.shape)
        if found != expected:
            return Failure(f"the gradient has the shape {found}, expected {expected}", seconds, retry=False)
        if not np.isfinite(outcome.gradient).all():
            return Failure("the gradient is not finite", seconds)
    return outcome


def _plain(answer: object) -> Evaluation:
    """An objective's answer in Python's own numbers: those of numpy and torch cannot be stored as JSON.

    Raises:
        ObjectiveError: it is no evaluation, or what should be a number is none.
    """
    if not isinstance(answer, Evaluation):
        raise ObjectiveError(f"evaluate gave {type(answer).__name__}, expected an Evaluation")
    cost = dataclasses.asdict(answer.cost)
    return dataclasses.replace(
        answer,
        loss=float(_number("loss", answer.loss)),
        metrics={name: _number(f"metrics.{name}", value) for name, value in answer.metrics.items()},
        cost=Cost(**{name: _number(f"cost.{name}", value) for name, value in cost.items()}),
        gradient=None if answer.gradient is None else np.asarray(answer.gradient, dtype=np.float64),
        violation=None if answer.violation is None else float(_number("violation", answer.violation)),
        unseen=None if answer.unseen is None else float(_number("unseen", answer.unseen)),
    )


def _number(name: str, value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, (int, float)):
        raise ObjectiveError(f"{name}: expected a number, got {value!r}")
    return plain


def evaluate_safely(objective: Objective, candidate: Candidate, *, gradient: bool = False) -> Outcome:
    """Evaluate; an exception or a number that is not finite becomes a :class:`Failure` with its reason."""

    def evaluate() -> Evaluation:
        start = time.perf_counter()
        # objectives without gradients need not know the keyword
        found = objective.evaluate(candidate, gradient=True) if gradient else objective.evaluate(candidate)
        if not isinstance(found, Evaluation) or found.cost.seconds:
            return found
        return dataclasses.replace(found, cost=dataclasses.replace(found.cost, seconds=time.perf_counter() - start))

    return checked(attempt(evaluate), candidate, gradient=gradient)


class InProcessEvaluator:
    """Evaluates in the calling thread; its futures are done when they are returned."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Evaluate now."""
        future: Future[Outcome] = Future()
        future.set_result(evaluate_safely(self._objective, candidate, gradient=gradient))
        return future

    def close(self) -> None:
        """There is nothing to stop."""
