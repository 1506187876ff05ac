"""The state of a study: its progress while it is searched, its outcome, how long the rest of it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

from optuna.storages import RDBStorage

from lcsc_opt.base.progress import notice, progress
from lcsc_opt.database.history import NODES, KeptNodes, StudyHistory
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import WorkerPool
from lcsc_opt.optimizers import needs_gradient
from lcsc_opt.search.plan import StudyPlan
from lcsc_opt.search.runner import Search

_KEEP_SECONDS = 10.0  # between two writes of the workers' state


def outcome_of(study: StoredStudy) -> str:
    """The state or the result of a study, in one line for people."""
    found = HistoryReader(study.storage).read_study(study.name)
    searched = "no result on the search's noise" if found.searched is None else f"best {found.searched:.4g}"
    held_out = "" if found.held_out_loss is None else f", held-out {found.held_out_loss:.4g}"
    failed = f" ({len(found.failed)} failed: lcsc show {study.name})" if len(found.failed) else ""
    return f"{searched}{held_out} after {found.evaluations} evaluations{failed}"


def search_ended(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether the search has nothing left to do for the plan's budget. The held-out report does not count."""
    stored = study.attributes
    ended = stored.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    budget = plan.spec.budget
    if budget.evaluations is not None:
        return bool(ended["evaluations"] >= budget.evaluations)
    return bool(stored["budget"].get("images") and stored["budget"]["images"] >= budget.total)


def is_finished(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether nothing is left to do for a plan."""
    stored = study.attributes
    reported = plan.spec.held_out is None or stored.get("held_out") is not None or stored.get("holds_out") is False
    return reported and search_ended(study, plan)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Attributes:
        plan: of the study.
        evaluations: how many are stored.
        seconds: of what is left, on one worker; ``None`` before the experiment has comparable evaluations.
    """

    plan: StudyPlan
    evaluations: int
    seconds: float | None


def estimates(plans: Sequence[StudyPlan], storage: RDBStorage) -> list[Estimate]:
    """What is left of each plan, from the seconds of the experiment's stored evaluations."""
    reader = HistoryReader(storage)
    stored = {study.study: study for study in reader.read_studies(reader.searches())}
    made = []
    for plan in plans:
        study = stored.get(plan.name)
        ended = study is not None and search_ended(StoredStudy.open(storage, plan.name), plan)
        seconds = _seconds_left(plan, study, [*stored.values()], ended=ended)
        made.append(Estimate(plan, 0 if study is None else study.evaluations, seconds))
    return made


def _seconds_left(
    plan: StudyPlan, study: StudyHistory | None, stored: Sequence[StudyHistory], *, ended: bool
) -> float | None:
    """Of the search and the report: the best trials again, and the chosen one.

    An evaluation takes as long as in studies of the same optimizer, else in all that follow no gradient either.
    """
    timed = [known for known in stored if split_name(known.study)[0] == plan.spec.name and known.seconds]
    same = [known for known in timed if known.optimizer == plan.optimizer.name]
    timed = same if same or needs_gradient(plan.optimizer) else timed
    if not (count := sum(known.evaluations for known in timed)):
        return None
    images, budget, held_out = sum(known.images for known in timed) / count, plan.spec.budget, plan.spec.held_out
    left: float = 0
    if budget.images is not None and images:
        left = max(budget.images - (0 if study is None else study.images), 0) / images
    else:
        left = max(budget.total - (0 if study is None else study.evaluations), 0)
    if ended:
        left = 0
    if held_out is not None and (study is None or study.held_out is None):
        left += (held_out.top + 1) * (held_out.images / images if images else 1)
    return left * sum(known.seconds for known in timed) / count


@contextlib.contextmanager
def reporting(
    search: Search, study: StoredStudy, pool: WorkerPool | None, *, elastic: bool
) -> Iterator[Callable[[Search], None]]:
    """A progress line while this is open; yields what :meth:`Search.run` calls.

    The state of each machine's workers is written now and then, and at the end.

    Args:
        search: what is shown.
        study: its lock must be held.
        pool: the workers, if there are some.
        elastic: whether the line shows how many of the workers live.
    """
    if (last := search.last_stored) is not None:
        notice(f"{search.name}: continuing after trial {last}")
    shown, kept_at = search.stored_spent, -math.inf

    def keep() -> None:
        if pool is not None:
            study.set_attribute(NODES, KeptNodes(time.time(), tuple(pool.nodes())).as_stored())

    with progress(search.name, search.budget.total, done=shown) as advance:

        def on_tell(search: Search) -> None:
            nonlocal shown, kept_at
            notes = [f"best {search.best[0]:.4g} in trial {search.best[1]}"] if search.best else []
            notes += [f"{search.failures} failed"] if search.failures else []
            notes += [f"{pool.alive} of {len(pool)} workers"] if elastic and pool is not None else []
            advance(max(search.spent - shown, 0), note=", ".join(notes))
            shown = max(shown, search.spent)
            if time.monotonic() - kept_at >= _KEEP_SECONDS:
                kept_at = time.monotonic()
                keep()

        on_tell(search)
        yield on_tell
        keep()
