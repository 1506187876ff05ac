"""Two held-out metrics of the models of a report, one against the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError
from lcsc_opt.database.history import Standing
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.names import TRAINED, short_metric
from lcsc_opt.database.report import Report
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import Theme, inert, style
from lcsc_opt.views.ranking import ANSWER

_FIRST_ACROSS = ("precision", "recall")  # what a lower FID may cost
_FIRST_UP = ("fid", "loss")


def metrics_of(studies: Iterable[Standing]) -> list[str]:
    """The names of all held-out metrics, precision and recall first, the loss last."""
    measured_models = [study.found for study in studies if study.found is not None]
    names = dict.fromkeys(name for measured in measured_models for name in ("loss", *measured.metrics))
    return sorted(names, key=lambda name: (_place(name, _FIRST_ACROSS), name == "loss"))


def _place(metric: str, order: Sequence[str]) -> int:
    """Where a metric, in whatever features, is in an order of metrics; those that it does not name come last."""
    formula = metric.partition("@")[0]
    if formula in order:
        return order.index(formula)
    return len(order)


def trade_off_figure(
    studies: Sequence[Standing], x: str | None = None, y: str | None = None, *, theme: Theme = "light"
) -> go.Figure | None:
    """A mark for the best of each search, the trainer's models and the answer, on noise that no search saw.

    Error bars are the 95 % intervals, as far as they are known.

    Args:
        studies: those of an experiment.
        x: name of a held-out metric, or ``loss``; without it precision, or the first that is measured.
        y: the same; without it FID, else the loss.
        theme: the theme of the page.

    Returns:
        ``None`` without two metrics to choose from.

    Raises:
        LcscError: no answer has this metric.
    """
    names = metrics_of(studies)
    for name in (x, y):
        if name is not None and name not in names:
            raise LcscError(f"{name}: no answer has this held-out metric; available: {', '.join(names) or 'none'}")
    y = y or min(names, key=lambda name: (name == x, _place(name, _FIRST_UP)), default=None)
    x = x or next((name for name in names if name != y), None)
    if x is None or y is None:
        return None
    report = studies[0].report
    if report is None:
        return None
    marks = [_mark(report, study.found, study.optimizer, f"{study.label}/{study.seed}", x, y) for study in studies]
    marks += [_mark(report, report.measured(name), name, name, x, y) for name in TRAINED]
    marks.append(_mark(report, report.of_answer, ANSWER, ANSWER, x, y))
    panel = Panel(
        [mark for mark in marks if mark is not None],
        y=Axis(f"held-out {inert(short_metric(y))}", tick_format="~g"),
        height=280,
    )
    return draw(
        [panel],
        x=Axis(f"held-out {inert(short_metric(x))}", tick_format="~g"),
        theme=theme,
        view=f"trade-off/{studies[0].experiment}/{x}/{y}",
    )


def _mark(report: Report, measured: Measurement | None, optimizer: str, name: str, x: str, y: str) -> go.Scatter | None:
    """A model of the report in the style of its optimizer; ``None`` if it has not both metrics."""
    if measured is None:
        return None
    values = {**measured.metrics, "loss": report.shown(measured)}
    if not {x, y} <= values.keys():
        return None
    look = style(optimizer)
    return go.Scatter(
        x=[values[x]],
        y=[values[y]],
        error_x=_error_bar(report, measured, x),
        error_y=_error_bar(report, measured, y),
        mode="markers",
        name=inert(name),
        cliponaxis=False,
        marker={"symbol": look.marker, "size": 9, "color": look.colour},
        customdata=[inert(measured.model.title)],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _error_bar(report: Report, measured: Measurement, metric: str) -> dict[str, Any] | None:
    """From the value to the ends of its 95 % interval, else by its deviation; ``None`` where neither is known."""
    of_loss, *rows = report.rows(measured.model.name)
    is_loss = metric in ("loss", measured.metric_of_loss)  # which has no row under another name
    row = of_loss if is_loss else next((row for row in rows if row.metric == metric), None)
    if row is None:
        return None
    if row.interval is not None:
        low, high = row.interval
        return {"array": [high - row.value], "arrayminus": [row.value - low], "thickness": 1, "width": 3}
    if row.spread is not None:
        return {"array": [row.spread], "thickness": 1, "width": 3}
    return None
