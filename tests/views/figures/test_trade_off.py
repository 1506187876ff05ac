"""The trade-off figure: one held-out metric of the models of a report against another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.figures.trade_off import metrics_of, trade_off_figure
from tests.history_examples import measured, report_of
from tests.study_examples import write_report, write_study


@pytest.fixture
def reader(url: str) -> HistoryReader:
    storage = open_storage(url, write=True)
    metrics: dict[str, dict[str, Any]] = {
        "LCSC": {"fid@clip": 3.8, "precision@clip": 0.5},
        "EMAGrid": {"fid@clip": 28.0, "precision@clip": 0.62},
        "CMA": {"fid@clip": 4.0},
        "last": {"fid@clip": 29.0, "precision@clip": 0.4},
    }
    last = measured(29.0, name="last checkpoint", **metrics.pop("last"))
    found = {f"digits/{name}/0": measured(values["fid@clip"], **values) for name, values in metrics.items()}
    for name in (*found, "other/LCSC/0"):
        write_study(storage, name, [1.0])
    write_report(storage, report_of(found, last))
    return HistoryReader(storage)


def test_what_was_found_the_trainers_models_and_the_answer_have_marks(reader: HistoryReader) -> None:
    made = trade_off_figure(reader.read("digits"))
    assert made is not None
    shown = {trace.name: (list(trace.x), list(trace.y)) for trace in made.data}
    assert shown == {
        "LCSC/0": ([0.5], [3.8]),
        "EMA*/0": ([0.62], [28.0]),
        "last checkpoint": ([0.4], [29.0]),
        "answer": ([0.5], [3.8]),
    }
    assert [trace.customdata[0] for trace in made.data] == ["LCSC, trial 0", "EMA*", "last checkpoint", "LCSC, trial 0"]
    assert made.layout.xaxis.title.text == "held-out precision@clip"


def test_bars_are_the_intervals_also_of_a_loss_that_is_the_metric(url: str) -> None:
    storage = open_storage(url, write=True)
    write_study(storage, "digits/LCSC/0", [4.0])
    errors: dict[str, Any] = {f"loss{STANDARD_ERROR}": 0.5, f"precision{STANDARD_ERROR}": 0.05}
    found = measured(4.0, fid=4.0, precision=0.6, **errors)
    write_report(storage, report_of({"digits/LCSC/0": found}))
    made = trade_off_figure(HistoryReader(storage).read("digits"))
    assert made is not None
    for bar, expected in ((made.data[0].error_x, 0.098), (made.data[0].error_y, 0.98)):
        np.testing.assert_allclose([bar.array, bar.arrayminus], expected, rtol=1e-3)


def test_any_two_metrics_can_be_chosen_and_fewer_make_no_figure(reader: HistoryReader) -> None:
    studies = reader.read("digits")
    assert metrics_of(studies) == ["precision@clip", "fid@clip", "loss"]
    made = trade_off_figure(studies, "loss", "precision@clip")
    assert made is not None
    assert [list(trace.x) for trace in made.data[:2]] == [[3.8], [28.0]]
    with pytest.raises(LcscError, match="recall: no answer has this held-out metric; available: precision@clip"):
        trade_off_figure(studies, "recall")
    assert trade_off_figure(reader.read("other")) is None
    assert trade_off_figure(()) is None
