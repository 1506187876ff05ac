"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from reproduction.claims import Ratio


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first row is its header."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def shown(ratio: Ratio | None) -> str:
    """A ratio in a table."""
    return "–" if ratio is None else str(ratio)
