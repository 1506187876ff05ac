"""Tables of judges: those of a study's answer, each beside the baseline's value, and those of all optimizers."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc_opt.database.comparing import floors_of
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.judges import Judge
from lcsc_opt.database.summary import OptimizerSummary, over_seeds

BETTER = {1: "lower", -1: "higher"}


def judge_table(judges: Sequence[Judge]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, as text: the metric, which way is better, the answer, the baseline, the gain, the floor.

    The columns for the baseline and for held-out real images (the floor) exist if some judge has them.
    """
    against = next((judge.against for judge in judges if judge.against is not None), None)
    floors = any(judge.floor is not None for judge in judges)
    beside = () if against is None else (against, "gain")
    header = ("judge", "better", "answer", *beside, *(("real images",) * floors))
    return header, [_row(judge, compared=against is not None, floors=floors) for judge in judges]


def comparison_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """Header and rows, as text: each optimizer's held-out loss and judges, means over seeds; ``None`` without judges.

    The last row is real images that the loss does not see, if some are held out.
    """
    summaries, floors = over_seeds(studies), floors_of(studies)
    names = judges_of(summaries)
    if not names:
        return None
    rows = [
        [row.label, *(_spread(*(value or (None, None))) for value in (row.held_out, *map(row.judges.get, names)))]
        for row in summaries
    ]
    if floors:
        rows.append(["real images", _spread(None, None), *(_spread(floors.get(name), None) for name in names)])
    return ("optimizer", f"held-out {studies[0].metric}", *names), rows


def judges_of(summaries: Sequence[OptimizerSummary]) -> list[str]:
    """All judges of these optimizers, precision and recall first."""
    longest = sorted(summaries, key=lambda row: len(row.judges), reverse=True)
    return list(dict.fromkeys(name for row in longest for name in row.judges))


def _row(judge: Judge, *, compared: bool, floors: bool) -> list[str]:
    row = [judge.metric, BETTER[judge.sign], _spread(judge.value, judge.spread)]
    if compared:
        mark = " (worse)" if judge.lost else ""
        row += [_spread(judge.baseline, judge.baseline_spread), _spread(judge.gain, judge.gain_spread, "+.3g") + mark]
    return [*row, *([_spread(judge.floor, None)] if floors else [])]


def _spread(value: float | None, deviation: float | None, form: str = ".4g") -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if deviation is None else f" ± {deviation:.2g}")
