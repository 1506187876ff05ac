"""A few real trials, through the real runner, in a database that is thrown away."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.records import Cost
from lcsc_opt.base.spans import listening
from lcsc_opt.base.study_file import BudgetSpec
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.names import SUCCEEDED
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.search.experiment import Experiment
from lcsc_opt.search.plan import StudyPlan

WARM_UP = 1  # trials before those that count: they draw the noise, read the store, choose kernels, compile


@dataclasses.dataclass(frozen=True)
class TrialTimes:
    """What trials took on average.

    Attributes:
        trials: how many were measured.
        failed: how many of them failed.
        seconds: of wall-clock time from the end of one to the end of the next.
        cost: name → mean of what :class:`~lcsc_opt.base.records.Cost` says.
        spans: name of a span → mean of its seconds.
    """

    trials: int
    failed: int
    seconds: float
    cost: Mapping[str, float]
    spans: Mapping[str, float]


class SpanClock:
    """Records spans, and adds up their seconds.

    Attributes:
        spans: name, beginning and end of each, in seconds of the system's clock, as the dates in the database.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Record the span ``name``, which lasts as long as this is open."""
        start, began = time.perf_counter(), time.time()
        try:
            yield
        finally:
            with self._lock:
                self.spans.append((name, began, began + time.perf_counter() - start))

    def between(self, first: float, last: float) -> dict[str, float]:
        """Name → seconds of all spans within this time."""
        sums: dict[str, float] = {}
        for name, start, stop in self.spans:
            sums[name] = sums.get(name, 0.0) + max(min(stop, last) - max(start, first), 0.0)
        return sums


@contextlib.contextmanager
def throw_away_database(beside: Path | None = None) -> Iterator[RDBStorage]:
    """An empty SQLite database, in the folder ``beside`` where that can be written to; it is removed afterwards."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".lcsc-profile-", dir=beside))
        except OSError:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".lcsc-profile-"))
        storage = open_storage(f"sqlite:///{Path(folder) / 'profile.db'}", write=True)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def folder_of(url: str) -> Path | None:
    """The folder of an SQLite database; ``None`` for others."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        return None
    file = parsed.database
    return Path(file).parent if parsed.get_backend_name() == "sqlite" and file not in (None, "", ":memory:") else None


def run_trials(experiment: Experiment, plan: StudyPlan, count: int, *, name: str = "profile") -> TrialTimes:
    """Search as the plan says, for ``count`` trials after the warm-up, one worker.

    Args:
        experiment: in a database that is thrown away.
        plan: of the study that is profiled; its optimizer plans by the plan's whole budget.
        count: trials that are measured; fewer where the optimizer has no more to ask.
        name: of the experiment in that database.

    Raises:
        SearchFailedError: no trial could be measured.
    """
    alone = plan.changed(workers=1, spread="auto", held_out=None)
    experiment.check(alone)
    short = alone.changed(name=name, budget=BudgetSpec(evaluations=count + WARM_UP))
    planned = {"optimizer_budget": plan.spec.budget.model_dump()}
    study = StoredStudy.open_or_create(
        experiment.storage, short.name, {**short.attributes(experiment.objective), **planned}
    )
    clock = SpanClock()
    with listening(clock):
        experiment.run(short)
    return times_of(study.trials(), clock)


def times_of(trials: Sequence[FrozenTrial], clock: SpanClock) -> TrialTimes:
    """The averages over all trials that ended after the first one.

    Raises:
        SearchFailedError: fewer than two ended, or none of them well.
    """
    ended = sorted((trial for trial in trials if trial.datetime_complete is not None), key=_end)
    measured = ended[WARM_UP:]
    complete = [trial for trial in measured if trial.state in SUCCEEDED]
    if not complete:
        reason = next((str(t.user_attrs["reason"]) for t in ended if "reason" in t.user_attrs), "there were too few")
        raise SearchFailedError(f"no trial could be measured: {reason}")
    first, last, count = _end(ended[WARM_UP - 1]), _end(measured[-1]), len(measured)
    costs = [Cost.from_dict(trial.user_attrs["cost"]).as_dict() for trial in complete]
    return TrialTimes(
        trials=count,
        failed=count - len(complete),
        seconds=(last - first) / count,
        cost={name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]},
        spans={name: seconds / count for name, seconds in clock.between(first, last).items()},
    )


def _end(trial: FrozenTrial) -> float:
    assert trial.datetime_complete is not None  # of trials that have ended
    return trial.datetime_complete.timestamp()
