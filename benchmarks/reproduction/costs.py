"""The cost of searches, by stage and against training (Tables 5 to 8)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from common import markdown

from reproduction.claims import OPTIMIZERS, PAPERS, Points
from reproduction.published import TABLES
from reproduction.quality import CD_END, CT_END, HOURS, STAGES
from reproduction.table import Table

MEASURED = (  # label, study file, and point of the file
    ("CM of digits", "features", {"checkpoints": 0}),
    ("DM of digits", "features", {"checkpoints": 1}),
    ("CM of photographs", "features", {"checkpoints": 2}),
    ("CD of digits, NFE 1", "cd", CD_END),
    ("CT of digits, NFE 1", "ct", CT_END),
    ("DM of digits, NFE 10", "dm", {"nfe": 0}),
)


def cost_lines(stages: Mapping[str, Sequence[Mapping[str, float]]], totals: Sequence[Sequence[str]]) -> list[str]:
    """Seconds of the stages of an evaluation, medians over trials, and the cost of whole searches.

    Args:
        stages: objective → the costs of its trials, as stored.
        totals: rows of optimizer, evaluations, images and seconds.
    """
    names = ("merge", "sample", "features", "metric")
    rows = [["objective", "images", *names], *map(list, STAGES)]
    for objective, costs in stages.items():
        medians = [f"{statistics.median(cost[f'{name}_seconds'] for cost in costs):.3g}" for name in names]
        rows.append([objective, f"{statistics.median(cost['images'] for cost in costs):,.0f}", *medians])
    return [
        *["Seconds an evaluation, by stage (Table 5), medians over the trials of LCSC on one core:", ""],
        *[*markdown(rows), "", "A whole search, medians over seeds:", ""],
        *markdown([["objective", "optimizer", "evaluations", "images", "seconds evaluating"], *totals]),
    ]


def against_training(found: Mapping[str, Points]) -> list[str]:
    """Table 6: the time of a search, and that of the standard training."""
    rows = [
        ["model", "paper's search, h", "its training, h", "our training, s", *(f"{name}, s" for name in OPTIMIZERS)]
    ]
    for table in TABLES:
        if table.standard is None or table.study not in found:
            continue
        points = found[table.study]
        training = points.training(table.standard)
        if training is None:
            continue
        own = [_search(points, table, name, training) for name in OPTIMIZERS]
        search, whole = HOURS[table.study]
        rows.append([table.study.upper(), f"{search:g} ({search / whole:.1%})", f"{whole:g}", f"{training:,.0f}", *own])
    title = (
        "Search against the standard training (Table 6), one core each, medians over seeds; in brackets "
        "the search's share of the training:"
    )
    return [title, "", *markdown(rows), ""] if len(rows) > 1 else []


def _search(points: Points, table: Table, optimizer: str, training: float) -> str:
    seconds = [study.seconds for study in points.at(table.standard or {}, optimizer).values()]
    if not seconds:
        return "–"
    middle = statistics.median(seconds)
    return f"{middle:,.0f} ({middle / training:.0%})"


def speed_ups(table: Table, points: Points) -> list[str]:
    """Tables 7 and 8: training alone ÷ a cheaper training and its search; empty if the paper gives no speed-up."""
    told = [setting for setting in table.settings if setting.speed_up is not None]
    if table.standard is None or not told:
        return []
    rows = [["setting", f"paper's {PAPERS}", *OPTIMIZERS]]
    for setting in told:
        ours = [points.speed_up(setting.where, table.standard, name) for name in OPTIMIZERS]
        rows.append([setting.label, f"{setting.speed_up:g}", *("–" if one is None else f"{one:.3g}" for one in ours)])
    title = (
        "Speed-up: seconds of the standard training ÷ seconds of the cheaper one and its search, the median over "
        "seeds. It is one only where the claim above holds, that the result is better than EMA* after the standard "
        "training."
    )
    return [title, "", *markdown(rows), ""]
