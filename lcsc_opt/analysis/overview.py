"""Everything about one study, as plain data."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.analysis.comparison import describe_coefficients, summarize
from lcsc_opt.study_store import StoredStudy

PARTS = ("merge_seconds", "sample_seconds", "features_seconds", "metric_seconds")


def overview(study: StoredStudy) -> dict[str, Any]:
    """JSON-able: settings, state, best trial and its coefficients, failures by reason, seconds a trial by part."""
    summary, attributes, trials = summarize(study), study.attributes, study.trials()
    best = summary.best_coefficients
    specification = attributes.get("specification", {})
    return {
        **summary.as_row(),
        "budget": summary.budget,
        "checkpoints": len(summary.steps),
        "optimizer_options": specification.get("optimizer", {}).get("options", {}),
        "space": {key: value for key, value in specification.get("space", {}).items() if value is not None},
        "objective": specification.get("objective", {}),
        "best_trial": summary.best_trial,
        "best_coefficients": None if best is None else describe_coefficients(best, summary.steps),
        "coefficients": None if best is None else best.tolist(),
        "held_out_report": attributes.get("held_out"),
        "failed": summary.failures,
        "failure_reasons": failure_reasons(trials),
        "seconds_per_trial": seconds_per_trial(trials),
    }


def failure_reasons(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Reason → how many trials failed with it, the most frequent first."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    return dict(Counter(str(trial.user_attrs.get("reason", "unknown")) for trial in failed).most_common())


def seconds_per_trial(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Mean seconds of each part of a trial; ``other`` is what lies between one trial's start and the next one's.

    ``other`` holds the optimizer, the database and the progress bar. It is only known while trials follow each
    other directly: the median over pairs is taken, which an interruption does not move.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return {}
    costs = [trial.user_attrs.get("cost", {}) for trial in complete]
    means = {part: sum(float(cost.get(part, 0)) for cost in costs) / len(costs) for part in PARTS}
    gaps = sorted(_gap(one, following) for one, following in itertools.pairwise(complete))
    named = {part.removesuffix("_seconds"): seconds for part, seconds in means.items() if seconds}
    return {**named, **({"other": max(gaps[len(gaps) // 2], 0.0)} if gaps else {})}


def _gap(one: FrozenTrial, following: FrozenTrial) -> float:
    if one.datetime_start is None or following.datetime_start is None:
        return 0.0
    whole = (following.datetime_start - one.datetime_start).total_seconds()
    return whole - float(one.user_attrs.get("cost", {}).get("seconds", 0))
