"""What an experiment's studies say together: its answer."""

from __future__ import annotations

import pytest

from lcsc_opt.database.history import Standing, answer_of
from lcsc_opt.database.report import HeldOutReport, Measurement
from tests.history_examples import measured

EMA = measured(2.0, name="EMA*")


def study(optimizer: str, chosen: str, selection: float, *baselines: Measurement) -> Standing:
    """A study whose report chose this model; what was there before is EMA*."""
    answer = measured(2.0, name=chosen)
    report = HeldOutReport(answer, baselines, selection={chosen: selection}, answer=answer, had=EMA)
    return Standing(1, f"small/{optimizer}/0", "small", optimizer, 0, held_out=report)


@pytest.mark.parametrize(
    ("searches", "expected"),
    [
        ([study("LCSC", "trial 3", 0.51, EMA)], "trial 3"),  # whose cross-check was better, too
        ([study("LCSC", "EMA*", 0.5, EMA), study("CMA", "trial 3", 0.51, EMA)], "trial 3"),
        ([study("LCSC", "trial 3", 0.51, EMA), study("CMA", "trial 4", 0.49, EMA)], "trial 4"),
        ([study("LCSC", "trial 3", 0.51)], "EMA*"),  # reported before the grid was
        ([study("LCSC", "trial 3", 0.49)], "trial 3"),
        ([study("LCSC", "EMA*", 0.5, EMA)], "EMA*"),
    ],
)
def test_what_a_search_found_comes_before_an_average_that_its_report_has_rejected(
    searches: list[Standing], expected: str
) -> None:
    answer = answer_of([study("EMAGrid", "EMA*", 0.5), *searches])
    assert answer is not None
    assert answer[2].model.name == expected


def test_of_equal_answers_a_grids_own_counts() -> None:
    answer = answer_of([study("LCSC", "EMA*", 0.5, EMA), study("EMAGrid", "EMA*", 0.5)])
    assert answer is not None
    assert answer[0].optimizer == "EMAGrid"


def test_without_a_report_there_is_no_answer() -> None:
    assert answer_of([Standing(1, "small/LCSC/0", "small", "LCSC", 0)]) is None
