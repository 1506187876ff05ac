"""The trade-off figure: one held-out metric of the answers against another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.figures.trade_off import metrics_of, trade_off_figure
from lcsc_opt.views.ranking import points_of
from tests.history_examples import measured, report_of
from tests.study_examples import write_report, write_study


def siblings(reader: HistoryReader, name: str) -> list[Standing]:
    return [study for point in points_of(reader, name, siblings=True).values() for study in point]


@pytest.fixture
def reader(url: str) -> HistoryReader:
    storage = open_storage(url, write=True)
    answers: list[tuple[str, float, dict[str, Any]]] = [
        ("near=0/LCSC", 3.8, {"precision@clip": 0.5}),
        ("near=6/LCSC", 5.6, {"precision@clip": 0.6}),
        ("near=0/EMAGrid", 28.0, {"precision@clip": 0.62}),
        ("near=6/CMA", 4.0, {}),
    ]
    for name, fid, more in answers:
        write_study(storage, f"digits,{name}/0", [fid], held_out=measured(fid, **{"fid@clip": fid, **more}))
    write_study(storage, "other/LCSC/0", [1.0])
    return HistoryReader(storage)


@pytest.mark.parametrize("name", ["digits", "digits,near=6"])
def test_answers_of_all_points_of_a_sweep_are_joined_by_optimizer(reader: HistoryReader, name: str) -> None:
    made = trade_off_figure(siblings(reader, name))
    assert made is not None
    shown = {trace.name: (list(trace.x), list(trace.y), list(trace.text or ())) for trace in made.data}
    assert {name: shown[name] for name in ("LCSC/0", "EMA*/0")} == {
        "LCSC/0": ([0.5, 0.6], [3.8, 5.6], ["0", "6"]),
        "EMA*/0": ([0.62], [28.0], ["0"]),
    }
    assert made.data[0].customdata[1] == "digits,near=6/LCSC/0, trial 0"
    assert made.layout.xaxis.title.text == "held-out precision@clip"


def test_bars_are_the_intervals_and_the_trainers_models_and_the_answer_have_marks(url: str) -> None:
    storage = open_storage(url, write=True)
    error: dict[str, Any] = {f"loss{STANDARD_ERROR}": 0.5}
    found = {f"digits/LCSC/{seed}": measured(4.0, fid=4.0, precision=0.6, **error) for seed in range(2)}
    last = measured(9.0, name="last checkpoint", fid=9.0, precision=0.5)
    for study in found:
        write_study(storage, study, [4.0])
    write_report(storage, report_of(found, last, measured(8.0, name="trainer's EMA")))
    made = trade_off_figure(siblings(HistoryReader(storage), "digits"))
    assert made is not None
    first, _, trained, answer = made.data
    np.testing.assert_allclose([first.error_y.array, first.error_y.arrayminus], [[0.98], [0.98]], rtol=1e-3)
    assert not first.error_x.visible
    assert (trained.name, list(trained.x), list(trained.y)) == ("last checkpoint", [0.5], [9.0])
    assert (answer.name, list(answer.x), list(answer.y)) == ("answer", [0.6], [4.0])


def test_any_two_metrics_can_be_chosen_and_fewer_make_no_figure(reader: HistoryReader) -> None:
    studies = siblings(reader, "digits")
    assert metrics_of(studies) == ["precision@clip", "fid@clip", "loss"]
    made = trade_off_figure(studies, "loss", "precision@clip")
    assert made is not None
    assert list(made.data[0].x) == [3.8, 5.6]
    with pytest.raises(LcscError, match="recall: no answer has this held-out metric; available: precision@clip"):
        trade_off_figure(studies, "recall")
    assert trade_off_figure(siblings(reader, "other")) is None
    assert trade_off_figure(()) is None
