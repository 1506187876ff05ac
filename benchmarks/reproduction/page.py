"""``docs/paper.md``: each table of the paper against what was measured here, and a word for each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import markdown

from reproduction.claims import HOLDS, NOT, OPTIMIZERS, PAPERS, UNKNOWN, Points, Ratio, against_ema, judged, verdict
from reproduction.costs import against_training, speed_ups
from reproduction.published import NOT_HERE, TABLES
from reproduction.quality import NAMES
from reproduction.single_images import judged_lines
from reproduction.table import Claim, Table

INTRODUCTION = """# The paper, table by table

Liu et al. 2024, *Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better*, first
version, next to what two cores can do: models of 8×8 digits and of crops of photographs that are trained here, in
place of CIFAR-10 and ImageNet-64. `make paper` runs the study files of `studies/paper/` and writes this page; no
number in it is written by hand. A file whose first lines have a loop is an experiment for each of its values; run that
loop to repeat one table.

A number of ours is a ratio of FIDs on noise that no search saw, if it does not say otherwise: to EMA*, the best of all
EMA rates on the same images, or of one setting to another. It is the geometric mean over seeds of the search, with a
95 % interval (Student's, of the logarithms); the model is trained once, so the interval does not say how much another
training would differ. A claim *holds* where its interval is below one, *fails* where it is above, and is otherwise
*inconclusive*. For IS, precision and recall, where higher is better, the ratio is EMA*'s over ours.
The paper gives no intervals: a claim that rests on a difference of 1 % there may be chance there, too. Its CM is a
consistency distillation (CD) of CIFAR-10, and so is ours in the first table; in those after Table 3 ours is trained
without a teacher.
"""


def page(found: Mapping[str, Points], costs: Sequence[str], *, missing: str, machine: str, quick: bool) -> str:
    """The whole page.

    Args:
        found: study file → its results.
        costs: lines of the tables of costs.
        missing: a line with the number of unfinished studies; empty if all are finished.
        machine: the name of the machine.
        quick: whether these are the short searches of ``--quick``.
    """
    lines = [INTRODUCTION, machine, ""]
    if quick:
        lines += [
            "**A quick run: short trainings and searches, few seeds. It shows that all of it works, not what holds.**",
            "",
        ]
    if missing:
        lines += [f"**Not finished: {missing}. `make paper` continues.**", ""]
    lines += summary(found)
    for table in TABLES:
        if table.study in found and table.settings:
            lines += section(table, found[table.study])
    lines += judged_lines(found)
    lines += ["## Tables 5 and 6: what a search costs", "", *costs, "", *against_training(found)]
    lines += ["## What is not compared here", ""]
    lines += markdown([["of the paper", "why"], *map(list, NOT_HERE)])
    return "\n".join(lines) + "\n"


def summary(found: Mapping[str, Points]) -> list[str]:
    """How many claims hold for each optimizer, and which claims change with a cheaper search."""
    words = {
        optimizer: [verdict(points.ratio(claim, optimizer)) for _, claim, points in _claims(found)]
        for optimizer in OPTIMIZERS
    }
    counts = [[name, *(str(known.count(word)) for word in (HOLDS, NOT, UNKNOWN))] for name, known in words.items()]
    changed = [
        f"{claim.text} ({table.title.split(':')[0]}): {words[PAPERS][i]} with {PAPERS}, {words[other][i]} with {other}"
        for i, (table, claim, _) in enumerate(_claims(found))
        for other in OPTIMIZERS[1:]
        if {words[PAPERS][i], words[other][i]} == {HOLDS, NOT}
    ]
    lines = ["## In short", "", *markdown([["claims", HOLDS, NOT, UNKNOWN], *counts]), ""]
    title = "Claims whose verdict depends on the search:"
    return [*lines, *([title, "", *(f"* {line}" for line in changed), ""] if changed else [])]


def _claims(found: Mapping[str, Points]) -> list[tuple[Table, Claim, Points]]:
    return [(table, claim, found[table.study]) for table in TABLES if table.study in found for claim in table.claims]


def section(table: Table, points: Points) -> list[str]:
    """One table of the paper: its rows, then its claims."""
    cross_check = any(claim.cross_check for claim in table.claims)
    rows = [["setting", "paper's FID", "paper's, to EMA", *(f"{name}, to EMA*" for name in OPTIMIZERS)]]
    for setting in table.settings:
        paper = "–" if setting.ema is None or setting.fid is None else f"{setting.fid / setting.ema:.3g}"
        ours = [_shown(against_ema(points.at(setting.where, name), cross_check=cross_check)) for name in OPTIMIZERS]
        rows.append([setting.label, "–" if setting.fid is None else f"{setting.fid:g}", paper, *ours])
    claims = [["the paper says", "ratio there", "LCSC here", *(f"{name}: verdict" for name in OPTIMIZERS)]]
    for claim in table.claims:
        ratios = {name: points.ratio(claim, name) for name in OPTIMIZERS}
        words = [f"*{verdict(ratio)}*" for ratio in ratios.values()]
        claims.append([claim.text, f"{claim.paper:.3g}", _shown(ratios[PAPERS]), *words])
    lines = [f"## {table.title}", "", f"{table.note} `lcsc run paper/{table.study}`", ""]
    lines += [*markdown(rows), "", *markdown(claims), ""]
    return [*lines, *judges(table, points), *fewest(table, points), *speed_ups(table, points)]


def judges(table: Table, points: Points) -> list[str]:
    """IS, precision and recall of the rows that have them in the paper; empty if none has."""
    rows = [["setting", "higher is better", "paper's, to EMA", *(f"{name}, to EMA*" for name in OPTIMIZERS)]]
    for setting in table.settings:
        for metric, (lcsc, ema) in setting.judges.items():
            ours = [_shown(judged(points.at(setting.where, name), metric)) for name in OPTIMIZERS]
            rows.append([setting.label, NAMES[metric], f"{lcsc / ema:.3g}", *ours])
    return [*markdown(rows), ""] if len(rows) > 1 else []


def fewest(table: Table, points: Points) -> list[str]:
    """The lowest value of a varied key at which a search is as good as EMA* at its first value."""
    if table.fewest is None:
        return []
    key, lines = table.fewest, []
    for name in OPTIMIZERS:
        known = {place: points.over_ema({key: place}, {key: 0}, name) for place in points.places(key)}
        several = {place: ratio for place, ratio in known.items() if ratio is not None and ratio.low is not None}
        good = [place for place, ratio in several.items() if verdict(ratio) != NOT]
        if several:  # a single seed decides nothing
            lowest = f"{points.value({key: good[-1]}, key)} ({known[good[-1]]})" if good else "none"
            lines.append(f"* {name}: {lowest}")
    first_value = points.value({key: 0}, key)
    title = f"Lowest {key.upper()} that is not significantly worse than EMA* at {first_value}, and its ratio:"
    return [title, "", *lines, ""] if lines else []


def _shown(ratio: Ratio | None) -> str:
    return "–" if ratio is None else str(ratio)
