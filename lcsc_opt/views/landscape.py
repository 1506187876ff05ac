"""The loss on the plane through three models, with the trials of searches (Liu et al. 2024, Fig. 3, 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.coefficients.layer_groups import mean_of_rows
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, Floats, Plane, plane_grid
from lcsc_opt.database.arrays import coefficients_of, has_coefficients
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import loss_title
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.panels import Panel, axis_layout, draw
from lcsc_opt.views.figures.theme import GREY, Theme, empty_figure, inert, style, with_alpha

MOST_TRIALS = 150  # of one search
_COLOUR_TICKS = 6


def landscapes(reader: HistoryReader) -> list[str]:
    """The names of the studies that evaluate a plane, in the order in which they were created."""
    return [name for name in reader.names() if split_name(name)[1] == "Landscape"]


def landscape_figure(
    reader: HistoryReader, study: Standing, searches: Iterable[Standing], *, theme: Theme = "light"
) -> go.Figure:
    """The losses of ``study`` as contours; on them its corners, and the trials of searches of the same checkpoints."""
    options = study.settings["optimizer"]["options"]
    plane = Plane.through(options.get("corners"), study.steps)
    axis, points = plane_grid(options.get("size", DEFAULT_SIZE))
    values = [math.nan if trial.value is None else trial.value for trial in reader.trials(study)]
    loss_at = dict(zip(points, values, strict=False))  # in the order of the asks; the last may not be asked yet
    losses = np.array([[loss_at.get((x, y), math.nan) for x in axis.tolist()] for y in axis.tolist()])
    if np.isnan(losses).all():
        return empty_figure(f"{study.study} has no value yet", theme)
    drawn = [search for search in searches if search.steps == study.steps and search.summary.best is not None]
    traces = [_contours(study, axis, losses), *(_trials(reader, search, plane) for search in drawn), _corners(plane)]
    x_label, y_label = map(inert, plane.labels[1:])  # the first is the origin
    ends = [axis[0], axis[-1]]
    return draw(
        [Panel(traces, y=axis_layout(f"y: to {y_label}", range=ends, scaleanchor="x"), height=540)],
        x=axis_layout(f"x: to {x_label}", range=ends, constrain="domain"),
        theme=theme,
        view=f"landscape/{study.study}",
        legend={"orientation": "h", "y": -0.12},
        hovermode="closest",
    )


def _contours(study: Standing, axis: Floats, losses: Floats) -> go.Contour:
    """The plane; colours are logarithms of the losses if all are above zero."""
    values = study.sign * losses
    is_logarithmic = bool(np.nanmin(values) > 0)
    heights = np.log10(values) if is_logarithmic else values
    ticks = np.linspace(np.nanmin(heights), np.nanmax(heights), _COLOUR_TICKS)
    tick_values = 10**ticks if is_logarithmic else ticks
    return go.Contour(
        x=axis,
        y=axis,
        z=heights,
        text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in values],
        colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
        connectgaps=True,
        ncontours=20,
        contours={"coloring": "heatmap"},
        line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
        colorbar={
            "title": {"text": inert(loss_title(study.metric))},
            "thickness": 12,
            "tickvals": ticks,
            "ticktext": [f"{value:.3g}" for value in tick_values],
        },
        hovertemplate="(%{x:.3g}, %{y:.3g}): %{text}<extra></extra>",
    )


def _trials(reader: HistoryReader, search: Standing, plane: Plane) -> go.Scatter:
    """Some trials of a search, chosen evenly, and its answer as a large mark."""
    trials = [trial for trial in reader.trials(search) if trial.value is not None and has_coefficients(trial)]
    shown = [trials[index] for index in thinned(np.arange(len(trials)), MOST_TRIALS)]
    models = [coefficients_of(trial) for trial in shown]
    answer = reader.answer(search)
    assert answer is not None  # it has a trial with a loss
    positions = plane.project(np.stack([mean_of_rows(model) for model in (*models, answer)]))
    look = style(search.optimizer)
    return go.Scatter(
        x=positions[:, 0],
        y=positions[:, 1],
        mode="markers",
        name=inert(f"{search.label}/{search.seed}"),
        marker={
            "symbol": look.marker,
            "size": [*[5] * len(shown), 15],
            "opacity": 0.6,
            "color": look.colour,
        },
        text=[*(f"trial {trial.number}: {search.sign * (trial.value or 0.0):.4g}" for trial in shown), "its answer"],
    )


def _corners(plane: Plane) -> go.Scatter:
    """The three models, joined; the first is the origin."""
    return go.Scatter(
        x=[0, 1, 0, 0],
        y=[0, 0, 1, 0],
        mode="lines+markers+text",
        name="corners",
        text=[*map(inert, plane.labels), ""],
        textposition=["bottom right", "bottom right", "top right", "middle center"],
        line={"width": 1, "dash": "dot", "color": GREY},
        marker={"symbol": "square", "size": 10, "color": GREY},
        hoverinfo="text",
    )
