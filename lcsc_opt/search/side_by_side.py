"""Several studies of one objective at the same time, on shared workers. Each has the same trials as when run alone.

Each study has a thread that calls :meth:`Experiment.run`, and a database connection. One pool of workers serves the
studies in turns.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import progress
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import WorkerPool, Workers
from lcsc_opt.objective.contract import stop_with
from lcsc_opt.search.endings import is_finished
from lcsc_opt.search.experiment import Experiment
from lcsc_opt.search.plan import StudyPlan, resolve
from lcsc_opt.search.runner import spent_by
from lcsc_opt.search.watching import OneLine

LAST_SECONDS = 8.0  # the time that interrupted studies have to end

OnEnd = Callable[[StudyPlan, "str | LcscError"], None]


@dataclasses.dataclass(frozen=True)
class Begun:
    """A study that has something left to do.

    Attributes:
        plan: of the study file.
        going_on: the plan that the stored study continues with.
        idle: how many workers it leaves idle when it runs alone.
    """

    study: StoredStudy
    plan: StudyPlan
    going_on: StudyPlan
    idle: int


def together(begun: Sequence[Begun]) -> list[Begun]:
    """The studies that can share the workers of the first one: they want as many workers, in the same places."""
    return [one for one in begun if _place(one.going_on) == _place(begun[0].going_on)]


def _place(plan: StudyPlan) -> tuple[object, ...]:
    return plan.workers, plan.devices, plan.ray


def run_side_by_side(experiment: Experiment, begun: Sequence[Begun], on_end: OnEnd, how: Mapping[str, bool]) -> None:
    """Run studies until all have ended. A study that fails does not stop the others.

    Args:
        experiment: the one that all of them belong to.
        begun: what to run; :func:`together` says what can be.
        on_end: called for each study with its result, or with the reason why it failed.
        how: further arguments of :meth:`Experiment.run`.

    Raises:
        Exception: the first that is no LcscError, of any study, after all have ended.
    """
    url, objective = experiment.storage.url, experiment.objective
    plans = {one.plan.name: one.plan for one in begun}
    total = sum(one.going_on.spec.budget.total for one in begun)
    images = objective.images_per_evaluation
    done = sum(spent_by(one.study.trials(), one.going_on.spec.budget, images) for one in begun)
    name = f"{begun[0].plan.spec.name}, {len(begun)} studies"
    with experiment.workers(begun[0].going_on) as pool, progress(name, total, done=done) as advance:
        assert isinstance(pool, WorkerPool)
        line = OneLine(advance, len(begun))

        def run(plan: StudyPlan) -> str:
            with _opened_for(experiment, url, pool, line) as own:
                return own.run(plan, **how)

        with _threads(run, plans, pool) as futures:
            _say_ends(futures, plans, on_end)


@contextlib.contextmanager
def _opened_for(experiment: Experiment, url: str, pool: WorkerPool, line: OneLine) -> Iterator[Experiment]:
    storage = open_storage(url, write=True)
    try:
        yield experiment.beside(storage, pool.share(), line)
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextlib.contextmanager
def _threads(
    run: Callable[[StudyPlan], str], plans: Mapping[str, StudyPlan], pool: Workers
) -> Iterator[Mapping[Future[str], str]]:
    """A thread for each plan. Leaving early closes the pool and waits until all leases are released."""
    stop = threading.Event()
    futures: dict[Future[str], str] = {Future(): name for name in plans}

    def work(future: Future[str], plan: StudyPlan) -> None:
        stop_with(stop)
        try:
            future.set_result(run(plan))
        except BaseException as error:
            future.set_exception(error)

    for future, name in futures.items():
        threading.Thread(target=work, args=(future, plans[name]), name=f"lcsc {name}", daemon=True).start()
    try:
        yield futures
    except BaseException:
        stop.set()
        if isinstance(pool, WorkerPool):
            pool.close()
        concurrent.futures.wait(futures, timeout=LAST_SECONDS)
        raise


def _say_ends(futures: Mapping[Future[str], str], plans: Mapping[str, StudyPlan], on_end: OnEnd) -> None:
    unexpected: list[BaseException] = []
    for future in concurrent.futures.as_completed(futures):
        error = future.exception()
        if error is None or isinstance(error, LcscError):
            on_end(plans[futures[future]], future.result() if error is None else error)
        else:
            unexpected.append(error)
    if unexpected:
        raise unexpected[0]


def begin_all(
    experiment: Experiment, plans: Sequence[StudyPlan], on_end: OnEnd, how: Mapping[str, bool]
) -> list[Begun]:
    """Create the studies that do not exist yet, and report those that are finished or cannot run."""
    begun = []
    for plan in plans:
        try:
            found = _begin(experiment, plan, how)
        except LcscError as error:
            found = error
        if isinstance(found, Begun):
            begun.append(found)
        else:
            on_end(plan, found)
    return begun


def _begin(experiment: Experiment, plan: StudyPlan, how: Mapping[str, bool]) -> Begun | str | LcscError:
    study, going_on = experiment.begin(
        plan, lower_budget=how.get("lower_budget", False), accept_code=how.get("accept_code", False)
    )
    if is_finished(study, going_on) and not how.get("retry_failed", False):
        return experiment.run(plan, **how)  # which says that it is finished
    resolved = resolve(going_on, experiment.objective, study.attributes)  # loads the objective before threads need it
    going_on = going_on.changed(budget=resolved.budget)
    return Begun(study, plan, going_on, resolved.parallelism.idle(going_on.workers))
