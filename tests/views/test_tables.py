"""Tables of reports, as text."""

from __future__ import annotations

import dataclasses
from typing import Any

from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.database.report import HeldOutReport, MetricRow
from lcsc_opt.views import percent
from lcsc_opt.views.ranking import Difference
from lcsc_opt.views.tables import comparison_table, report_table
from tests.history_examples import history, measured


def report_of(*rows: MetricRow) -> HeldOutReport:
    return HeldOutReport(measured(2.5), rows=rows)


def test_the_columns_are_those_that_some_metric_has() -> None:
    rows = (
        MetricRow("loss", 1, 2.5, against="EMA*", baseline=28.0, gain=25.5),
        MetricRow("precision", -1, 0.557, against="EMA*", baseline=0.62, gain=-0.063, lost=True),
        MetricRow("near", 1, 3.05, against="EMA*", baseline=2.87, gain=-0.18, lost=True, real_halves=2.2),
    )
    last = measured(2.0, name=LAST_CHECKPOINT, precision=0.7)
    ema = measured(28.0, name="EMA*")
    header, texts = report_table(HeldOutReport(measured(2.5), (last, ema), rows))
    assert header == ("metric", "found", "EMA*", "gain", "last checkpoint", "real images")
    assert texts == [
        ["loss ↓", "2.5", "28", "+25.5", "2", "–"],
        ["precision ↑", "0.557", "0.62", "-0.063 (worse)", "0.7", "–"],
        ["near ↓", "3.05", "2.87", "-0.18 (worse)", "–", "2.2"],
    ]
    alone = report_table(report_of(MetricRow("near", None, 3.0, 0.1)))
    assert alone == (("metric", "found"), [["near", "3 ± 0.1"]])


def test_intervals_are_shown_in_place_of_deviations() -> None:
    rows = [
        MetricRow(
            "loss", 1, 2.5, 0.1, "EMA*", 28.0, 0.5, 25.5, 0.4, False, None, False, (2.3, 2.7), (27, 29), (24.5, 26)
        ),
        MetricRow("near", 1, 3.05, 0.2, "EMA*", 2.87, 0.3, -0.18, 0.01, lost=True),
    ]
    header, texts = report_table(report_of(*rows))
    assert header == ("metric", "found [95 %]", "EMA* [95 %]", "gain [95 %]")
    assert texts[0][1:] == ["2.5 [2.3, 2.7]", "28 [27, 29]", "+25.5 [+24.5, +26]"]
    assert texts[1][1:] == ["3.05 ± 0.2", "2.87 ± 0.3", "-0.18 ± 0.01 (worse)"]


def test_nothing_gained_has_no_minus() -> None:
    """0.5 is the precision of both; higher is better, so the gain is -1 * 0.0."""
    row = MetricRow("precision", -1, 0.5, against="EMA*", baseline=0.5, gain=-0.0, gain_interval=(-0.0, 0.25))
    _, [[*_, gain]] = report_table(report_of(row))
    assert gain == "+0 [+0, +0.25]"
    assert Difference(-0.0, -0.0, 1.0).text() == "+0 [0, 1]"
    assert percent(-0.0001) == "+0.0 %"


def test_a_comparison_has_the_judges_precision_and_recall_and_with_all_metrics_the_others() -> None:
    rows: list[dict[str, Any]] = [
        {"metric": "loss", "sign": 1, "value": 2.0},
        {"metric": "kid", "sign": 1, "value": 0.1},
        {"metric": "recall", "sign": -1, "value": 0.5, "real_halves": 0.9},
        {"metric": "fid@clip", "sign": 1, "value": 4.0, "cross_check": True},
        {"metric": "fid_held_out", "sign": 1, "value": 3.0, "real_halves": 1.0},
    ]
    metrics = {row["metric"]: row["value"] for row in rows[1:]}
    report = HeldOutReport(measured(2.0, **metrics), rows=tuple(MetricRow(**row) for row in rows))
    study = history([3.0], held_out=2.0)
    study = dataclasses.replace(study, held_out=report)
    main = comparison_table([study])
    assert main is not None
    assert main[0] == ("optimizer", "held-out FID", "fid_held_out ↓", "fid@clip ↓", "recall ↑")
    assert main[1] == [["LCSC", "2", "3", "4", "0.5"], ["real images", "–", "1", "–", "0.9"]]
    everything = comparison_table([study], all_metrics=True)
    assert everything is not None
    assert {*everything[0]} - {*main[0]} == {"kid ↓"}
