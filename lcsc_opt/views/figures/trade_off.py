"""Two held-out metrics of the answers of an experiment, one against the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import TRAINED, short_metric
from lcsc_opt.database.report import Report
from lcsc_opt.views import metric_place
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import Theme, inert, style
from lcsc_opt.views.ranking import ANSWER

_FIRST_ACROSS = ("precision", "recall")  # what a lower FID may cost
_FIRST_UP = ("fid", "loss")


def metrics_of(studies: Iterable[Standing]) -> list[str]:
    """The names of all held-out metrics, precision and recall first, the loss last."""
    names = dict.fromkeys(name for study in studies for name in _values(study))
    return sorted(names, key=lambda name: (metric_place(name, _FIRST_ACROSS), name == "loss"))


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
    y = y or min(names, key=lambda name: (name == x, metric_place(name, _FIRST_UP)), default=None)
    x = x or next((name for name in names if name != y), None)
    if x is None or y is None:
        return None
    searches = [_search(study, x, y) for study in studies if {x, y} <= _values(study).keys()]
    others = [_without_search(studies[0].report, name, x, y) for name in (*TRAINED, ANSWER)]
    panel = Panel(
        [*searches, *(trace for trace in others if trace is not None)],
        y=Axis(f"held-out {inert(short_metric(y))}", tick_format="~g"),
        height=280,
    )
    return draw(
        [panel],
        x=Axis(f"held-out {inert(short_metric(x))}", tick_format="~g"),
        theme=theme,
        view=f"trade-off/{studies[0].experiment}/{x}/{y}",
    )


def _search(study: Standing, x: str, y: str) -> go.Scatter:
    """The best of a search in the report."""
    look = style(study.optimizer)
    values = _values(study)
    return go.Scatter(
        x=[values[x]],
        y=[values[y]],
        error_x=_error_bar(study, x),
        error_y=_error_bar(study, y),
        mode="markers",
        name=inert(f"{study.label}/{study.seed}"),
        cliponaxis=False,
        marker={"symbol": look.marker, "size": 9, "color": look.colour},
        customdata=[inert(f"{study.study}, trial {study.chosen}")],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _error_bar(study: Standing, metric: str) -> dict[str, Any]:
    """The distances from the value to the ends of its interval; none where that is not known."""
    to_low, to_high = _error(study, metric)
    shown = bool(to_low or to_high)
    return {"array": [to_high], "arrayminus": [to_low], "thickness": 1, "width": 3, "visible": shown}


def _error(study: Standing, metric: str) -> tuple[float, float]:
    """How far below and above its value a held-out metric may be: to its 95 % interval, else by its deviation."""
    if study.report is None or study.found is None:
        return 0.0, 0.0
    of_loss, *rows = study.report.rows(study.found.model.name)
    is_loss = metric in ("loss", study.found.metric_of_loss)  # which has no row under another name
    row = of_loss if is_loss else next((row for row in rows if row.metric == metric), None)
    if row is not None and row.interval is not None:
        low, high = row.interval
        return row.value - low, high - row.value
    if row is not None and row.spread is not None:
        return row.spread, row.spread
    return 0.0, 0.0


def _without_search(report: Report | None, name: str, x: str, y: str) -> go.Scatter | None:
    """A model of the trainer's, or the answer; ``None`` if the report has no such model with both metrics."""
    if report is None:
        return None
    measured = report.of_answer if name == ANSWER else report.measured(name)
    if measured is None:
        return None
    values = {**measured.metrics, "loss": report.shown(measured)}
    if not {x, y} <= values.keys():
        return None
    look = style(name)
    return go.Scatter(
        x=[values[x]],
        y=[values[y]],
        mode="markers",
        name=inert(name),
        cliponaxis=False,
        marker={"symbol": look.marker, "size": 9, "color": look.colour},
        hovertemplate=f"{inert(name)}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
    )


def _values(study: Standing) -> dict[str, float]:
    """Name → value of everything that was measured of the answer on held-out noise."""
    if study.found is None or study.reported is None:
        return {}
    return {"loss": study.reported, **study.found.metrics}
