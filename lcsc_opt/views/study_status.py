"""One study during and after its run, as plain data: progress, where its time went, what failed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.history import PARTS, Floats, StudyHistory, Trials, kept_metric
from lcsc_opt.database.kept_bound import KeptBound
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HELD_OUT_REPORT
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views import number
from lcsc_opt.views.curves import longest_pause, wall_clock

RECENT = 50  # trials that the rate is computed from


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a study.

    Attributes:
        state: ``running``, ``finished``, ``interrupted`` or ``empty``.
        unit: the unit of the budget, ``evaluations`` or ``images``.
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
        if not self.total:
            return None
        return min(self.done / self.total, 1.0)

    @classmethod
    def of(cls, study: StudyHistory) -> Progress:
        """The progress of a study, its rate, and the time that it still needs."""
        unit, total = next(iter(study.budget.items()), ("evaluations", None))
        finished = study.finished
        is_inherited = finished["inherited"]
        searched = finished[~is_inherited]
        done = len(searched)
        if unit == "images":
            done = int(_images_charged(study)[~is_inherited].sum())
        state = _state(study)
        rate = _rate(searched, done)
        seconds_left = None
        if state == "running" and total and rate:
            seconds_left = max((total - done) / rate, 0.0)
        return cls(
            state=state,
            unit=unit,
            done=done,
            total=total,
            per_hour=None if rate is None else 3600 * rate,
            seconds_left=seconds_left,
            failed=len(study.failed),
            retried=len(set(study.reasons) - set(study.failed["number"].tolist())),
        )


def _state(study: StudyHistory) -> str:
    """``running``, ``finished``, ``interrupted`` or ``empty``."""
    if study.ended:
        return "finished"
    if study.running:
        return "running"
    if len(study.trials):
        return "interrupted"
    return "empty"


def _rate(trials: Trials, done: int) -> float | None:
    """Units of the budget per second over the last trials; ``None`` until time has passed between two of them.

    Args:
        trials: ``[n]``, those that count.
        done: units that they were charged, all together.
    """
    clock = np.sort(wall_clock(trials))[-RECENT:]
    if len(clock) < 2:
        return None
    elapsed = float(clock[-1] - clock[0])
    if elapsed <= 0:
        return None
    return (len(clock) - 1) * (done / len(trials)) / elapsed


def _images_charged(study: StudyHistory) -> Floats:
    """``[n]`` images that each finished trial took of the budget: those it sampled, or if it failed, was asked for.

    A failed trial that names no number took as many as a complete trial.
    """
    trials = study.finished
    is_comparable = ~np.isnan(study.compared["loss"])
    images_of_complete = trials["images"][is_comparable].max(initial=0.0)
    asked = np.where(trials["asked"] > 0, trials["asked"], images_of_complete)
    is_failed = np.isin(trials["number"], study.failed["number"])
    return np.where(is_failed, asked, trials["images"])


def duration(seconds: float) -> str:
    """For people: two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


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
        lost: Counter[str] = Counter()
        for trial in study.failed["number"].tolist():
            lost.update(set(study.reasons.get(trial, ())))
        return [
            cls(reason, count, lost[reason], study.tracebacks.get(reason, ""))
            for reason, count in attempts.most_common()
        ]


