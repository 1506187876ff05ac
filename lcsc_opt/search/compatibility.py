"""Comparison of fingerprints: the user's code, the versions, the checkpoints, the objective's settings.

A change in any of them could change numbers silently. Studies of one experiment must not differ either, since their
losses are compared. :mod:`lcsc_opt.search.resolving` decides what follows from a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lcsc_opt.search.plan import CHECKPOINTS

# Settings that change no loss beyond rounding. Checkpoints are compared by their hash.
_NEUTRAL = frozenset(
    (
        CHECKPOINTS,
        "metrics",
        "held_out_metrics",
        "batch_size",
        "gradient_batch_size",
        "device",
        "compile",
        "channels_last",
    )
)
_ENVIRONMENT = ("packages", "blas", "machine")  # Python's version and the number of cores change no results
_MOST_CHARACTERS = 60  # of a value in a message


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every difference between two fingerprints, in words; what ``now`` lacks is not compared."""
    lines: list[str] = []
    if "environment" in now:
        for key in _ENVIRONMENT:
            stored = before["environment"].get(key)
            current = now["environment"].get(key)
            lines += differences(stored, current, f"environment.{key}")
    if "code" in now:
        lines += _code_changes(before["code"], now["code"])
    if "objective" in now:
        current = json.loads(json.dumps(now["objective"]))  # tuples become lists, as in the database
        lines += differences(before["objective"], current, "objective")
    return "; ".join(lines)


def _code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Which files changed, which are new, and which are gone; both map names to digests."""
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    kinds = {"changed": changed, "new": now.keys() - before.keys(), "gone": before.keys() - now.keys()}
    for kind, names in kinds.items():
        if names:
            yield f"{', '.join(sorted(names))} {kind}"


def objective_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Differences between the objectives in two fingerprints that make losses incomparable, in words.

    What only one of them describes is left out, such as an extractor that only one of them reports.
    """
    stored = without_neutral(before["objective"])
    current = without_neutral(now["objective"])
    return changes(
        {"objective": _common(stored, current)},
        {"objective": _common(current, stored)},
    )


def without_neutral(value: Any) -> Any:
    """A JSON value without the settings that change no loss."""
    if not isinstance(value, Mapping):
        return value
    return {key: without_neutral(item) for key, item in value.items() if key not in _NEUTRAL}


def _common(value: Any, reference: Any) -> Any:
    """``value`` without keys that ``reference`` does not have."""
    if not (isinstance(value, Mapping) and isinstance(reference, Mapping)):
        return value
    return {key: _common(item, reference[key]) for key, item in value.items() if key in reference}


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Every place where two JSON values differ, with its path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            key_path = f"{path}.{key}" if path else key
            yield from differences(before.get(key), now.get(key), key_path)
    elif before != now:
        yield f"{path} was {_shortened(before)}, is now {_shortened(now)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 3]}..."
