"""Two held-out metrics of the answers of an experiment, or of all points of its sweep; all that a sweep varied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import TRAINED, label, short_metric
from lcsc_opt.views import metric_place, number
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import Theme, inert, style
from lcsc_opt.views.ranking import ANSWER

_FIRST_ACROSS = ("precision", "recall")  # what a lower FID may cost
_FIRST_UP = ("fid", "loss")
_LOSS_AXIS = "held-out loss"


def metrics_of(studies: Iterable[Standing]) -> list[str]:
    """The names of all held-out metrics, precision and recall first, the loss last."""
    names = dict.fromkeys(name for study in studies for name in _values(study))
    return sorted(names, key=lambda name: (metric_place(name, _FIRST_ACROSS), name == "loss"))


def trade_off_figure(
    studies: Sequence[Standing], x: str | None = None, y: str | None = None, *, theme: Theme = "light"
) -> go.Figure | None:
    """A mark for each answer, on noise that no search saw; those of one optimizer and seed over a sweep are joined.

    Error bars are the 95 % intervals, as far as they are known. The trainer's models and the answer have a mark each.

    Args:
        studies: the studies of an experiment, or of several points of a sweep, in the order of the points.
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
    joined: dict[tuple[str, int], list[Standing]] = {}
    for study in studies:
        if {x, y} <= _values(study).keys():
            joined.setdefault((study.optimizer, study.seed), []).append(study)
    answers = [_answers(group, x, y) for group in joined.values()]
    others = [_without_search(studies, name, x, y) for name in (*TRAINED, ANSWER)]
    panel = Panel(
        [*answers, *(trace for trace in others if trace is not None)],
        y=Axis(f"held-out {inert(short_metric(y))}", tick_format="~g"),
        height=280,
    )
    return draw(
        [panel],
        x=Axis(f"held-out {inert(short_metric(x))}", tick_format="~g"),
        theme=theme,
        view=f"trade-off/{studies[0].experiment}/{x}/{y}",
    )


def _answers(studies: Sequence[Standing], x: str, y: str) -> go.Scatter:
    """The answers of one optimizer and seed, over the points of a sweep."""
    first = studies[0]
    line_style = style(first.optimizer)
    values = [_values(study) for study in studies]
    return go.Scatter(
        x=[value[x] for value in values],
        y=[value[y] for value in values],
        error_x=_error_bars(studies, x),
        error_y=_error_bars(studies, y),
        mode="lines+markers+text" if len(studies) > 1 else "markers",
        name=inert(f"{first.label}/{first.seed}"),
        text=[inert(", ".join(split_point(study.experiment)[1].values())) for study in studies],
        textposition="top center",
        cliponaxis=False,
        line={"color": line_style.colour, "dash": line_style.dash, "width": 1.5},
        marker={"symbol": line_style.marker, "size": 9, "color": line_style.colour},
        customdata=[inert(f"{study.study}, trial {study.chosen}") for study in studies],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _error_bars(studies: Sequence[Standing], metric: str) -> dict[str, Any]:
    """The distances from each answer's value to the ends of its interval; none where that is not known."""
    below = []
    above = []
    for study in studies:
        to_low, to_high = _error(study, metric)
        below.append(to_low)
        above.append(to_high)
    return {"array": above, "arrayminus": below, "thickness": 1, "width": 3, "visible": any(below + above)}


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


def _without_search(studies: Sequence[Standing], name: str, x: str, y: str) -> go.Scatter | None:
    """A model of the trainer's, or the answer, of each report; ``None`` if none has both metrics."""
    places: dict[tuple[float, float], None] = {}
    reports = {study.experiment: study.report for study in studies if study.report is not None}
    for report in reports.values():
        measured = report.of_answer if name == ANSWER else report.measured(name)
        values = {} if measured is None else {**measured.metrics, "loss": report.shown(measured)}
        if {x, y} <= values.keys():
            places[values[x], values[y]] = None
    if not places:
        return None
    look = style(name)
    return go.Scatter(
        x=[across for across, _ in places],
        y=[up for _, up in places],
        mode="markers",
        name=inert(name),
        cliponaxis=False,
        marker={"symbol": look.marker, "size": 9, "color": look.colour},
        hovertemplate=f"{inert(name)}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
    )


def parallel_figure(points: Mapping[str, Sequence[Standing]], theme: Theme = "light") -> go.Figure:
    """Parallel coordinates of a sweep: a line for each answer, through the values of what was varied to its loss.

    Values of a setting are evenly apart; losses are to scale, the lowest at the bottom. The lines are of Scatter:
    plotly's own Parcoords makes functions of texts, which the pages' policy forbids.

    Args:
        points: experiment → its studies; those without a held-out loss are left out.
        theme: the theme of the page.
    """
    answers: list[tuple[Standing, dict[str, str], float]] = []
    for point, studies in points.items():
        varied = split_point(point)[1]
        answers += [(study, varied, study.reported) for study in studies if study.reported is not None]
    losses = [loss for *_, loss in answers] or [0.0]
    lowest = min(losses)
    span = max(losses) - lowest or 1.0
    heights = _heights_of_values([varied for _, varied, _ in answers])
    traces: list[go.Scatter] = []
    in_legend = set[str]()
    for study, varied, loss in answers:
        line_style = style(study.optimizer)
        traces.append(
            go.Scatter(
                x=[*varied, _LOSS_AXIS],
                y=[*(heights[setting] for setting in varied.items()), (loss - lowest) / span],
                name=inert(label(study.optimizer)),
                legendgroup=inert(study.optimizer),
                showlegend=study.optimizer not in in_legend,
                mode="lines+markers",
                line={"color": line_style.colour, "dash": line_style.dash, "width": 1.5},
                marker={"symbol": line_style.marker, "size": 7},
                hovertemplate=f"{inert(study.study)}<br>{number(loss)}<extra></extra>",
            )
        )
        in_legend.add(study.optimizer)
    ends = {(_LOSS_AXIS, number(loss)): (loss - lowest) / span for loss in (lowest, max(losses))}
    panel = Panel(
        traces,
        y=Axis(options={"visible": False}),
        height=200,
        notes=[
            {"x": axis, "y": height, "text": inert(text), "showarrow": False, "xanchor": "right", "xshift": -8}
            for (axis, text), height in {**ends, **heights}.items()
        ],
    )
    x = Axis(options={"type": "category", "showgrid": True, "showline": False})
    return draw([panel], x=x, theme=theme, view=f"parallel/{','.join(points)}")


def _heights_of_values(settings: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], float]:
    """(Setting, value) → where it is on the setting's axis, from 0 to 1."""
    heights = {}
    for key in dict.fromkeys(key for varied in settings for key in varied):
        values = sorted({varied[key] for varied in settings if key in varied}, key=_numbers_first)
        for place, value in enumerate(values):
            heights[key, value] = place / max(len(values) - 1, 1)
    return heights


def _numbers_first(value: str) -> tuple[float, str]:
    """Sorts numbers by their value, before texts."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _values(study: Standing) -> dict[str, float]:
    """Name → value of everything that was measured of the answer on held-out noise."""
    if study.found is None or study.reported is None:
        return {}
    return {"loss": study.reported, **study.found.metrics}
