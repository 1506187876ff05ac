"""What the runner asks of a place where candidates are evaluated."""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import time
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from lcsc_opt.errors import LcscError
from lcsc_opt.objective import Objective
from lcsc_opt.records import Candidate, Evaluation


@dataclasses.dataclass(frozen=True)
class Failure:
    """An evaluation that gave no finite loss: why, and how many seconds it took to find out.

    ``retry`` is false where the library itself refused: it would do so again.
    """

    reason: str
    seconds: float
    retry: bool = True


Outcome = Evaluation | Failure


class Evaluator(Protocol):
    """Evaluates candidates, as many at once as it has workers."""

    @property
    def workers(self) -> int:
        """How many candidates are evaluated at once."""
        ...

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Start an evaluation, with its gradient where that is asked for.

        The future never raises what the objective raised: it gives a :class:`Failure`.
        """
        ...

    def close(self) -> None:
        """Let the workers go; what they have not finished is lost to them, not to the database."""
        ...


def _free_memory() -> None:
    """Give back what a failed attempt held, on the accelerator too, so that the next one can have it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluate_safely(objective: Objective, candidate: Candidate, *, gradient: bool = False) -> Outcome:
    """Evaluate, and turn an exception or what is not finite into a :class:`Failure` with its reason."""
    start = time.perf_counter()
    reason, retry = "", True
    try:
        # objectives without gradients need not know the keyword
        evaluation = objective.evaluate(candidate, gradient=True) if gradient else objective.evaluate(candidate)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line wherever it is shown
        retry = not isinstance(error, LcscError)
    if reason:  # out here the exception is gone, and with it the frames that held the failed attempt's tensors
        _free_memory()
        return Failure(reason, time.perf_counter() - start, retry)
    if not math.isfinite(evaluation.loss):
        return Failure(f"the loss is {evaluation.loss}", time.perf_counter() - start)
    if gradient and evaluation.gradient is None:
        return Failure("the objective gave no gradient", time.perf_counter() - start, retry=False)
    if evaluation.gradient is not None and not np.isfinite(evaluation.gradient).all():
        return Failure("the gradient is not finite", time.perf_counter() - start)
    return evaluation
