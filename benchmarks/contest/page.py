"""Tables in Markdown for ``docs/benchmarks.md``, and the same as CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contest.entries import Cell
from contest.numbers import Crossing, Curves, Interval, Result
from lcsc_opt.database.names import label

POINT_HEADER = (
    *("objective", "checkpoints", "optimizer", "seed", "limit", "images", "model_calls", "seconds"),
    *("searched_fid", "held_out_fid", "cross_check_fid"),
)
INTERVALS = ("held_out", "chosen", "cross_check", "at_tenth", "gain", "transfer")
CROSSINGS = ("to_ema", "to_paper")
SUMMARY_HEADER = (
    *("objective", "checkpoints", "budget", "optimizer", "seeds", "images", "model_calls", "seconds", "searched"),
    *(f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high")),
    *(f"{name}{end}" for name in CROSSINGS for end in ("", "_low", "_high", "_median_seed", "_seeds_reached")),
    *("difference", "difference_low", "difference_high", "verdict"),
)
TABLE_HEADER = (
    "| optimizer | images | model calls | FID | cross-check FID | images to LCSC's end | seconds | against the best |"
)


def point_rows(cell: Cell, contenders: Sequence[Curves]) -> list[tuple[Any, ...]]:
    """A row for each contender, seed and limit with an answer, up to the end of the search."""
    rows = []
    for curves in contenders:
        for row, seed in enumerate(curves.seeds):
            for column, limit in enumerate(curves.limits):
                if math.isnan(curves.held_out[row, column]) or limit > curves.end:
                    continue
                head = (cell.objective, cell.checkpoints, curves.label, seed, int(limit))
                spent = (int(curves.images[row, column]), int(curves.model_calls[row, column]))
                losses = (curves.searched, curves.held_out, curves.cross_check)
                numbers = (_rounded(float(values[row, column])) for values in losses)
                rows.append((*head, *spent, round(float(curves.seconds[row, column]), 2), *numbers))
    return rows


def summary_row(cell: Cell, result: Result) -> tuple[Any, ...]:
    """One line of the summary. An empty field is unknown; ``inf`` was not reached within the budget."""
    head = (cell.objective, cell.checkpoints, cell.images, result.label, result.seeds)
    spent = (round(result.images), round(result.model_calls), round(result.seconds, 1), _rounded(result.searched))
    intervals = [number for name in INTERVALS for number in _ends(getattr(result, name))]
    crossings = [number for name in CROSSINGS for number in _crossing_numbers(getattr(result, name))]
    compared = result.difference
    ends = ("", "", "") if compared is None else (compared.mean, compared.low, compared.high)
    return (*head, *spent, *intervals, *crossings, *(_rounded(end) for end in ends), result.verdict)


def _ends(interval: Interval | None) -> tuple[Any, ...]:
    return ("", "", "") if interval is None else tuple(map(_rounded, (interval.value, interval.low, interval.high)))


def _crossing_numbers(found: Crossing | None) -> tuple[Any, ...]:
    if found is None:
        return ("",) * 5
    median = math.inf if found.seeds.median is None else found.seeds.median
    return (*_ends(found.mean), median, found.seeds.reached)


def _rounded(value: Any) -> Any:
    """A number to five significant digits; empty if it is unknown."""
    if not isinstance(value, (int, float)) or math.isnan(value):
        return ""
    return float(f"{value:.5g}")


def cell_table(cell: Cell, results: Sequence[Result]) -> list[str]:
    """The ranking of one cell."""
    lines = [f"### {cell.title}", "", f"Budget {cell.images:,} images; FID of {cell.held_out:,} held-out images.", ""]
    return [*lines, TABLE_HEADER, "|---" * (TABLE_HEADER.count("|") - 1) + "|", *map(_table_row, results), ""]


def order_table(found: Mapping[Cell, Sequence[Result]]) -> list[str]:
    """Each contender's place and held-out FID in every cell."""
    places = {
        (cell, result.label): f"{place}. {result.held_out.value:.3g}"
        for cell, ranked in found.items()
        for place, result in enumerate(ranked, start=1)
    }
    labels = dict.fromkeys(result.label for ranked in found.values() for result in ranked)
    header = ["optimizer", *(cell.title for cell in found)]
    rows = [[label(name), *(places.get((cell, name), "") for cell in found)] for name in labels]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _table_row(result: Result) -> str:
    cells = (
        label(result.label),
        f"{result.images:,.0f}",
        f"{result.model_calls:,.0f}",
        shown(result.held_out),
        shown(result.cross_check),
        shown_crossing(result.to_paper),
        f"{result.seconds:,.0f}",
        result.verdict if result.difference is None else f"{result.difference.mean:+.3g}, {result.verdict}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def shown(interval: Interval | None) -> str:
    """A number with its interval."""
    if interval is None:
        return ""
    ends = "" if interval.low is None or interval.high is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
    return f"{interval.value:.3g}{ends}"


def shown_crossing(found: Crossing | None) -> str:
    """Images with their interval, and how many seeds did not reach the value by themselves."""
    if found is None:
        return ""
    mean, missed = found.mean, found.seeds.seeds - found.seeds.reached
    ends = "" if mean.low is None or mean.high is None else f" [{_images(mean.low)}, {_images(mean.high)}]"
    some = 0 < missed < found.seeds.seeds
    return f"{_images(mean.value)}{ends}" + (f", {missed} of {found.seeds.seeds} seeds not" if some else "")


def _images(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:,.0f}"


def insert(page: Path, blocks: Mapping[str, Sequence[str]]) -> None:
    """Put lines between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; everything else stays as it is.

    Raises:
        ValueError: the page lacks one of these markers.
    """
    text = page.read_text()
    for name, lines in blocks.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page}: expected the lines {begin.strip()} and {end}")
        text = "".join([head, begin, "\n".join(lines).strip(), "\n", end, tail])
    page.write_text(text)
