"""Everything about one study, as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lcsc_opt.database.history import PARTS, StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.summary import describe_coefficients
from lcsc_opt.views.progress import OTHER, seconds_outside


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
    return {
        **found.as_row(),
        "budget": dict(found.budget),
        "checkpoints": len(found.steps),
        "optimizer_options": specification.get("optimizer", {}).get("options", {}),
        "space": {key: value for key, value in specification.get("space", {}).items() if value is not None},
        "objective": specification.get("objective", {}),
        "code_changes": attributes.get("code_changes", []),
        "compared_trials": int(np.count_nonzero(~np.isnan(found.compared["loss"]))),
        "best_trial": found.best,
        "chosen_trial": found.chosen,
        "best_coefficients": None if best is None else describe_coefficients(best, found.steps),
        "coefficients": None if best is None else best.tolist(),
        "held_out_report": attributes.get("held_out"),
        "warning": found.warning,
        "failed": len(found.failed),
        "failure_reasons": failure_reasons(found),
        "tracebacks": dict(found.tracebacks),
        "seconds_per_trial": seconds_per_trial(found),
    }


def failure_reasons(study: StudyHistory) -> dict[str, int]:
    """Reason of the last attempt → how many trials failed with it, the most frequent first."""
    return dict(Counter(study.reasons[number][-1] for number in study.failed["number"].tolist()).most_common())


def seconds_per_trial(study: StudyHistory) -> dict[str, float]:
    """Mean seconds of each part of a complete trial; ``other`` is the median of the time outside evaluations.

    ``other`` is the time of the optimizer, the database and the progress bar. An interruption does not move a median.
    """
    complete = study.trials[~np.isnan(study.trials["loss"])]
    if not len(complete):
        return {}
    means = {part.removesuffix("_seconds"): float(complete[part].mean()) for part in PARTS}
    named = {part: seconds for part, seconds in means.items() if seconds}
    outside = seconds_outside(study, complete)[:-1]  # the last trial has no trial after it
    return {**named, **({OTHER: float(np.median(outside))} if len(outside) else {})}
