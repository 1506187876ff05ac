"""The one loop: ask → write the candidate → evaluate → write the result → tell.

The database is written first, and the optimizer's memory is derived from it. So continuing is no special case: the
loop always starts at ask 0. For a stored trial, the optimizer must ask the stored coefficients again, bit for bit, and
is told the stored result. A trial that was asked and not finished is evaluated again under its own number.

Tells happen in ask order: candidate n is asked when exactly the results 0 to n - in_flight were told. So the sequence
of candidates does not depend on which evaluation finishes first.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import SearchFailedError, StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate, Coefficients, Evaluation, Yardstick
from lcsc_opt.base.study_spec import BudgetSpec, FailureSpec
from lcsc_opt.database.arrays import rounded_coefficients, rounded_gradient
from lcsc_opt.database.states import SUCCEEDED
from lcsc_opt.database.store import CANDIDATE_ATTRIBUTES, StoredStudy, candidate_attributes, evaluation_of
from lcsc_opt.evaluation.base import Evaluator, Failure, Outcome
from lcsc_opt.optimizers import attach_evaluation, candidate_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.told_losses import ToldLosses

TrialCallback = Callable[[optuna.Study, FrozenTrial], object]
"""A function of the caller's that is called after each trial, as those of Optuna's ``study.optimize(callbacks=…)``."""

_MOST_REASONS = 5  # reasons of failures that a run prints; the database keeps all
WAIT_SECONDS = 5.0  # between two calls of on_progress while there is no result


@dataclasses.dataclass
class _Trial:
    """A trial between ask and tell.

    Attributes:
        candidate: what is evaluated.
        nevergrad_candidate: what Nevergrad asked, and is told of.
        price: what it costs, in the unit of the budget.
        compares: whether its loss compares with those of other trials.
        attempts: those that have failed, as the database stores them.
        future: of the evaluation that is running.
        outcome: its result, as soon as that is stored.
        ended_now: its result is of this run.
    """

    number: int
    candidate: Candidate
    nevergrad_candidate: Any
    price: int
    compares: bool
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    future: concurrent.futures.Future[Outcome] | None = None
    outcome: Outcome | None = None
    ended_now: bool = False


class _Stoppable(optuna.Study):
    """A study as callbacks get it. Optuna's own ``stop`` knows only the loop of ``optimize``."""

    is_stopped = False

    def stop(self) -> None:
        """End the search after the trials that are running."""
        self.is_stopped = True


