"""One search of an experiment: planned with its objective, begun or continued in the database, and searched.

::

    search = Search(Plan(spec, objective), before, …)  # nothing is written
    with search.held(storage):
        search.run(yardstick)  # ask → write → evaluate → write → tell
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import Coefficients, Yardstick
from lcsc_opt.base.study_spec import OF_EXPERIMENT, BudgetSpec
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.states import Attributes, is_searched
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.evaluation.workers import evaluator_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import OURS
from lcsc_opt.study.ending import BROUGHT_NOTHING, how_it_ended
from lcsc_opt.study.loop import Loop, TrialCallback
from lcsc_opt.study.planning import Plan

_PLANNED_IN_A_DRY_RUN = BudgetSpec(evaluations=100)  # none of which are made


class Search:
    """One search, in this process.

    Args:
        plan: the study with its objective.
        before: the attributes of the stored study, with which it was compared; ``None`` for a new one.
        environment: the versions of now.
        origin: where a new one begins; ``None`` leaves it to the specification.
        planned: with how many evaluations a new optimizer plans, if its budget is a time.
        changed: what was accepted that changed since it began, for messages.

    Attributes:
        spec: its specification.
        attributes: those that the study has, or begins with.
        stored: the study in the database, from when it is first :meth:`held`.

    Raises:
        LcscError: the objective does not allow the study.
    """

    stored: StoredStudy

    def __init__(
        self,
        plan: Plan,
        before: Attributes | None,
        environment: Mapping[str, Any],
        *,
        origin: Coefficients | None = None,
        planned: int | None = None,
        changed: str = "",
    ) -> None:
        self.spec = plan.spec
        self._plan = plan
        self._before = before
        self._changed = changed
        # what all searches have is stored with the experiment
        specification = plan.spec.model_dump(mode="json", exclude=set(OF_EXPERIMENT))
        self._updated = {"specification": specification, "environment": environment}
        if before is None:
            for line in plan.advice():
                notice(line)
            before = plan.first_attributes(origin, planned)
        self.attributes: Attributes = {**before, **self._updated}
        incomplete = plan.why_incomplete()
        if incomplete is not None:
            notice(incomplete)
        known_origin = self.attributes.get("origin")
        self._origin = None if known_origin is None else array_of(known_origin)

    def ask_once(self) -> None:
        """Ask the optimizer for a candidate that nobody evaluates: a dry run shows so whether the optimizer works here.

        Raises:
            SearchFailedError: it does not, as one whose package is missing.
            StudySpecError: the study begins where its space has no point.
        """
        with self._new_driver(_PLANNED_IN_A_DRY_RUN) as driver:
            driver.ask()

    @contextlib.contextmanager
    def held(self, storage: RDBStorage, *, guard: Callable[[], None]) -> Iterator[None]:
        """Create or open the study, and hold its lock while this is open; ``guard`` is called before each write.

        What changed is written. Where failures ended the last run, its candidates are asked again.

        Raises:
            StudyStoreError: another process runs the study, or has changed it since it was compared.
        """
        study = StoredStudy.open_or_create(storage, self.spec.name, self.attributes)
        study.guard = guard
        with study.hold():
            expected = self.attributes if self._before is None else self._before
            # the environment may differ, since this run writes its own; all else is fixed, or read under the lock
            if study.attributes["specification"] != expected["specification"]:
                raise StudyStoreError(f"{self.spec.name}: another process has just changed it; run this again")
            for name, value in self._updated.items():
                if value != study.attributes.get(name):
                    study.set_attribute(name, value)
            if self._before is not None and self._was_ended_by_failures(study):
                notice(
                    f"{study.name}: trials that failed after the last success are repeated: {study.retry_failed()}; "
                    "earlier failures are kept, because later candidates depend on them"
                )
            self.stored = study
            yield

    def _was_ended_by_failures(self, study: StoredStudy) -> bool:
        """Whether as many trials as the study allows have failed one after the other, or all trials have."""
        states = [trial.state for trial in study.trials() if trial.state.is_finished()]
        in_a_row = self.spec.failures.in_a_row or len(states)
        return set(states[-in_a_row:]) == {TrialState.FAIL}

    def run(
        self,
        yardstick: Yardstick | None,
        *,
        pool: WorkerPool | None,
        callbacks: Sequence[TrialCallback] = (),
    ) -> None:
        """Search until the budget is spent. Does nothing if the search has already ended.

        One that a callback has stopped has not ended: it continues the next time.

        Args:
            yardstick: what every loss is relative to; ``None`` if losses are absolute.
            pool: the workers; ``None`` if this process evaluates.
            callbacks: are called with Optuna's study and the trial, after each trial that ends in this run.

        Raises:
            LcscError: the search fails, or the optimizer does not ask the stored candidates again.
            Exception: what a callback raises; all results so far are stored.
        """
        study = self.stored
        if is_searched(self.spec, study.attributes):
            return
        budget = self._begun_budget()
        stored = study.attributes
        in_flight = stored["parallelism"]["in_flight"]
        # grids ask what they list, and our other optimizers begin at the origin by themselves
        suggests_origin = self.spec.optimizer.name == "LCSC" or self.spec.optimizer.name not in OURS
        objective = self._plan.objective
        evaluator = evaluator_of(objective, pool, in_flight)
        if pool is not None and budget.seconds is not None:
            pool.wait_until_ready()  # before the clock begins
        with contextlib.closing(evaluator), self._new_driver(BudgetSpec(**stored["optimizer_budget"])) as driver:
            loop = Loop(
                study,
                driver,
                evaluator,
                budget=budget,
                first=self._origin if suggests_origin else None,
                images_per_evaluation=objective.samples.per_evaluation,
                yardstick=yardstick,
                in_flight=in_flight,
                workers=stored["parallelism"]["workers"],
                failures=self.spec.failures,
                changed=self._changed,
                callbacks=callbacks,
            )
            with self._showing(loop, pool):
                loop.run()
        if loop.stopped:
            notice(f"{study.name}: a callback has stopped the search before its budget was spent")
        else:
            self._store_end(loop, exhausted=driver.finished)

    def _store_end(self, loop: Loop, *, exhausted: bool) -> None:
        """Store that the search has ended, and what tells :func:`is_searched` whether another budget reopens it.

        ``exhausted`` says whether the optimizer had nothing more to ask.
        """
        ended: dict[str, Any] = {"evaluations": loop.told, "exhausted": exhausted, "at": time.time()}
        patience = None
        if loop.is_out_of_patience:
            patience = self.spec.budget.patience
            ended["patience"] = patience
        if not self.spec.is_grid:
            how = how_it_ended(
                self.stored.trials(),
                by_itself=exhausted,
                patience=patience,
                round_steps=self._plan.optimizer.round_steps,
            )
            ended |= {"how": how, "stalled": how.endswith(BROUGHT_NOTHING)}
        elif not exhausted:
            ended["how"] = f"cut by its budget: {loop.told} of {self._plan.grid_size} models"
        if self.spec.budget.seconds is not None:
            ended["deadline"] = self.spec.budget.seconds
        self.stored.set_attribute("search_ended", ended)

    def _begun_budget(self) -> BudgetSpec:
        """The total for this run. One that differs from the stored one is stored, and reopens an ended search."""
        budget = self._plan.budget
        if budget.model_dump() != self.stored.attributes["budget"]:
            self.stored.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            self.stored.set_attribute("budget", budget.model_dump())
        return budget

    def _new_driver(self, planned: BudgetSpec) -> Driver:
        """A fresh optimizer that plans with this budget, and with the workers that the study began with.

        Others would make it ask other candidates than those that are stored.
        """
        workers = self.attributes["parallelism"]["workers"]
        return self._plan.new_driver(planned, origin=self._origin, workers=workers)

    @contextlib.contextmanager
    def _showing(self, loop: Loop, pool: WorkerPool | None) -> Iterator[None]:
        """A progress line while this is open."""
        if loop.last_stored is not None:
            notice(f"{loop.name}: continuing after trial {loop.last_stored}")
        is_timed = loop.budget.seconds is not None
        shown = loop.seconds_spent if is_timed else loop.stored_spent  # what is replayed is not shown again

        with progress(loop.name, loop.total, done=shown) as advance:

            def on_progress(loop: Loop) -> None:
                """Advance to what the loop has spent, in the unit of its budget."""
                nonlocal shown
                # a last check may be one more than the budget
                spent = min(loop.seconds_spent if is_timed else loop.spent, loop.total)
                advance(max(spent - shown, 0), note=self._progress_note(loop, pool))
                shown = max(shown, spent)

            on_progress(loop)
            loop.on_progress = on_progress
            yield

    def _progress_note(self, loop: Loop, pool: WorkerPool | None) -> str:
        """``best 12.3, 2 failed``; on Ray, whose workers come and go, also how many there are."""
        notes = []
        if loop.best is not None:
            loss, _ = loop.best
            notes.append(f"best {self.stored.sign * loss:.4g}")
        if loop.failed:
            notes.append(f"{loop.failed} failed")
        if pool is not None and self.spec.ray is not None:
            notes.append(f"{pool.alive} of {len(pool)} workers")
        return ", ".join(notes)
