"""One study during and after its run, as plain data: progress, where its time went, what failed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter

import numpy as np

from lcsc_opt.base.records import NodeWork
from lcsc_opt.database.history import PARTS, Floats, StudyHistory, Trials, images_taken
from lcsc_opt.database.nodes import KeptNodes
from lcsc_opt.views.curves import LEAST_PAUSE, wall_clock

RECENT = 50  # trials that the rate is computed from
MOST_BARS = 120  # in a figure of trials
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a study.

    Attributes:
        state: ``running``, ``finished``, ``interrupted`` or ``empty``.
        unit: of the budget, ``evaluations`` or ``images``.
        done: how much of the budget was spent; inherited trials do not count.
        total: the budget; ``None`` if none is stored.
        per_hour: units per hour, at the rate of the last trials; ``None`` until there are two trials.
        seconds_left: at that rate; ``None`` unless the study is running.
        failed: trials that failed.
        retried: trials that succeeded after a failed attempt.
    """

    state: str
    unit: str
    done: int
    total: int | None
    per_hour: float | None
    seconds_left: float | None
    failed: int
    retried: int

    @property
    def share(self) -> float | None:
        """The share of the budget that was spent, from 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else None


def progress_of(study: StudyHistory) -> Progress:
    """The progress of a study, its rate, and the time that it still needs."""
    unit, total = next(iter(study.budget.items()), ("evaluations", None))
    finished = study.finished
    is_own = ~finished["inherited"]
    own = finished[is_own]
    done = len(own) if unit == "evaluations" else int(images_taken(finished)[is_own].sum())
    state = (
        "finished" if study.ended else "running" if study.running else "interrupted" if len(study.trials) else "empty"
    )
    clock = np.sort(wall_clock(own))[-RECENT:]
    elapsed = float(clock[-1] - clock[0]) if len(clock) > 1 else 0.0
    rate = (len(clock) - 1) * (done / len(own)) / elapsed if elapsed > 0 else None
    left = (total - done) / rate if state == "running" and total and rate else None
    failed = len(study.failed)
    return Progress(
        state=state,
        unit=unit,
        done=done,
        total=total,
        per_hour=None if rate is None else 3600 * rate,
        seconds_left=None if left is None else max(left, 0.0),
        failed=failed,
        retried=len(set(study.reasons) - set(study.failed["number"].tolist())),
    )


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who runs a study.

    Attributes:
        count: how many workers evaluate at once.
        host: the machine of the process that coordinates them; ``None`` if nobody runs the study.
        process: the number of that process.
        evaluating: (trial, seconds since its ask) for each trial without a result, the longest first.
    """

    count: int
    host: str | None
    process: int | None
    evaluating: tuple[tuple[int, float], ...]


def workers_of(study: StudyHistory, *, now: float | None = None) -> Workers:
    """Who runs a study, and which trials have no result yet; ``now`` is in seconds since 1970."""
    moment, holder = time.time() if now is None else now, study.holder
    waiting = np.setdiff1d(study.trials["number"], study.finished["number"])
    rows = study.trials[np.isin(study.trials["number"], waiting)]
    ages = [(int(row["number"]), max(moment - float(row["started"]), 0.0)) for row in rows]
    return Workers(
        count=study.workers,
        host=None if holder is None else holder.host,
        process=None if holder is None else holder.process,
        evaluating=tuple(sorted(ages, key=lambda age: (-age[1], age[0]))),
    )


@dataclasses.dataclass(frozen=True)
class NodesNow:
    """The state of a study's workers.

    Attributes:
        nodes: the workers of each machine.
        alive: how many workers answer, on all machines.
        asked: how many workers were asked for.
        seconds: the age of this information.
    """

    nodes: tuple[NodeWork, ...]
    alive: int
    asked: int
    seconds: float


