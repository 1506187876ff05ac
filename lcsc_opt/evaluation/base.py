"""What the runner asks of a place where candidates are evaluated."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.memory import free_memory
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.spans import EVALUATE, span
from lcsc_opt.base.study_file import FailureSpec
from lcsc_opt.objective.contract import Objective

Value = TypeVar("Value")
MOST_TRACEBACK = 8000  # characters that are kept of one, at its end


@dataclasses.dataclass(frozen=True)
class Failure:
    """An evaluation that gave no finite loss: why, and how many seconds it took to find out.

    ``retry`` is false where the library itself refused: it would do so again. ``traceback`` is Python's text of the
    exception, empty where there was none.
    """

    reason: str
    seconds: float
    retry: bool = True
    traceback: str = ""

    def as_attempt(self) -> dict[str, Any]:
        """What the database keeps of it."""
        known = {"reason": self.reason, "seconds": round(self.seconds, 3)}
        return {**known, "traceback": self.traceback} if self.traceback else known

    def worth_another(self, attempts: int, policy: FailureSpec) -> bool:
        """Whether to try the candidate again after so many attempts."""
        return self.retry and attempts <= policy.retries


Outcome = Evaluation | Failure


class Evaluator(Protocol):
    """Evaluates candidates, as many at once as it has workers."""

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Start an evaluation, with its gradient where that is asked for.

        The future never raises what the objective raised: it gives a :class:`Failure`.
        """
        ...

    def close(self) -> None:
        """Let the workers go; what they have not finished is lost to them, not to the database."""
        ...


def attempt(function: Callable[[], Value]) -> Value | Failure:
    """Call, and turn an exception, ``sys.exit`` too, into a :class:`Failure` with its reason."""
    start = time.perf_counter()
    try:
        return function()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line wherever it is shown
        retry = not isinstance(error, LcscError)
        text = "".join(traceback.format_exception(error))[-MOST_TRACEBACK:]
    # out here the exception is gone, and with it the frames that held the failed attempt's tensors
    free_memory()
    return Failure(reason, time.perf_counter() - start, retry, text)


def checked(outcome: Outcome, *, gradient: bool) -> Outcome:
    """An evaluation whose numbers are finite, and which has a gradient if that was asked for; else a failure."""
    if isinstance(outcome, Failure):
        return outcome
    seconds = outcome.cost.seconds
    if not math.isfinite(outcome.loss):
        return Failure(f"the loss is {outcome.loss}", seconds)
    if gradient and outcome.gradient is None:
        return Failure("the objective gave no gradient", seconds, retry=False)
    if outcome.gradient is not None and not np.isfinite(outcome.gradient).all():
        return Failure("the gradient is not finite", seconds)
    return outcome


def retrying(evaluate: Callable[[Candidate], Outcome], policy: FailureSpec) -> Callable[[Candidate], Outcome]:
    """``evaluate``, but a failure is tried again as the policy allows."""

    def again(candidate: Candidate) -> Outcome:
        attempts, outcome = 1, evaluate(candidate)
        while isinstance(outcome, Failure) and outcome.worth_another(attempts, policy):
            attempts, outcome = attempts + 1, evaluate(candidate)
        return outcome

    return again


def evaluate_safely(objective: Objective, candidate: Candidate, *, gradient: bool = False) -> Outcome:
    """Evaluate, and turn an exception or what is not finite into a :class:`Failure` with its reason."""

    def evaluate() -> Evaluation:
        # objectives without gradients need not know the keyword
        return objective.evaluate(candidate, gradient=True) if gradient else objective.evaluate(candidate)

    with span(EVALUATE):
        return checked(attempt(evaluate), gradient=gradient)


class InProcessEvaluator:
    """Evaluates where it is called; the future it gives is already done."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Evaluate now."""
        future: Future[Outcome] = Future()
        future.set_result(evaluate_safely(self._objective, candidate, gradient=gradient))
        return future

    def close(self) -> None:
        """Nothing to let go."""
