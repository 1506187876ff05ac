"""Cost curves: FID on held-out noise against images or seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from contest.entries import EMA, Cell
from contest.numbers import Curves
from lcsc_opt.database.names import label
from lcsc_opt.views.figures.theme import GREY, Style, figure_layout, inert, style, template, with_alpha

AXES = {"images": "images sampled by the search", "seconds": "seconds of evaluations, on one core"}
FID = "FID on held-out noise"
SMALL = 11  # of letters

Field = Mapping[Cell, Sequence[Curves]]


def cost_curve(cell: Cell, contenders: Sequence[Curves]) -> go.Figure:
    """One cell: held-out FID against images, means and ranges over seeds, with EMA* as a line."""
    made = go.Figure(layout=figure_layout("light", view=f"cost/{cell.name}", height=480))
    _draw(made, contenders, "images", set())
    made.update_xaxes(title_text=AXES["images"], **_log_axis("~s")).update_yaxes(title_text=FID, **_log_axis())
    return made


def objective_figure(field: Field) -> go.Figure:
    """All cells of an objective: a column for each K, held-out FID against images above, against seconds below."""
    made = make_subplots(
        rows=len(AXES),
        cols=len(field),
        subplot_titles=[f"{inert(cell.title)}" for cell in field],
        shared_yaxes="columns",
        vertical_spacing=0.14,
        horizontal_spacing=0.07,
    )
    seen: set[str] = set()
    for column, contenders in enumerate(field.values(), start=1):
        for row, axis in enumerate(AXES, start=1):
            _draw(made, contenders, axis, seen, row=row, col=column)
            made.update_xaxes(
                title_text=AXES[axis], row=row, col=column, **_log_axis("~s" if axis == "images" else "~g")
            )
            made.update_yaxes(row=row, col=column, **_log_axis())
    made.update_yaxes(title_text=FID, col=1)
    made.update_xaxes(tickfont_size=SMALL)  # 100k and 200k lie side by side
    made.update_layout(template=template("light"), width=120 + 460 * len(field), height=820, showlegend=True)
    return made


def _style(contender: str) -> Style:
    """The optimizer's own style; dotted for other settings, such as ``LCSC, mutation 0.014``."""
    optimizer, _, settings = contender.partition(", ")
    return style(optimizer)._replace(dash="dot") if settings else style(optimizer)


def _log_axis(tickformat: str = "~g") -> dict[str, str]:
    return {"type": "log", "tickformat": tickformat, "dtick": "D2"}  # ticks at 1, 2, 5, 10, …


def _draw(
    made: go.Figure,
    contenders: Sequence[Curves],
    axis: str,
    named: set[str],
    **place: int,
) -> None:
    """Lines over bands. A contender is in the legend once for all panels; ``named`` holds those that are in it."""
    drawn = [(curves, *_line(curves, axis)) for curves in contenders if curves.label != EMA]
    for curves, x, kept in drawn:
        if len(curves.seeds) > 1:
            _add_band(made, curves, x, kept, place)
    for curves, x, kept in drawn:
        _add_line(made, curves, x, kept, place, legend=curves.label not in named)
        named.add(curves.label)
    for ema in (curves for curves in contenders if curves.label == EMA):
        _add_ema(made, ema, place)


def _line(curves: Curves, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """The points of the line, from the first limit at which every seed has an answer to the end of the search."""
    known = ~np.isnan(curves.held_out).any(axis=0) & (curves.limits <= curves.end)
    spent = curves.limits if axis == "images" else getattr(curves, axis).mean(axis=0)
    return spent[known], known


def _add_band(made: go.Figure, curves: Curves, x: np.ndarray, kept: np.ndarray, place: Mapping[str, int]) -> None:
    shared = {
        **{"x": x, "mode": "lines", "legendgroup": inert(curves.label), "showlegend": False},
        **{"hoverinfo": "skip", "line": {"width": 0}},
    }
    values = curves.held_out[:, kept]
    made.add_scatter(y=values.min(axis=0), **shared, **place)
    fill = with_alpha(_style(curves.label).colour, 0.18)
    made.add_scatter(y=values.max(axis=0), fill="tonexty", fillcolor=fill, **shared, **place)


def _add_line(
    made: go.Figure, curves: Curves, x: np.ndarray, kept: np.ndarray, place: Mapping[str, int], *, legend: bool
) -> None:
    drawn = _style(curves.label)
    seeds = f" ({len(curves.seeds)} seeds)" if curves.random else ""
    made.add_scatter(
        x=x,
        y=curves.held_out[:, kept].mean(axis=0),
        mode="lines+markers",
        name=inert(label(curves.label)) + seeds,
        legendgroup=inert(curves.label),
        showlegend=legend,
        line={"color": drawn.colour, "dash": drawn.dash, "width": 2.5},
        marker={"symbol": drawn.marker, "size": 8, "color": drawn.colour},
        **place,
    )


def _add_ema(made: go.Figure, ema: Curves, place: Mapping[str, int]) -> None:
    level = float(ema.final.mean())
    made.add_hline(y=level, line={"color": GREY, "dash": "dash", "width": 1}, **place)
    made.add_annotation(
        text="EMA*",
        x=0.99,
        xref="x domain",
        y=math.log10(level),
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        font={"color": GREY},
        **place,
    )
