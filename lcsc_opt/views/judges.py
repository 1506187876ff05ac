"""The judges of a study's answer as a table: each beside the baseline's value, and real images' own."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc_opt.database.judges import Judge

BETTER = {1: "lower", -1: "higher"}


def judge_table(judges: Sequence[Judge]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, of texts: the metric, which way is better, the answer, the baseline, the gain, the floor.

    There are columns for the baseline and for held-out real images where some judge has them.
    """
    against = next((judge.against for judge in judges if judge.against is not None), None)
    floors = any(judge.floor is not None for judge in judges)
    beside = () if against is None else (against, "gain")
    header = ("judge", "better", "answer", *beside, *(("real images",) * floors))
    return header, [_row(judge, compared=against is not None, floors=floors) for judge in judges]


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
