"""The one loop: ask → write the candidate → evaluate → write the result → tell.

The database is written first, and the optimizer's memory is derived from it. Continuing is therefore no special
case: the loop always starts at ask 0, and where a trial is stored already, the optimizer must ask the stored
coefficients again, bit for bit, and is told the stored result. A trial that was asked and not finished is
evaluated again under its own number.

With W workers, tells happen in ask order: candidate n is asked when exactly the results 0 to n - window were told,
with a window of 1.5 W. The sequence of candidates then does not depend on which evaluation finishes first.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from nevergrad.optimization.base import Optimizer
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from lcsc_opt.errors import ReplayError, SearchFailedError
from lcsc_opt.evaluation import Evaluator, Failure, Outcome
from lcsc_opt.records import Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.study_store import StoredStudy, TrialKey

FIRST_FAILURE_LOSS = 1e6  # told for a failed trial when nothing has succeeded yet
LARGEST_LOSS = 1e20  # Nevergrad clips above 5e20, with a warning


@dataclasses.dataclass
class _Asked:
    """A trial between ask and tell."""

    trial: TrialKey
    parameter: Any  # Nevergrad's candidate
    outcome: Outcome | None = None
    future: concurrent.futures.Future[Outcome] | None = None


class Search:
    """One search over one stored study.

    Args:
        study: where everything is written.
        optimizer: freshly built, as it was when the study was new.
        evaluator: where candidates are evaluated.
        evaluations: the total over the study's life.
        describe_difference: says what changed in the environment, for the message when replay fails.
    """

    def __init__(
        self,
        study: StoredStudy,
        optimizer: Optimizer,
        evaluator: Evaluator,
        *,
        evaluations: int,
        describe_difference: Callable[[], str] = lambda: "",
    ) -> None:
        self._study, self._optimizer, self._evaluator = study, optimizer, evaluator
        self._evaluations = evaluations
        self._describe_difference = describe_difference
        self._stored = study.trials()
        self._in_flight: list[_Asked] = []
        self._window = window(evaluator.workers)
        self._one_thread = _one_blas_thread()
        self._worst: float | None = None
        self.best: tuple[float, int] | None = None
        self.told = 0
        self.failures = 0

    @property
    def stored(self) -> int:
        """How many trials were finished when this search began."""
        return sum(trial.state.is_finished() for trial in self._stored)

    def run(self, on_tell: Callable[[Search], None] = lambda _: None) -> None:
        """Search until the budget is spent or the optimizer has nothing more to ask.

        Raises:
            ReplayError: when the optimizer does not ask the stored candidates again.
            SearchFailedError: when every single trial failed.
        """
        for number in range(self._evaluations):
            while len(self._in_flight) >= self._window:
                self._tell_next(on_tell)
            if getattr(self._optimizer, "finished", False):
                break
            self._in_flight.append(self._ask(number))
        while self._in_flight:
            self._tell_next(on_tell)
        if self.told and self.failures == self.told:
            raise SearchFailedError(f"{self._study.name}: all {self.told} trials failed; {self._last_reason}")

    def _ask(self, number: int) -> _Asked:
        with self._one_thread():
            parameter = self._optimizer.ask()
        coefficients = np.asarray(parameter.value, dtype=np.float64)
        if number >= len(self._stored):
            trial = self._study.add_candidate(Candidate(coefficients))
            return self._submit(trial, parameter, coefficients)
        stored = self._stored[number]
        self._verify(stored, number, coefficients)
        if stored.state.is_finished():
            return _Asked(TrialKey.of(stored), parameter, outcome=stored_outcome(stored))
        return self._submit(TrialKey.of(stored), parameter, coefficients)

    def _submit(self, trial: TrialKey, parameter: Any, coefficients: Coefficients) -> _Asked:
        return _Asked(trial, parameter, future=self._evaluator.submit(Candidate(coefficients)))

    def _verify(self, stored: FrozenTrial, number: int, asked: Coefficients) -> None:
        expected = np.array(stored.user_attrs.get("coefficients", ()), dtype=np.float64)
        if stored.number == number and expected.tobytes() == asked.tobytes():
            return
        difference = self._describe_difference() or "the same versions, BLAS and threads as before"
        raise ReplayError(
            f"{self._study.name}: the optimizer asks other coefficients for trial {number} than the stored ones, so "
            f"the search cannot be continued exactly. Environment: {difference}"
        )

    def _tell_next(self, on_tell: Callable[[Search], None]) -> None:
        """Wait for the oldest trial in flight, committing whatever finishes meanwhile, and tell it."""
        oldest = self._in_flight[0]
        while oldest.outcome is None:
            self._commit_finished()
        self._in_flight.pop(0)
        loss = self._loss_to_tell(oldest)
        with self._one_thread():
            self._optimizer.tell(oldest.parameter, loss)
        self.told += 1
        on_tell(self)

    def _commit_finished(self) -> None:
        running = {asked.future: asked for asked in self._in_flight if asked.future is not None}
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            asked = running[future]
            outcome = future.result()
            self._commit(asked.trial, outcome)
            asked.outcome, asked.future = outcome, None

    def _commit(self, trial: TrialKey, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self._study.fail(trial, outcome.reason, seconds=outcome.seconds, tell_index=trial.number)
        else:
            self._study.finish(trial, outcome, tell_index=trial.number)

    def _loss_to_tell(self, asked: _Asked) -> float:
        """The loss; for a failed trial the worst loss told before it, so that the optimizer turns away from there."""
        outcome = asked.outcome
        if isinstance(outcome, Evaluation):
            loss = max(min(outcome.loss, LARGEST_LOSS), -LARGEST_LOSS)
            self._worst = loss if self._worst is None else max(self._worst, loss)
            if self.best is None or loss < self.best[0]:
                self.best = (loss, asked.trial.number)
            return loss
        assert outcome is not None
        self.failures += 1
        self._last_reason = outcome.reason
        return FIRST_FAILURE_LOSS if self._worst is None else self._worst


def window(workers: int) -> int:
    """How many trials may be between ask and tell: 1.5 per worker keeps workers busy while tells wait their turn."""
    return 1 if workers == 1 else math.ceil(1.5 * workers)


def stored_outcome(trial: FrozenTrial) -> Outcome:
    """What a finished trial of the database ended with."""
    cost: Mapping[str, Any] = trial.user_attrs.get("cost", {})
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return Evaluation(trial.value, trial.user_attrs.get("metrics", {}), Cost.from_dict(cost))
    return Failure(str(trial.user_attrs.get("reason", trial.state.name)), float(cost.get("seconds", 0.0)))


def _one_blas_thread() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which numpy's BLAS has one thread: more change CMA-ES's sequence and make it ten times slower."""
    controller = ThreadpoolController()

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        with controller.limit(limits=1, user_api="blas"):
            yield

    return limited
