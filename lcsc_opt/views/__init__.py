"""Views of a study's history for people: curves, rankings, figures, a report, the dashboard. Reads only; no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

UNKNOWN = "–"  # in place of a number
_ABBREVIATIONS = ("fid", "kid")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for people. The terminal, the report and the pages of the dashboard each draw it in their way.

    Attributes:
        header: the headings.
        rows: a cell for each heading, mostly texts.
        title: what it is of.
        text: how many columns, from the left, are text; the others are numbers.
        optional: the headings of columns that a narrow terminal goes without, the last of these first.
        marked: the index of the row that is marked.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    text: int = 1
    optional: Sequence[str] = ()
    marked: int | None = None


def in_words(names: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def number(value: float | None, deviation: float | None = None, form: str = ".4g") -> str:
    """A number with its standard deviation, if there is one, for people; ``–`` if the number is not known."""
    if value is None:
        return UNKNOWN
    text = signed(value, form)
    if deviation is None:
        return text
    return f"{text} ± {deviation:.2g}"


def percent(share: float | None) -> str:
    """A share with its sign, in percent: ``-0.6`` → ``-60.0 %``; rounded first, since a rounded zero has no minus."""
    if share is None:
        return UNKNOWN
    return f"{signed(round(100 * share, 1), '+.1f')} %"


def signed(value: float, form: str) -> str:
    """A number in a format, without the sign of a negative zero."""
    return f"{value or 0.0:{form}}"


def unbroken(text: str) -> str:
    """A cell of a table in which lines break only between words, and between a number and its interval.

    Its other spaces, as in ``2.015 ± 0.04``, ``precision ↑`` and ``[1.93, 2.1]``, become no-break spaces.
    """
    text = re.sub(r" ± | (?=[↓↑]$)", lambda found: found[0].replace(" ", "\u00a0"), text)
    return re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\u00a0"), text)


def count(amount: int, total: int | None) -> str:
    """An amount of a total, if that is known: ``30 of 1,000``."""
    if total is None:
        return f"{amount:,}"
    return f"{amount:,} of {total:,}"


def duration(seconds: float) -> str:
    """For people: ``45 s``, ``12 min``, ``3 h 20 min`` or ``2 days 5 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def short_metric(name: str) -> str:
    """A metric's name for axes and headers: ``fid@module:wide_extractor`` → ``fid@wide``; other texts as they are."""
    metric, at, extractor = name.partition("@")
    return f"{metric}{at}{extractor.rpartition(':')[2].removesuffix('_extractor')}"


def loss_title(metric: str) -> str:
    """What a loss is called that is this metric: ``fid@module:wide_extractor`` → ``FID@wide``."""
    formula, at, extractor = short_metric(metric).partition("@")
    if formula in _ABBREVIATIONS:
        formula = formula.upper()
    return f"{formula}{at}{extractor}"
