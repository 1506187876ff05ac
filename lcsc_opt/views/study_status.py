"""One study during and after its run, as plain data: progress, where its time went, what failed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.records import Coefficients, Yardstick
from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.summary import cost_of
from lcsc_opt.views import number
from lcsc_opt.views.tables import study_row

RECENT = 50  # trials that the rate is computed from
SHORTEST_INTERRUPTION = 30.0  # seconds without an evaluation


def rate(study: Standing, trials: Sequence[FrozenTrial]) -> float | None:
    """Units of the budget per second over the last trials; ``None`` until time has passed between two of them.

    It is the mean budget of a trial, over the mean time from the end of one trial to the end of the next. A gap that is
    much longer than an evaluation is left out: nothing ran then.
    """
    moments = [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete is not None]
    gaps = np.diff(np.sort(moments)[-RECENT:])
    if len(gaps):
        longest = 3 * statistics.median(cost_of(trial).seconds for trial in trials if trial.state.is_finished())
        gaps = gaps[gaps <= max(SHORTEST_INTERRUPTION, longest)]
    if not study.summary.evaluations or not gaps.sum() > 0:  # the trials may have been read after the study
        return None
    return float(study.budget_spent / study.summary.evaluations * len(gaps) / gaps.sum())


def rate_text(study: Standing, per_second: float | None) -> str | None:
    """``8,349 images an hour``; ``None`` until it is known, and for a budget of time."""
    if per_second is None or study.budget_unit == "seconds":
        return None
    hourly = 3600 * per_second
    text = f"{hourly:,.0f}"
    if hourly < 10:  # an evaluation may take hours
        text = f"{hourly:.2g}"
    return f"{text} {study.budget_unit} an hour"


def seconds_left(study: Standing, per_second: float | None) -> float | None:
    """The time that a running study still needs at this rate."""
    if study.state != "running" or not study.budget_total or not per_second:
        return None
    return max((study.budget_total - study.budget_spent) / per_second, 0.0)


def overview(reader: HistoryReader, standing: Standing) -> dict[str, Any]:
    """JSON-able: settings, state, the answer's coefficients, failures by reason, seconds per trial by part.

    ``best_trial`` has the lowest loss of the search, as in plain Optuna. ``chosen_trial`` is the best on other noise;
    ``None`` if that is a mean of several, which ``chosen_model`` names. ``ended`` says how the search ended.

    Raises:
        StudyStoreError: the study has no trial of the number that was chosen.
        KeyError: it was deleted.
    """
    failures = reader.failures(standing)
    space = standing.settings.get("space", {})
    options = standing.settings.get("optimizer", {}).get("options", {})
    yardstick = standing.yardstick
    measured = standing.found
    return {
        **study_row(standing),
        "budget": dict(standing.budget),
        "checkpoints": len(standing.steps),
        "optimizer_options": dict(options),
        "space": {key: value for key, value in space.items() if value is not None},
        "objective": standing.settings.get("objective") or {},
        "start": standing.settings.get("start"),
        "code_changes": list(standing.changes),
        "relative_to": None if yardstick is None else dict(yardstick.metrics),
        "keeps": None if yardstick is None or yardstick.kept is None else _described_bound(yardstick),
        "best_trial": standing.summary.best,
        "chosen_trial": standing.chosen,
        "chosen_model": None if measured is None else measured.model.name,
        "ended": standing.how,
        **_coefficients(standing, reader.answer(standing), space),
        "failed": standing.summary.failed,
        "failure_reasons": {failure.reason: failure.lost for failure in failures if failure.lost},
        "tracebacks": {failure.reason: failure.traceback for failure in failures if failure.traceback},
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
        layer_groups = {"rows": space["rows"], "layers": dict(study.layer_groups)}
    return {
        "best_coefficients": describe_coefficients(coefficients, study.steps),
        "coefficients": coefficients.tolist(),
        "layer_groups": layer_groups,
    }


_ACTIVITIES = {"merge": "merging", "sample": "sampling", "metric": "metrics"}
"""Part of a trial → what it is called where a search says where its time went."""


def seconds_per_trial(study: Standing) -> dict[str, float]:
    """Mean seconds of a trial with a loss, by part; without parts, there is the mean ``evaluation`` of all trials.

    One that failed has seconds as a whole, and none of its parts.
    """
    summary = study.summary
    with_loss = summary.evaluations - summary.failed
    if not with_loss:
        return {}
    mean_seconds = {}
    for part in ("merge", "sample", "features", "metric"):
        seconds = getattr(summary.cost, f"{part}_seconds")
        if seconds:
            mean_seconds[part] = seconds / with_loss
    return mean_seconds or {"evaluation": summary.cost.seconds / summary.evaluations}


def shares_of_time(study: Standing) -> str:
    """Where the time of evaluations with a loss went, the largest share first: ``sampling 61 %, features 30 %``.

    Shares below one percent are left out. It is ``evaluation 100 %`` where an objective tells no parts, and empty where
    no time is known.
    """
    seconds = seconds_per_trial(study)
    total = sum(seconds.values())
    if not total:
        return ""
    shares = sorted(((part_seconds / total, part) for part, part_seconds in seconds.items()), reverse=True)
    return ", ".join(f"{_ACTIVITIES.get(part, part)} {100 * share:.0f} %" for share, part in shares if share >= 0.01)