def studies_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Header and rows: state, results and cost of each study."""
    header = ("study", "state", "evaluations", "failed", "searched", "held-out", "images", "seconds")
    rows: list[list[object]] = []
    for study in studies:
        evaluations: object = study.evaluations
        total = study.budget.get("evaluations")
        if total:
            evaluations = f"{Progress.of(study).done}/{total}"
        row = [study.study, study.state, evaluations, len(study.failed)]
        row += [number(study.searched), number(study.held_out_loss)]
        row += [f"{study.images:,}", f"{study.seconds:,.0f}"]
        rows.append(row)
    return header, rows


def seconds_outside(study: StudyHistory, trials: Trials) -> Floats:
    """``[n]``, the seconds of each trial outside its evaluation; zero if the search was interrupted there.

    With one worker a trial lasts until the next one starts. With several it lasts from its ask to its result.
    """
    until = trials["ended"]
    if study.workers == 1:
        until = np.append(trials["started"][1:], trials["ended"][-1:])
    outside = np.nan_to_num(until - trials["started"] - trials["seconds"])
    is_interrupted = outside > longest_pause(trials)
    return np.where((outside < 0) | is_interrupted, 0.0, outside)


def overview(study: StoredStudy) -> dict[str, Any]:
    """JSON-able: settings, state, the answer's coefficients, failures by reason, seconds per trial by part.

    ``best_trial`` has the lowest loss of the search, as in plain Optuna. ``chosen_trial`` is the answer, chosen among
    the best trials on other noise.

    Raises:
        StudyStoreError: its name is not ``experiment/optimizer/seed``, or it no longer exists.
    """
    reader = HistoryReader(study.storage)
    attributes = study.attributes
    history = reader.read_study(study.name)
    specification = attributes.get("specification", {})
    space = specification.get("space", {})
    # a trial counts with the reason of its last attempt
    last_reasons = Counter(history.reasons[trial][-1] for trial in history.failed["number"].tolist())
    bound = KeptBound.of(attributes)
    return {
        **history.as_row(),
        "budget": dict(history.budget),
        "checkpoints": len(history.steps),
        "optimizer_options": specification.get("optimizer", {}).get("options", {}),
        "space": {key: value for key, value in space.items() if value is not None},
        "objective": specification.get("objective", {}),
        "code_changes": attributes.get("changes", []),
        "keeps": None if bound is None else _described_bound(bound, specification),
        "compared_trials": int(np.count_nonzero(~np.isnan(history.compared["loss"]))),
        "best_trial": history.best,
        "chosen_trial": history.chosen,
        **_coefficients(history, reader.answer(history), space),
        "held_out_report": attributes.get(HELD_OUT_REPORT),
        "warning": history.warning,
        "failed": len(history.failed),
        "failure_reasons": dict(last_reasons.most_common()),
        "tracebacks": dict(history.tracebacks),
        "seconds_per_trial": _seconds_per_trial(history),
    }


def _described_bound(bound: KeptBound, specification: Mapping[str, Any]) -> str:
    """``precision at least 0.7463; EMA* (EMA 0.9995), trial 3 of digits/EMAGrid/0``."""
    metrics = ", ".join(kept_metric(specification)) or "a metric"
    limit = "at least" if bound.constraint.sign < 0 else "at most"
    where = "among the first trials of this study" if bound.study is None else f"trial {bound.trial} of {bound.study}"
    return f"{metrics} {limit} {number(bound.constraint.value)}; {bound.label}, {where}"


def _coefficients(study: StudyHistory, answer: Floats | None, space: Mapping[str, Any]) -> dict[str, Any]:
    """The answer's coefficients, described and as numbers, and the layer groups that their rows are of."""
    if answer is None:
        return {"best_coefficients": None, "coefficients": None, "layer_groups": None}
    layer_groups = None
    if answer.ndim > 1:
        layer_groups = {"rows": space["rows"], "names": list(study.layer_groups)}
    return {
        "best_coefficients": describe_coefficients(answer, study.steps),
        "coefficients": answer.tolist(),
        "layer_groups": layer_groups,
    }


def _seconds_per_trial(study: StudyHistory) -> dict[str, float]:
    """Mean seconds of each part of a complete trial; ``other`` is the median of the time outside evaluations.

    ``other`` is the time of the optimizer, the database and the progress bar. An interruption does not move a median.
    """
    complete = study.trials[~np.isnan(study.trials["loss"])]
    if not len(complete):
        return {}
    seconds = {}
    for part in PARTS:
        mean = float(complete[part].mean())
        if mean:
            seconds[part.removesuffix("_seconds")] = mean
    outside = seconds_outside(study, complete)[:-1]  # the last trial has no trial after it
    if len(outside):
        seconds["other"] = float(np.median(outside))
    return seconds
