"""The figure of the best losses so far: a line for each optimizer, and the band of its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.views.curves import AXES, Curve, curves, default_axis
from lcsc_opt.views.figures.panels import Panel, axis_layout, draw
from lcsc_opt.views.figures.theme import GREY, Theme, empty_figure, inert, style, with_alpha
from lcsc_opt.views.ranking import loss_name

_FEW_EVALUATIONS = 10


def comparison_figure(
    studies: Sequence[Standing],
    axis: str | None = None,
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Best so far of each optimizer: mean and range over its seeds, EMA* as a line.

    All are losses on the search's noise, of as many images as a candidate of the search. ``axis`` is one of
    :data:`~lcsc_opt.views.curves.AXES`; ``None`` is the :func:`~lcsc_opt.views.curves.default_axis`. The axis of losses
    is linear if one of them is not positive.
    """
    axis = axis or default_axis(studies)
    lines = curves(studies, axis)
    if not lines:
        experiment = next((study.experiment for study in studies), "this experiment")
        return empty_figure(f"No result yet in {experiment}. Start a search: lcsc run STUDY_FILE", theme)
    lowest = min(float(line.lowest.min()) for line in lines)
    level = None
    ema = ema_grid(studies)
    if ema is not None and ema.searched is not None:
        level = ema.searched
        lowest = min(lowest, level)
    traces = [trace for line in lines for trace in _range_traces(line)]  # under all lines
    traces += map(_line_trace, lines)
    x_options: dict[str, Any] = {}
    if axis == "evaluations" and max(line.positions[-1] for line in lines) < _FEW_EVALUATIONS:
        x_options["dtick"] = 1  # no ticks between whole numbers
    panel = Panel(
        traces, y=axis_layout(f"best {inert(loss_name(studies))} so far", logarithmic=lowest > 0, tick_format="~g")
    )
    view = f"comparison/{studies[0].experiment}/{axis}"
    x = axis_layout(AXES[axis], tick_format="~s", **x_options)
    figure = draw([panel], x=x, theme=theme, view=view, hovermode="x unified")
    if level is not None:
        figure.add_hline(
            level,
            line={"color": GREY, "dash": "dash", "width": 1},
            # plotly takes no logarithm of an annotation's height, as it does of the line's
            annotation={"text": "EMA*", "y": math.log10(level) if lowest > 0 else level, "font": {"color": GREY}},
            annotation_position="top right",
        )
    return figure


def _range_traces(curve: Curve) -> list[go.Scatter]:
    """The band between the lowest and the highest seed."""
    if len(curve.seeds) < 2:
        return []
    shared: dict[str, Any] = {
        "x": curve.positions,
        "mode": "lines",
        "name": inert(curve.label),  # by which a refresh knows what a reader has switched off
        "legendgroup": inert(curve.optimizer),
        "showlegend": False,
        "hoverinfo": "skip",
        "line": {"width": 0, "shape": "hv"},
    }
    colour = with_alpha(style(curve.optimizer).colour, 0.18)
    return [
        go.Scatter(y=curve.lowest, **shared),
        go.Scatter(y=curve.highest, fill="tonexty", fillcolor=colour, **shared),
    ]


def _line_trace(curve: Curve) -> go.Scatter:
    """The mean over seeds."""
    look = style(curve.optimizer)
    width = 2.5 if curve.finished else 1.2
    return go.Scatter(
        x=curve.positions,
        y=curve.mean,
        mode="lines" if len(curve.positions) > 1 else "lines+markers",  # a line of one point cannot be seen
        name=inert(curve.label),
        legendgroup=inert(curve.optimizer),
        line={"color": look.colour, "dash": look.dash, "width": width, "shape": "hv"},
        hovertemplate="%{y:.4g}",
    )
