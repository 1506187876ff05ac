"""``docs/paper.md``: each table of the paper beside what was measured here, and a word for each claim."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from reproduction.claims import HOLDS, NOT, UNKNOWN, Points, Ratio, against_ema, verdict
from reproduction.published import NOT_HERE, TABLES, Claim, Table

PAPERS = "LCSC"
OPTIMIZERS = (PAPERS, "LCSCQuadratic", "LCSCGradient")

INTRODUCTION = """# The paper, table by table

Liu et al. 2024, *Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better*, first
version, beside what two cores can do: models of 8×8 digits and of crops of photographs that are trained here, in
place of CIFAR-10 and ImageNet-64. `make paper` runs the study files of `studies/paper/` and writes this page; no
number in it is written by hand.

Every number of ours is a ratio of FIDs on noise that no search saw: to EMA*, the best of all EMA rates on the same
images, or of one setting to another. It is the geometric mean over seeds of the search, with a 95 % interval
(Student's, of the logarithms); the model is trained once, so the interval does not say how much another training
would differ. A claim *holds* where its interval is below one, *holds not* where it is above, and else *cannot be told
here*. The paper gives no intervals: a claim that rests on a difference of 1 % there may be chance there, too. Its CM
here is a consistency distillation (CD) of CIFAR-10, ours is trained without a teacher.
"""


def page(found: Mapping[str, Points], costs: Sequence[str], *, missing: str, machine: str, quick: bool) -> str:
    """The whole page.

    Args:
        found: study file → what was found.
        costs: lines of the tables of costs.
        missing: what is not finished yet, in a line; empty where all is.
        machine: which one.
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
        if table.study in found:
            lines += section(table, found[table.study])
    lines += ["## Table 5: what a search costs", "", *costs, "", "## What is not compared here", ""]
    lines += markdown([["of the paper", "why"], *map(list, NOT_HERE)])
    return "\n".join(lines) + "\n"


def summary(found: Mapping[str, Points]) -> list[str]:
    """How many claims hold, for each optimizer, and which ones change with a cheaper search."""
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
    title = "Where another search turns the answer round:"
    return [*lines, *([title, "", *(f"* {line}" for line in changed), ""] if changed else [])]


def _claims(found: Mapping[str, Points]) -> list[tuple[Table, Claim, Points]]:
    return [(table, claim, found[table.study]) for table in TABLES if table.study in found for claim in table.claims]


def section(table: Table, points: Points) -> list[str]:
    """One table of the paper: its rows, then its claims."""
    cross_check = any(claim.cross_check for claim in table.claims)
    rows = [["setting", "paper's FID", "paper's, to EMA", *(f"{name}, to EMA*" for name in OPTIMIZERS)]]
    for setting in table.settings:
        paper = "–" if setting.ema is None else f"{setting.fid / setting.ema:.3g}"
        ours = [shown(against_ema(points.at(setting.where, name), cross_check=cross_check)) for name in OPTIMIZERS]
        rows.append([setting.label, f"{setting.fid:g}", paper, *ours])
    claims = [["the paper says", "ratio there", "LCSC here", *(f"{name}: word" for name in OPTIMIZERS)]]
    for claim in table.claims:
        ratios = {name: points.ratio(claim, name) for name in OPTIMIZERS}
        words = [f"*{verdict(ratio)}*" for ratio in ratios.values()]
        claims.append([claim.text, f"{claim.paper:.3g}", shown(ratios[PAPERS]), *words])
    lines = [f"## {table.title}", "", f"{table.note} `lcsc run paper/{table.study}`", ""]
    return [*lines, *markdown(rows), "", *markdown(claims), ""]


def shown(ratio: Ratio | None) -> str:
    """A ratio in a table."""
    return "–" if ratio is None else str(ratio)


def cost_lines(stages: Mapping[str, Sequence[Mapping[str, float]]], totals: Sequence[Sequence[str]]) -> list[str]:
    """Seconds of the stages of an evaluation, medians over trials; and what whole searches took.

    Args:
        stages: objective → the costs of its trials, as stored.
        totals: rows of optimizer, evaluations, images and seconds.
    """
    names = ("merge", "sample", "features", "metric")
    rows = [["objective", "images", *names]]
    for objective, costs in stages.items():
        medians = [f"{statistics.median(cost[f'{name}_seconds'] for cost in costs):.3g}" for name in names]
        rows.append([objective, f"{statistics.median(cost['images'] for cost in costs):,.0f}", *medians])
    return [
        *["Seconds an evaluation, by stage (Table 5), medians over the trials of LCSC on one core:", ""],
        *[*markdown(rows), "", "A whole search, means over seeds:", ""],
        *markdown([["objective", "optimizer", "evaluations", "images", "seconds evaluating"], *totals]),
    ]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first row is its header."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
