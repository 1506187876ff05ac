"""One study during and after its run, as plain data: progress, where its time went, what failed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.history import PARTS, Floats, StudyHistory, SummarizedStudy, Trials, kept_metric
from lcsc_opt.database.kept_bound import KeptBound
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HELD_OUT_REPORT
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.summary import longest_pause, wall_clock
from lcsc_opt.views import number

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
        finished = study.finished
        searched = finished[~finished["inherited"]]
        done = study.budget_spent
        total = study.budget_total
        state = study.progress_state
        rate = _rate(searched, done)
        seconds_left = None
        if state == "running" and total and rate:
            seconds_left = max((total - done) / rate, 0.0)
        return cls(
            state=state,
            unit=study.budget_unit,
            done=done,
            total=total,
            per_hour=None if rate is None else 3600 * rate,
            seconds_left=seconds_left,
            failed=len(study.failed),
            retried=len(set(study.reasons) - set(study.failed["number"].tolist())),
        )


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


def studies_table(studies: Sequence[SummarizedStudy]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Header and rows: state, results and cost of each study."""
    header = ("study", "state", "evaluations", "failed", "searched", "held-out", "images", "seconds")
    rows: list[list[object]] = []
    for study in studies:
        evaluations: object = study.evaluations
        if study.budget_unit == "evaluations" and study.budget_total:
            evaluations = f"{study.budget_spent}/{study.budget_total}"
        row = [study.study, study.state, evaluations, study.summary.failed]
        row += [number(study.searched), number(study.held_out_loss)]
        row += [f"{study.images:,}", f"{study.seconds:,.0f}"]
        rows.append(row)
    return header, rows


def sorted_studies(studies: Sequence[SummarizedStudy], order: str) -> list[SummarizedStudy]:
    """Studies in another order than that of their creation; those without the value come last.

    Args:
        studies: in the order in which they were created.
        order: ``created``, ``name``, the losses ``searched`` and ``held-out`` from the lowest, or ``evaluations`` and
            ``seconds`` from the highest.
    """
    values: dict[str, Callable[[SummarizedStudy], Any]] = {
        "created": lambda _: 0,
        "name": lambda study: study.study,
        "searched": lambda study: _or_infinite(study.searched),
        "held-out": lambda study: _or_infinite(study.held_out_loss),
        "evaluations": lambda study: -study.evaluations,
        "seconds": lambda study: -study.seconds,
    }
    return sorted(studies, key=values[order])


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


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
        "forked_from": history.forked_from,
        "inherited_trials": history.summary.inherited,
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