def nodes_of(study: StudyHistory, *, now: float | None = None) -> NodesNow | None:
    """The last stored state of a running study's workers; ``now`` is in seconds since 1970.

    If the searching process itself evaluates, its state is computed from the last trials. ``None`` if nobody runs the
    study.
    """
    if study.holder is None:
        return None
    moment, kept = time.time() if now is None else now, study.nodes
    if kept is None or kept.kept_at < study.holder.since:  # none, or from an earlier run
        here = NodeWork(study.holder.host, 1, _busy(study, study.holder.since), 0)
        kept = KeptNodes(moment, (here,) if study.workers == 1 else ())
    alive = sum(node.alive for node in kept.nodes)
    return NodesNow(kept.nodes, alive, study.workers, max(moment - kept.kept_at, 0.0))


def _busy(study: StudyHistory, since: float) -> float | None:
    """The share of the last trials' time that was spent on evaluation, for one worker."""
    trials = study.finished
    trials = trials[trials["started"] >= since][-RECENT:]
    elapsed = float(trials["ended"].max() - trials["started"].min()) if len(trials) else 0.0
    return min(float(trials["seconds"].sum()) / elapsed, 1.0) if elapsed > 0 else None


@dataclasses.dataclass(frozen=True)
class FailureReason:
    """One reason, how often it came up, and in which trials. ``lost`` of them failed, the others succeeded later.

    ``traceback`` is Python's text of the last exception with this reason; empty if there was none.
    """

    reason: str
    attempts: int
    trials: tuple[int, ...]
    lost: int
    traceback: str = ""


def failures_of(study: StudyHistory) -> list[FailureReason]:
    """Why attempts failed, the most frequent reason first."""
    lost = set(study.failed["number"].tolist())
    attempts = Counter(reason for reasons in study.reasons.values() for reason in reasons)
    numbers: dict[str, list[int]] = {reason: [] for reason in attempts}
    for number, reasons in sorted(study.reasons.items()):
        for reason in dict.fromkeys(reasons):
            numbers[reason].append(number)
    return [
        FailureReason(
            reason,
            count,
            tuple(numbers[reason]),
            len(lost.intersection(numbers[reason])),
            study.tracebacks.get(reason, ""),
        )
        for reason, count in attempts.most_common()
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class TrialTimes:
    """Seconds per trial by part: means over groups of ``width`` consecutive trials.

    Attributes:
        numbers: ``[n]``, the first trial of each group.
        width: trials in a group.
        seconds: part → ``[n]``; ``other`` is the optimizer, the database, waiting, and parts without a name.
    """

    numbers: Floats
    width: int
    seconds: dict[str, Floats]


def trial_times(study: StudyHistory, *, most: int = MOST_BARS) -> TrialTimes:
    """Where the time of trials went, over the search. Parts that took no time are left out."""
    trials = study.trials[np.isin(study.trials["number"], study.finished["number"])]
    columns = {part.removesuffix("_seconds"): trials[part].astype(np.float64) for part in PARTS}
    named = np.sum(list(columns.values()), axis=0) if len(trials) else np.zeros(0)
    unnamed = np.maximum(trials["seconds"] - named, 0.0)
    columns[OTHER] = unnamed + seconds_outside(study, trials)
    width = max(math.ceil(len(trials) / most), 1)
    starts = np.arange(0, len(trials), width)
    sizes = np.diff(np.append(starts, len(trials)))
    means = {
        part: np.add.reduceat(values, starts) / sizes if len(starts) else values for part, values in columns.items()
    }
    return TrialTimes(
        numbers=trials["number"][starts].astype(np.float64),
        width=width,
        seconds={part: values for part, values in means.items() if part == OTHER or values.any()},
    )


def seconds_outside(study: StudyHistory, trials: Trials) -> Floats:
    """``[n]``, the seconds of each trial outside its evaluation; zero if the search was interrupted there.

    With one worker a trial lasts until the next one starts. With several it lasts from its ask to its result.
    """
    following = np.append(trials["started"][1:], trials["ended"][-1:])
    until = following if study.workers == 1 else trials["ended"]
    outside = np.nan_to_num(until - trials["started"] - trials["seconds"])
    pause = max(LEAST_PAUSE, 3 * float(np.median(trials["seconds"]))) if len(trials) else 0.0
    return np.where((outside < 0) | (outside > pause), 0.0, outside)
