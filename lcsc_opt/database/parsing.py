"""Rows of the database into histories: columns and texts in, arrays out. A text that is no JSON says nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import TrialState

from lcsc_opt.database.compared import is_other_noise
from lcsc_opt.database.history import COSTS, TRIAL, Floats, HeldOut, StudyHistory, Trials

Rows = list[tuple[Any, ...]]
"""Of trials: study, trial, number, state, start, end, value, and the texts of ``noise``, ``cost`` and ``attempts``."""


def with_attributes(study: StudyHistory, attributes: Mapping[str, Any]) -> StudyHistory:
    """The study with what its user attributes say now; those that never change may be missing once they are known."""
    changes: dict[str, Any] = {}
    if "steps" in attributes:
        changes["steps"] = tuple(attributes["steps"])
    if "forked_from" in attributes:
        changes["forked_from"] = attributes["forked_from"]
    if specification := attributes.get("specification"):
        changes["workers"] = int(specification.get("workers", 1))
        changes["ordered"] = specification.get("tells", "ordered") == "ordered"
    return dataclasses.replace(
        study,
        budget={unit: n for unit, n in (attributes.get("budget") or {}).items() if n is not None},
        ended=bool(attributes.get("search_ended")),
        held_out=HeldOut.parse(attributes.get("held_out")),
        **changes,
    )


def with_trials(study: StudyHistory, rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> StudyHistory:
    """The study with trials that are new, or that were read again.

    Args:
        study: as it was known.
        rows: of trials.
        extras: trial → attributes that only some have, by name.
    """
    if not rows:
        return study
    trials = _merge(study.trials, _trials(rows, extras))
    return dataclasses.replace(study, trials=trials, reasons={**study.reasons, **_reasons(rows, extras)})


def _merge(before: Trials, fresh: Trials) -> Trials:
    """What was known and what is new, by number; rows that were read again take the place of the old ones."""
    old = before[~np.isin(before["trial_id"], fresh["trial_id"])]
    merged = np.concatenate([old, fresh])
    merged = merged[np.argsort(merged["number"], kind="stable")]
    merged.setflags(write=False)
    return merged


def _trials(rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> Trials:
    found = np.zeros(len(rows), dtype=TRIAL)
    _, ids, numbers, states, started, ended, values, noises, costs, _ = zip(*rows, strict=True)
    found["trial_id"], found["number"] = ids, numbers
    found["tell_index"] = [
        extras.get(key, {}).get("tell_index", number) for key, number in zip(ids, numbers, strict=True)
    ]
    found["inherited"] = ["inherited" in extras.get(key, {}) for key in ids]
    found["other_noise"] = [is_other_noise(parse(text, None)) if text else False for text in noises]
    found["state"] = [state.value for state in states]
    found["started"], found["ended"] = seconds(started), seconds(ended)
    loss = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    found["asked"] = [extras.get(key, {}).get("images") or 0 for key in ids]
    found["loss"] = np.where(found["state"] == TrialState.COMPLETE.value, loss, np.nan)
    parsed = _parse_all(costs)
    for name in COSTS:
        found[name] = [cost.get(name, 0.0) for cost in parsed]
    return found


def seconds(moments: Sequence[Any]) -> Floats:
    """Datetimes of Optuna's tables, which are UTC without saying so → seconds since 1970."""
    stamps = np.array(
        [np.datetime64("NaT") if moment is None else moment for moment in moments], dtype="datetime64[us]"
    )
    return np.where(np.isnat(stamps), np.nan, stamps.astype(np.int64) / 1e6)


def _parse_all(texts: Sequence[str | None]) -> list[dict[str, Any]]:
    """JSON mappings, parsed at once; one by one where one of them cannot be read, which then is empty."""
    try:
        parsed = json.loads(f"[{','.join(text or '{}' for text in texts)}]")
    except ValueError:
        parsed = [parse(text, {}) for text in texts]
    return [value if isinstance(value, dict) else {} for value in parsed]


def parse(text: str | None, default: Any) -> Any:
    """JSON; ``default`` where it cannot be read."""
    try:
        return json.loads(text or "null")
    except ValueError:
        return default


def _reasons(rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple[str, ...]]:
    """Number → the reasons of its attempts, or the one that it was closed with."""
    found = {}
    for row in rows:
        attempts = parse(row[-1], None) or [] if row[-1] else []
        if row[3] == TrialState.FAIL and not attempts:
            attempts = [extras.get(row[1], {})]
        if attempts:
            found[row[2]] = tuple(str(attempt.get("reason", "unknown")) for attempt in attempts)
    return found
