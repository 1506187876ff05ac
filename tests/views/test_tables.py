"""Tables of reports, as text."""

from __future__ import annotations

from lcsc_opt.database.report import MetricRow
from lcsc_opt.views import percent
from lcsc_opt.views.ranking import Difference
from lcsc_opt.views.tables import report_table


def test_the_columns_are_those_that_some_metric_has() -> None:
    rows = [
        MetricRow("loss", 1, 2.5, against="EMA*", baseline=28.0, gain=25.5),
        MetricRow("precision", -1, 0.557, against="EMA*", baseline=0.62, gain=-0.063, lost=True),
        MetricRow("near", 1, 3.05, against="EMA*", baseline=2.87, gain=-0.18, lost=True, real_halves=2.2),
    ]
    header, texts = report_table(rows)
    assert header == ("metric", "better", "answer", "EMA*", "gain", "real images")
    assert texts == [
        ["loss", "lower", "2.5", "28", "+25.5", "–"],
        ["precision", "higher", "0.557", "0.62", "-0.063 (worse)", "–"],
        ["near", "lower", "3.05", "2.87", "-0.18 (worse)", "2.2"],
    ]
    alone = report_table([MetricRow("near", None, 3.0, 0.1)])
    assert alone == (("metric", "better", "answer"), [["near", "–", "3 ± 0.1"]])


def test_intervals_are_shown_in_place_of_deviations() -> None:
    rows = [
        MetricRow(
            "loss", 1, 2.5, 0.1, "EMA*", 28.0, 0.5, 25.5, 0.4, False, None, False, (2.3, 2.7), (27, 29), (24.5, 26)
        ),
        MetricRow("near", 1, 3.05, 0.2, "EMA*", 2.87, 0.3, -0.18, 0.01, lost=True),
    ]
    header, texts = report_table(rows)
    assert header == ("metric", "better", "answer [95 %]", "EMA* [95 %]", "gain [95 %]")
    assert texts[0][2:] == ["2.5 [2.3, 2.7]", "28 [27, 29]", "+25.5 [+24.5, +26]"]
    assert texts[1][2:] == ["3.05 ± 0.2", "2.87 ± 0.3", "-0.18 ± 0.01 (worse)"]


def test_nothing_gained_has_no_minus() -> None:
    """0.5 is the precision of both; higher is better, so the gain is -1 * 0.0."""
    row = MetricRow("precision", -1, 0.5, against="EMA*", baseline=0.5, gain=-0.0, gain_interval=(-0.0, 0.25))
    _, [[*_, gain]] = report_table([row])
    assert gain == "+0 [+0, +0.25]"
    assert Difference(-0.0, -0.0, 1.0).text() == "+0 [0, 1]"
    assert percent(-0.0001) == "+0.0 %"
