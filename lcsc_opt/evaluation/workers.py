"""Who evaluates: this process, or worker processes of this machine, one for each device, or of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.machine import cores
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import Rule, StudySpec
from lcsc_opt.evaluation.base import Evaluator, InProcessEvaluator, Outcome, persistently
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import Trajectory

_MOST_A_CORE = 8  # processes that evaluate: those that wait for a GPU need little of one


class Workers:
    """Those of one run, for one search after the other: all processes have loaded the objective in the same rows.

    Args:
        objective: as this process has loaded it.
        newest: the last search of the run: where none is running, its workers are opened.
        context: where files are.

    Attributes:
        pool: the worker processes; ``None`` if this process evaluates.
    """

    def __init__(self, objective: Objective, newest: StudySpec, context: BuildContext) -> None:
        self.pool: WorkerPool | None = None
        self._objective = objective
        self._newest = newest
        self._context = context
        self._opened_with: tuple[object, Rule | None] | None = None  # the setting and the rows, while workers are open
        self._opened = contextlib.ExitStack()

    def use(self, spec: StudySpec, rows: Rule | None) -> None:
        """Merge in these rows from now on, in this process and in the workers of a search, which are opened for it.

        Raises:
            ObjectiveError: a worker's device is not there.
            StudySpecError: the Ray cluster has no room; the rows do not fit the objective; or as
                :func:`check_workers`.
        """
        self._objective.merge_in_rows(rows)
        if self._opened_with == (spec.workers, rows):
            return
        self.close()
        if spec.workers != 1:  # else this process evaluates
            self.pool = self._opened.enter_context(self._processes(spec, rows))
        # the rehearsal and the report evaluate one candidate at a time, which all workers share
        self._evaluator = evaluator_of(self._objective, self.pool, in_flight=1)
        self._opened.callback(self._evaluator.close)
        self._opened_with = (spec.workers, rows)  # only now: another search must not go on without its workers

    def use_rows(self, rows: Rule | None) -> None:
        """Have workers for coefficients in these rows, whosever are open; one row can be evaluated in any."""
        if self._opened_with is None or rows not in (None, self._opened_with[1]):
            self.use(self._newest, rows)
        elif rows is not None:
            self._objective.merge_in_rows(rows)

    def evaluate(self, candidate: Candidate, rows: Rule | None) -> Outcome:
        """Evaluate a candidate in these rows, by all workers together if the objective allows it.

        One that fails is tried again.
        """
        self.use_rows(rows)
        return persistently(self._evaluator, self._newest.failures.retries)(candidate)

    def loader(self, rows: Rule | None) -> Callable[[], Objective]:
        """What loads the objective once more, in these rows and with the checkpoints of this process; picklable."""
        trajectory = self._objective.trajectory
        context = self._context
        if isinstance(trajectory, Trajectory):
            checkpoints = KnownCheckpoints(trajectory.sha256, trajectory.steps)
            context = dataclasses.replace(context, checkpoints=checkpoints)
        layout = self._objective.layout
        return functools.partial(load_objective, self._newest.objective, context, rows=rows, layout=layout)

    @contextlib.contextmanager
    def _processes(self, spec: StudySpec, rows: Rule | None) -> Iterator[WorkerPool | None]:
        """A search's worker processes, which start when they are first used; raises as :meth:`use`."""
        check_workers(spec)
        expected = self._objective.key
        if spec.ray is not None:
            from lcsc_opt.evaluation.ray import ray_workers

            ray = ray_workers(spec.ray, spec.objective, self._objective, expected=expected, context=self._context)
            with ray as pool:
                yield pool
        elif spec.worker_count == 1 and not spec.devices:
            yield None
        else:
            environments: Sequence[Mapping[str, str]] = ()
            if not spec.names_device:  # else all workers use that one
                from lcsc_opt.base import accelerator  # which imports torch

                environments = accelerator.environments(spec.worker_count, spec.devices)
            loader = self.loader(rows)
            pool = WorkerPool(loader, spec.worker_count, expected=expected, environments=environments)
            with contextlib.closing(pool):
                yield pool

    def close(self) -> None:
        """Stop them, which frees the devices; they are opened again when somebody needs them."""
        self._opened.close()
        self._opened_with = None
        self.pool = None


def check_workers(spec: StudySpec) -> None:
    """Refuse more processes than this machine can run, before anything is loaded; a cluster counts for itself.

    Raises:
        StudySpecError: it is too small for so many.
    """
    most = _MOST_A_CORE * cores()
    if spec.ray is None and spec.worker_count > most:
        raise StudySpecError(
            f"workers: {spec.worker_count} processes on {cores()} cores; expected at most {most}, or auto: one for "
            "each GPU"
        )


def evaluator_of(objective: Objective, pool: WorkerPool | None, in_flight: int) -> Evaluator:
    """Evaluates candidates, so many at once, by the workers of this run; the study may have begun with others.

    One candidate at a time is shared by all workers. If stages overlap, each worker has two candidates.
    """
    overlaps = isinstance(objective, StagedObjective) and objective.overlaps
    if pool is None:
        if overlaps and in_flight > 1:
            return Pipeline(objective)
        return InProcessEvaluator(objective)
    if in_flight == 1 and isinstance(objective, StagedObjective):
        return SpreadEvaluator(objective, pool)
    # with fewer in flight, a worker's second candidate would wait there although another worker is free
    most_jobs = 2 if overlaps and in_flight >= 2 * len(pool) else 1
    return ProcessEvaluator(pool, most_jobs=most_jobs)
