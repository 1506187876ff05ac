"""One study during and after its run, as plain data: progress, where its time went, what failed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.base.records import Coefficients, Yardstick
from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.experiment import search_yardstick
from lcsc_opt.database.history import Standing, Trials
from lcsc_opt.database.reader import Failures, HistoryReader
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.summary import PARTS, is_finished
from lcsc_opt.views import number

EVALUATION = "evaluation"  # the part that stands for all of a trial whose objective names none
RECENT = 50  # trials that the rate is computed from
SHORTEST_INTERRUPTION = 30.0  # seconds without an evaluation


def rate(study: Standing, trials: Trials) -> float | None:
    """Units of the budget per second over the last trials; ``None`` until time has passed between two of them."""
    ended = trials[is_finished(trials)]
    gaps = np.diff(np.sort(ended["ended"])[-RECENT:])
    if len(gaps):
        gaps = gaps[gaps <= max(SHORTEST_INTERRUPTION, 3 * np.median(ended["seconds"]))]
    if not gaps.sum() > 0:
        return None
    return float(study.budget_spent / study.evaluations * len(gaps) / gaps.sum())


def rate_text(study: Standing, per_second: float | None) -> str | None:
    """``8,349 images an hour``; ``None`` until it is known, and for a budget of time."""
    if per_second is None or study.budget_unit == "seconds":
        return None
    return f"{3600 * per_second:,.0f} {study.budget_unit} an hour"


def seconds_left(study: Standing, per_second: float | None) -> float | None:
    """The time that a running study still needs at this rate."""
    if study.progress_state != "running" or not study.budget_total or not per_second:
        return None
    return max((study.budget_total - study.budget_spent) / per_second, 0.0)


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
    def of(cls, failures: Failures) -> list[FailureReason]:
        """Why attempts of a study failed, the most frequent reason first."""
        attempts = Counter(reason for reasons in failures.reasons.values() for reason in reasons)
        lost: Counter[str] = Counter()
        for trial in failures.failed:
            lost.update(set(failures.reasons.get(trial, ())))
        return [
            cls(reason, count, lost[reason], failures.tracebacks.get(reason, ""))
            for reason, count in attempts.most_common()
        ]


def studies_table(studies: Sequence[Standing]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Header and rows: state, results and cost of each study."""
    header = ("study", "state", "evaluations", "failed", "searched", "held-out", "images", "seconds")
    rows: list[list[object]] = []
    for study in studies:
        evaluations: object = study.evaluations
        if study.budget_unit == "evaluations" and study.budget_total:
            evaluations = f"{study.budget_spent}/{study.budget_total}"
        row = [study.study, study.state, evaluations, study.summary.failed]
        row += [number(study.searched), number(study.reported)]
        row += [f"{study.images:,}", f"{study.seconds:,.0f}"]
        rows.append(row)
    return header, rows


def overview(study: StoredStudy) -> dict[str, Any]:
    """JSON-able: settings, state, the answer's coefficients, failures by reason, seconds per trial by part.

    ``best_trial`` has the lowest loss of the search, as in plain Optuna. ``chosen_trial`` is the best on other noise;
    ``None`` if that is a mean of several, which ``chosen_model`` names. ``ended`` says how the search ended.

    Raises:
        StudyStoreError: its name is not ``experiment/optimizer/seed``, or it no longer exists.
    """
    reader = HistoryReader(study.storage)
    attributes = our_studies(study.storage)[study.name]
    standing = reader.read_study(study.name)
    failures = reader.failures(standing)
    specification = attributes.get("specification", {})
    space = specification.get("space", {})
    options = specification.get("optimizer", {}).get("options", {})
    defaults = attributes.get("optimizer_defaults", {})  # with which the study began besides
    # a trial counts with the reason of its last attempt
    last_reasons = Counter(failures.reasons[trial][-1] for trial in failures.failed)
    yardstick = search_yardstick(attributes)
    measured = standing.found
    return {
        **standing.as_row(),
        "budget": dict(standing.budget),
        "checkpoints": len(standing.steps),
        "optimizer_options": {**defaults, **options},
        "space": {key: value for key, value in space.items() if value is not None},
        "objective": specification.get("objective", {}),
        "start": standing.start,
        "code_changes": attributes.get("changes", []),
        "relative_to": None if yardstick is None else dict(yardstick.metrics),
        "keeps": None if yardstick is None or yardstick.kept is None else _described_bound(yardstick),
        "compared_trials": standing.summary.compared,
        "best_trial": standing.best,
        "chosen_trial": standing.chosen if measured is None else measured.model.trial,
        "chosen_model": None if measured is None else measured.model.name,
        "ended": (attributes.get("search_ended") or {}).get("how"),
        **_coefficients(standing, reader.answer(standing), space),
        "failed": standing.summary.failed,
        "failure_reasons": dict(last_reasons.most_common()),
        "tracebacks": dict(failures.tracebacks),
        "seconds_per_trial": seconds_per_trial(standing),
        "shares_of_time": shares_of_time(standing),
    }


def _described_bound(yardstick: Yardstick) -> str:
    """``precision at least 0.7463``."""
    limit = "at least" if yardstick.sign < 0 else "at most"
    return f"{yardstick.kept} {limit} {number(yardstick.bound)}"


def _coefficients(study: Standing, coefficients: Coefficients | None, space: Mapping[str, Any]) -> dict[str, Any]:
    """The answer's coefficients, described and as numbers, and the layer groups of their rows."""
    if coefficients is None:
        return {"best_coefficients": None, "coefficients": None, "layer_groups": None}
    layer_groups = None
    if coefficients.ndim > 1:
        layer_groups = {"rows": space["rows"], "names": list(study.layer_groups)}
    return {
        "best_coefficients": describe_coefficients(coefficients, study.steps),
        "coefficients": coefficients.tolist(),
        "layer_groups": layer_groups,
    }


_ACTIVITIES = {"merge": "merging", "sample": "sampling", "metric": "metrics"}
"""Part of a trial → what it is called where a search says where its time went."""


def seconds_per_trial(study: Standing) -> dict[str, float]:
    """Mean seconds of a trial, by part.

    Parts are means over the trials with a loss, since only these record them. Without parts, there is the mean
    ``evaluation`` of all trials.
    """
    summary = study.summary
    if not summary.with_loss:
        return {}
    mean_seconds = {}
    for part, seconds in zip(PARTS, summary.part_seconds, strict=True):
        if seconds:
            mean_seconds[part.removesuffix("_seconds")] = seconds / summary.with_loss
    if not mean_seconds:
        mean_seconds[EVALUATION] = summary.seconds / summary.evaluations
    return mean_seconds


def shares_of_time(study: Standing) -> str:
    """Where the time of evaluations with a loss went, the largest share first: ``sampling 61 %, features 30 %``.

    Shares below one percent are left out.
    """
    seconds = seconds_per_trial(study)
    total = sum(seconds.values())
    if not total:
        return ""
    shares = sorted(((part_seconds / total, part) for part, part_seconds in seconds.items()), reverse=True)
    return ", ".join(f"{_ACTIVITIES.get(part, part)} {100 * share:.0f} %" for share, part in shares if share >= 0.01)