class Loop:
    """The search over one stored study.

    Args:
        study: where everything is written; it is held.
        driver: of an optimizer that was freshly built, in the same state as when the study was new.
        evaluator: where candidates are evaluated.
        budget: the total over all runs of the study.
        first: ``[K]`` or ``[S, K]`` coefficients that are asked before all others.
        images_per_evaluation: the images of a candidate whose optimizer does not ask for another number; 0 where the
            objective samples none.
        yardstick: what every loss is relative to; ``None`` if losses are absolute.
        in_flight: how many trials may be between ask and tell; see :func:`lcsc_opt.study.planning.most_in_flight`.
        workers: how many evaluate at once: so much faster than the clock are the seconds of evaluations.
        failures: how often a candidate is tried again, and how many failed trials in a row end the search.
        changed: what changed since the study began, for the message when replay fails.
        callbacks: are called after each trial that ends in this run, in the order of the tells.

    Attributes:
        budget: the same; ``total``, its number in its unit.
        on_progress: is called after each tell, and every few seconds while there is nothing to tell.
        stopped: whether a callback ended the search before its budget was spent.
        told: how many trials the optimizer was told, and ``failed``, how many of them have failed.
        spent: what these cost, in the unit of the budget; ``stored_spent``, what all that ended in earlier runs cost.
        best: the lowest told loss that compares, and the number of its trial.
        last_stored: the number of the last trial that ended in an earlier run; ``None`` if there is none.
    """

    def __init__(
        self,
        study: StoredStudy,
        driver: Driver,
        evaluator: Evaluator,
        *,
        budget: BudgetSpec,
        first: Coefficients | None = None,
        images_per_evaluation: int = 0,
        yardstick: Yardstick | None = None,
        in_flight: int = 1,
        workers: int = 1,
        failures: FailureSpec | None = None,
        changed: str = "",
        callbacks: Sequence[TrialCallback] = (),
    ) -> None:
        self.name = study.name
        self.budget = budget
        self.total = budget.total
        self.on_progress: Callable[[Loop], None] = lambda _: None
        self._study = study
        self._driver = driver
        self._evaluator = evaluator
        self._images_per_evaluation = images_per_evaluation
        self._yardstick = yardstick
        self._most_in_flight = in_flight
        self._policy = FailureSpec() if failures is None else failures
        self._changed = changed
        self._callbacks = callbacks
        self._study_of_callbacks = _Stoppable(study.name, study.storage) if callbacks else None

        trials = study.trials()
        finished = [trial for trial in trials if trial.state.is_finished()]
        self.last_stored = max((trial.number for trial in finished), default=None)
        self.stored_spent = sum(self._price(trial.user_attrs.get("images")) for trial in finished)
        self._to_replay = collections.deque(trials)
        seconds_before: float = (
            sum(trial.user_attrs.get("cost", {}).get("seconds", 0.0) for trial in finished) / workers
        )
        self._begin = time.monotonic() - seconds_before
        if first is not None:
            driver.optimizer.suggest(first)
        self._in_flight: list[_Trial] = []
        self._failed_in_a_row = 0
        self._last_reason = ""
        self._printed_reasons: set[str] = set()
        self._told_losses = ToldLosses()
        self._since_best = 0  # trials whose losses compare
        self.best: tuple[float, int] | None = None
        self.told = 0
        self.failed = 0
        self.spent = 0
        self._has_compared = False  # whether a trial was told whose loss compares, or would if it had not failed
        self.stopped = False

    @property
    def seconds_spent(self) -> int:
        """For how many seconds it has searched, in all runs."""
        return int(time.monotonic() - self._begin)

    def run(self) -> None:
        """Search until the budget is spent, the optimizer has nothing more to ask, or a callback stops it.

        A time is over for new candidates only: stored ones are replayed whatever the clock says, and candidates that
        are being evaluated are told.

        Raises:
            StudyStoreError: the optimizer does not ask the stored candidates again, or the database cannot be written.
            SearchFailedError: every trial failed, or more in a row than the study allows; or the optimizer raised an
                error.
            Exception: what a callback raises; all results so far are stored.
        """
        spent_on_asks = 0  # in the budget's unit
        while not self._has_ended(spent_on_asks):
            trial = self._ask(check=self._is_last(spent_on_asks))
            self._in_flight.append(trial)
            spent_on_asks += trial.price
            while len(self._in_flight) >= self._most_in_flight:
                self._tell_next()
        while self._in_flight:
            self._tell_next()
        has_success_to_come = any(trial.state in SUCCEEDED for trial in self._to_replay)  # the budget was lowered
        if self.told and self.failed == self.told and not has_success_to_come:
            raise self._failure(f"all {self.told} trials failed")
        # it was stopped, its time is over, or its budget allowed one more step: without a check that would be lost
        if self._driver.is_unchecked and not self._to_replay:
            self._in_flight.append(self._ask(check=True))
            self._tell_next()

    def _has_ended(self, spent_on_asks: int) -> bool:
        """Whether nothing more is asked: the budget is spent, nothing is left to gain, or a callback stopped it."""
        if self.budget.seconds is None:
            is_spent = spent_on_asks >= self.total
        else:  # asks are not what it counts
            is_spent = self._time_is_over()
        if is_spent or self._driver.finished or self.is_out_of_patience:
            return True
        self.stopped = self._study_of_callbacks is not None and self._study_of_callbacks.is_stopped
        return self.stopped

    def _is_last(self, spent_on_asks: int) -> bool:
        """Whether no more is left of the budget than a check of the steps since the last one."""
        left = self.total - spent_on_asks
        return self.budget.seconds is None and self._driver.is_unchecked and left <= self._price(None)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether as many trials as the budget's patience were told since the best one."""
        return self.budget.patience is not None and self._since_best >= self.budget.patience

    def _time_is_over(self) -> bool:
        """Whether the budget's seconds are over, and the search has something to show for them.

        That is a loss that compares, or a step that :meth:`run` checks after the end. Stored trials are replayed
        whatever the clock says.
        """
        assert self.budget.seconds is not None  # else nobody asks
        if self._to_replay or not (self._has_compared or self._driver.is_unchecked):
            return False
        return time.monotonic() - self._begin >= self.budget.seconds

    def _price(self, images: int | None) -> int:
        """What a candidate costs: its images, if the budget counts them, else 1, for one evaluation.

        ``images`` is ``None`` where the optimizer asked for no number.
        """
        if self.budget.images is None:
            return 1
        if images is None:
            return self._images_per_evaluation
        return images

    def _ask(self, *, check: bool) -> _Trial:
        """The next trial: a stored one, asked again, while there are any; else a new one, written and submitted.

        Of an optimizer that follows a path, a stored trial that is no step was a check. Raises as :meth:`run`.
        """
        if self._to_replay:
            check = not self._to_replay[0].user_attrs.get("unbiased")
        nevergrad_candidate = self._driver.ask(check=check)
        candidate = dataclasses.replace(candidate_of(nevergrad_candidate), yardstick=self._yardstick)
        if not candidate.unbiased:  # steps are not stored: replay gives them again
            candidate = dataclasses.replace(candidate, coefficients=rounded_coefficients(candidate.coefficients))
        price = self._price(candidate.images)
        compares = candidate.compares(self._images_per_evaluation)
        if self._to_replay:
            stored = self._to_replay.popleft()
            self._verify(stored, candidate)
            return self._resumed(stored, _Trial(stored.number, candidate, nevergrad_candidate, price, compares))
        number = self._study.add_candidate(candidate)
        return self._submit(_Trial(number, candidate, nevergrad_candidate, price, compares))

    def _resumed(self, stored: FrozenTrial, asked: _Trial) -> _Trial:
        """A stored trial that was asked again: with its result, or submitted again if it has none."""
        asked.attempts = list(stored.user_attrs.get("attempts", ()))
        if stored.state.is_finished():
            asked.outcome = _stored_outcome(stored)
            return asked
        return self._submit(asked)

    def _submit(self, asked: _Trial) -> _Trial:
        """Start an evaluation of the trial, the first one or another attempt."""
        asked.future = self._evaluator.submit(asked.candidate)
        return asked

    def _verify(self, stored: FrozenTrial, candidate: Candidate) -> None:
        """Refuse to continue unless the optimizer asks the stored candidate again, bit for bit.

        Raises:
            StudyStoreError: it asks another one.
        """
        attributes = candidate_attributes(candidate)
        if all(stored.user_attrs.get(key) == attributes.get(key) for key in CANDIDATE_ATTRIBUTES):
            return
        changed = self._changed or "nothing that a study records"
        raise StudyStoreError(
            f"{self._study.name}: for trial {stored.number} the optimizer asks for other coefficients than those "
            "stored, so this search cannot be continued exactly. Start a new one from its best coefficients: "
            f"lcsc run {self.name} name=NEW start={self.name}. Changed since it began: {changed}"
        )

    def _tell_next(self) -> None:
        """Wait for the next trial to tell, and tell it. Results that arrive meanwhile are committed.

        If the trial ended in this run, the callbacks are called with it, and failures in a row are counted. Raises as
        :meth:`run`.
        """
        asked = self._in_flight[0]
        while asked.outcome is None:
            self._commit_finished()
            if asked.outcome is None:
                self.on_progress(self)
        self._in_flight.pop(0)
        loss, evaluation = self._to_tell(asked, asked.outcome)
        attach_evaluation(asked.nevergrad_candidate, evaluation)
        self._driver.tell(asked.nevergrad_candidate, loss)
        self.told += 1
        self.spent += asked.price
        self.on_progress(self)
        if asked.ended_now:
            self._call_callbacks(asked.number)
            self._check_failures(asked.outcome)

    def _commit_finished(self) -> None:
        """Write the results that have arrived. While there is none, wait for one, a few seconds at most."""
        running = {asked.future: asked for asked in self._in_flight if asked.future is not None}
        done, _ = concurrent.futures.wait(running, timeout=WAIT_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            asked = running[future]
            asked.future = None
            self._commit(asked, future.result())

    def _commit(self, asked: _Trial, outcome: Outcome) -> None:
        """Write a result. A failed attempt is written and its reason printed; the same candidate may be tried again."""
        if isinstance(outcome, Failure):
            self._print_reason(asked.number, outcome)
            asked.attempts.append(outcome.as_attempt())
            if outcome.retry and len(asked.attempts) <= self._policy.retries:
                self._study.note_attempts(asked.number, asked.attempts)
                self._submit(asked)
                return
            self._study.fail(asked.number, asked.attempts)
        else:
            if outcome.gradient is not None:  # what is told is what is stored
                outcome = dataclasses.replace(outcome, gradient=rounded_gradient(outcome.gradient))
            self._study.finish(asked.number, outcome, compares=asked.compares)
        asked.outcome = outcome
        asked.ended_now = True

    def _to_tell(self, asked: _Trial, outcome: Outcome) -> tuple[float, Evaluation | None]:
        """The loss and the evaluation as the optimizer is told them; a failed trial has no evaluation.

        Failures are counted here, and the best loss is kept.
        """
        self._has_compared |= asked.compares
        self._since_best += asked.compares
        if isinstance(outcome, Failure):
            self.failed += 1
            self._last_reason = outcome.reason.rstrip(".")
            return self._told_losses.of_failure, None
        if asked.compares and (self.best is None or outcome.loss < self.best[0]):
            self.best = (outcome.loss, asked.number)
            self._since_best = 0
        evaluation = self._told_losses.of_success(outcome)
        return evaluation.loss, evaluation

    def _call_callbacks(self, number: int) -> None:
        """Call the caller's functions after the trial of this number, each with a copy of it."""
        if self._study_of_callbacks is None:
            return
        trial = self._study.trial(number)
        for function in self._callbacks:
            function(self._study_of_callbacks, copy.deepcopy(trial))

    def _print_reason(self, number: int, failure: Failure) -> None:
        """Print why a trial failed, once for each of the first reasons; and where, if another attempt may succeed.

        ``lcsc show`` prints the whole traceback.
        """
        if failure.reason in self._printed_reasons or len(self._printed_reasons) == _MOST_REASONS:
            return
        self._printed_reasons.add(failure.reason)
        line = f"{self.name}: trial {number}: {failure.reason}"
        if failure.retry:
            line = f"{line}\n{failure.raised_at}".rstrip()
        notice(line)

    def _check_failures(self, outcome: Outcome) -> None:
        """End the search when the last trials of this run have all failed; ``outcome`` is of the one told last.

        Raises:
            SearchFailedError: they have.
        """
        if not isinstance(outcome, Failure):
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        if self._policy.in_a_row is not None and self._failed_in_a_row >= self._policy.in_a_row:
            raise self._failure(f"{self._failed_in_a_row} trials in a row failed (failures.in_a_row)")

    def _failure(self, problem: str) -> SearchFailedError:
        """The error that ends the search: the problem, the last reason of a failure, and what to do."""
        return SearchFailedError(
            f"{self.name}: {problem}; the last failed with: {self._last_reason}. Fix the cause, then run it "
            "again, with --accept-changes (in Python: accept_changes=True) if your code changed: what failed last is "
            f"repeated. lcsc show {self.name} prints each failure, with its traceback if there is one"
        )


def _stored_outcome(trial: FrozenTrial) -> Outcome:
    """The evaluation or the failure of a finished trial."""
    if trial.state in SUCCEEDED and trial.value is not None:
        return evaluation_of(trial)
    attributes = trial.user_attrs
    cost: Mapping[str, Any] = attributes.get("cost", {})
    return Failure(str(attributes.get("reason", trial.state.name)), float(cost.get("seconds", 0.0)))
