"""One candidate at a time, in the process that searches."""

from __future__ import annotations

from concurrent.futures import Future

from lcsc_opt.base.records import Candidate
from lcsc_opt.evaluation.base import Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective


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
