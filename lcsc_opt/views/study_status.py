"""One study during and after its run, as plain data: progress, where its time went, what failed, everything."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.history import PARTS, Floats, StudyHistory, Trials
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views import number
from lcsc_opt.views.curves import LEAST_PAUSE, wall_clock

RECENT = 50  # trials that the rate is computed from


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

    @classmethod
    def of(cls, study: StudyHistory) -> Progress:
        """The progress of a study, its rate, and the time that it still needs."""
        unit, total = next(iter(study.budget.items()), ("evaluations", None))
        finished = study.finished
        is_own = ~finished["inherited"]
        own = finished[is_own]
        done = len(own) if unit == "evaluations" else int(_images_taken(study)[is_own].sum())
        unfinished = "running" if study.running else "interrupted" if len(study.trials) else "empty"
        state = "finished" if study.ended else unfinished
        clock = np.sort(wall_clock(own))[-RECENT:]
        elapsed = float(clock[-1] - clock[0]) if len(clock) > 1 else 0.0
        rate = (len(clock) - 1) * (done / len(own)) / elapsed if elapsed > 0 else None
        return cls(
            state=state,
            unit=unit,
            done=done,
            total=total,
            per_hour=None if rate is None else 3600 * rate,
            seconds_left=max((total - done) / rate, 0.0) if state == "running" and total and rate else None,
            failed=len(study.failed),
            retried=len(set(study.reasons) - set(study.failed["number"].tolist())),
        )


def _images_taken(study: StudyHistory) -> Floats:
    """``[n]`` images that each finished trial took of the budget: those it sampled, or if it failed, was asked for.

    A failed trial that names no number took as many as a complete trial.
    """
    trials = study.finished
    plain = trials["images"][~np.isnan(study.compared["loss"])].max(initial=0.0)
    asked = np.where(trials["asked"] > 0, trials["asked"], plain)
    return np.where(np.isin(trials["number"], study.failed["number"]), asked, trials["images"])


def duration(seconds: float) -> str:
    """For people: two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


@dataclasses.dataclass(frozen=True)
class FailureReason:
    """One reason, how often it came up, and how many of these trials were lost; the others succeeded later.

    ``traceback`` is Python's text of the last exception with this reason; empty if there was none.
    """

    reason: str
    attempts: int
    lost: int
    traceback: str = ""

    @classmethod
    def of(cls, study: StudyHistory) -> list[FailureReason]:
        """Why attempts of a study failed, the most frequent reason first."""
        attempts = Counter(reason for reasons in study.reasons.values() for reason in reasons)
        failed = [set(study.reasons.get(number, ())) for number in study.failed["number"].tolist()]
        lost = Counter(reason for reasons in failed for reason in reasons)
        return [cls(why, count, lost[why], study.tracebacks.get(why, "")) for why, count in attempts.most_common()]


def studies_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Header and rows: state, results and cost of each study."""
    header = ("study", "state", "evaluations", "failed", "searched", "held-out", "images", "seconds")
    rows: list[list[object]] = []
    for study in studies:
        total, costs = study.budget.get("evaluations"), (f"{study.images:,}", f"{study.seconds:,.0f}")
        done = f"{Progress.of(study).done}/{total}" if total else study.evaluations
        losses = (number(study.searched), number(study.held_out_loss))
        rows.append([study.study, study.state, done, len(study.failed), *losses, *costs])
    return header, rows


def seconds_outside(study: StudyHistory, trials: Trials) -> Floats:
    """``[n]``, the seconds of each trial outside its evaluation; zero if the search was interrupted there.

    With one worker a trial lasts until the next one starts. With several it lasts from its ask to its result.
    """
    following = np.append(trials["started"][1:], trials["ended"][-1:])
    until = following if study.workers == 1 else trials["ended"]
    outside = np.nan_to_num(until - trials["started"] - trials["seconds"])
    pause = max(LEAST_PAUSE, 3 * float(np.median(trials["seconds"]))) if len(trials) else 0.0
    return np.where((outside < 0) | (outside > pause), 0.0, outside)


def overview(study: StoredStudy) -> dict[str, Any]:
    """JSON-able: settings, state, the answer's coefficients, failures by reason, seconds per trial by part.

    ``best_trial`` has the lowest loss of the search, as in plain Optuna. ``chosen_trial`` is the answer, chosen among
    the best trials on other noise.

    Raises:
        StudyStoreError: its name is not ``experiment/optimizer/seed``, or it no longer exists.
    """
    reader, attributes = HistoryReader(study.storage), study.attributes
    found = reader.read_study(study.name)
    best, specification = reader.answer(found), attributes.get("specification", {})
    lost = Counter(found.reasons[number][-1] for number in found.failed["number"].tolist())
    return {
        **found.as_row(),
        "budget": dict(found.budget),
        "checkpoints": len(found.steps),
        "optimizer_options": specification.get("optimizer", {}).get("options", {}),
        "space": {key: value for key, value in specification.get("space", {}).items() if value is not None},
        "objective": specification.get("objective", {}),
        "code_changes": attributes.get("changes", []),
        "compared_trials": int(np.count_nonzero(~np.isnan(found.compared["loss"]))),
        "best_trial": found.best,
        "chosen_trial": found.chosen,
        "best_coefficients": None if best is None else describe_coefficients(best, found.steps),
        "coefficients": None if best is None else best.tolist(),
        "layer_groups": None
        if best is None or best.ndim == 1
        else {"rows": specification["space"]["rows"], "names": list(found.layer_groups)},
        "held_out_report": attributes.get("held_out"),
        "warning": found.warning,
        "failed": len(found.failed),
        "failure_reasons": dict(lost.most_common()),  # by the last attempt of each trial
        "tracebacks": dict(found.tracebacks),
        "seconds_per_trial": _seconds_per_trial(found),
    }


def _seconds_per_trial(study: StudyHistory) -> dict[str, float]:
    """Mean seconds of each part of a complete trial; ``other`` is the median of the time outside evaluations.

    ``other`` is the time of the optimizer, the database and the progress bar. An interruption does not move a median.
    """
    complete = study.trials[~np.isnan(study.trials["loss"])]
    if not len(complete):
        return {}
    means = {part.removesuffix("_seconds"): float(complete[part].mean()) for part in PARTS}
    named = {part: seconds for part, seconds in means.items() if seconds}
    outside = seconds_outside(study, complete)[:-1]  # the last trial has no trial after it
    return {**named, **({"other": float(np.median(outside))} if len(outside) else {})}
