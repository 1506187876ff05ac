"""Views of a study's history for people: curves, rankings, figures, a report, the dashboard. Reads only; no torch."""

from __future__ import annotations


def number(value: float | None, deviation: float | None = None, form: str = ".4g") -> str:
    """A number with its standard deviation, for people."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if deviation is None else f" ± {deviation:.2g}")
