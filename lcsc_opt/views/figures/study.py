"""The answer's coefficients, drawn over the training steps of the checkpoints."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.coefficients.layer_groups import mean_of_rows, of_layers
from lcsc_opt.coefficients.profiles import effective_count, starts_of, sum_abs
from lcsc_opt.database.history import Floats, Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.figures.panels import Panel, axis_layout, draw
from lcsc_opt.views.figures.theme import GREY, Theme, empty_figure, in_lines, inert, style

_COEFFICIENT_HOVER = "step %{x:,}: %{y:.4g}"
# pixels
_BARS_HEIGHT = 240
_MEANS_HEIGHT = 200  # of bars above a heat map
_HEAT_MAP_ROW = 13  # with its label
_LOWEST_HEAT_MAP = 120
_HIGHEST_HEAT_MAP = 780


def coefficients_figure(
    reader: HistoryReader, study: Standing, ema: Standing | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """The answer's coefficients over training steps, with EMA*'s (Liu et al. 2024, Fig. 5, 7, 8).

    A bar covers the training that its checkpoint stands for. With a row of coefficients for each layer group, bars are
    their mean, and a heat map under them has the rows; of layers with several rows, their means.
    """
    rows = reader.answer(study)
    if rows is None:
        return empty_figure("No complete trial yet. Continue the search: lcsc run", theme)
    has_rows = rows.ndim > 1
    traces: list[go.Bar | go.Scatter] = [_bars(study, mean_of_rows(rows))]
    if ema is not None and ema.study != study.study:
        ema_coefficients = reader.answer(ema)
        if ema_coefficients is not None:
            ema_line = go.Scatter(
                x=ema.steps,
                y=ema_coefficients,
                mode="lines",
                line={"color": GREY, "width": 2, "shape": "vh"},  # steps that end where the bars do
                name="EMA*",
                hovertemplate=_COEFFICIENT_HOVER,
            )
            traces.append(ema_line)
    bars = Panel(
        traces,
        y=axis_layout("mean coefficient" if has_rows else "coefficient"),
        title=_heading(study, rows),
        height=_MEANS_HEIGHT if has_rows else _BARS_HEIGHT,
    )
    return draw(
        [bars, _rows_panel(study, rows)] if has_rows else [bars],
        x=axis_layout("training step of the checkpoint", tick_format="~s"),
        theme=theme,
        view=f"coefficients/{study.study}",
        barmode="overlay",
        bargap=0,
        showlegend=len(traces) > 1,
    )


def _bars(study: Standing, coefficients: Floats) -> go.Bar:
    """A bar ``[K]`` for each checkpoint, over the steps since the checkpoint before it."""
    steps = study.steps
    intervals = np.array(steps, dtype=np.float64) - starts_of(steps)
    return go.Bar(
        x=steps,
        width=intervals,
        offset=-intervals,
        y=coefficients,
        name=inert(f"{study.label}/{study.seed}"),
        marker={"color": style(study.optimizer).colour, "line": {"width": 0}},
        hovertemplate=_COEFFICIENT_HOVER,
    )


def _rows_panel(study: Standing, rows: Floats) -> Panel:
    """A heat map of the coefficients ``[S, K]``, a line for each layer; hovering tells how its rows spread."""
    steps = study.steps
    means, spreads = of_layers(rows, study.layer_groups.values())
    names = [f"{layer} ({count})" if count > 1 else layer for layer, count in study.layer_groups.items()]
    absolute = np.abs(means)
    largest = float(np.quantile(absolute, 0.995)) or float(absolute.max()) or 1.0  # a few cells may be off the scale
    heat_map = go.Heatmap(
        x=[starts_of(steps)[0], *steps],  # edges of cells, where those of bars are
        y=[inert(name) for name in names],
        z=means.astype(np.float32),  # half as much to send
        zmin=-largest,
        zmax=largest,
        autocolorscale=True,  # the theme's diverging colours
        colorbar={"title": {"text": "coefficient"}, "thickness": 12},
        customdata=np.stack([np.broadcast_to(np.array(steps), means.shape), spreads], axis=-1).astype(np.float32),
        hovertemplate="%{y}, step %{customdata[0]:,}: %{z:.4g} ± %{customdata[1]:.2g}<extra></extra>",
    )
    return Panel(
        [heat_map],
        y=axis_layout(type="category", autorange="reversed", tickfont={"size": 9}, ticklen=2),
        height=min(max(_HEAT_MAP_ROW * len(means), _LOWEST_HEAT_MAP), _HIGHEST_HEAT_MAP),
    )


def _heading(study: Standing, coefficients: Floats) -> str:
    """The title of an answer's panel: which model, its loss, and the shape of its coefficients."""
    model = f"trial {study.chosen}"
    if study.found is not None and study.chosen is None:
        model = study.found.model.name.rpartition(", ")[2]  # the name without the optimizer: mean of the last half
    shape = f"Σ|a| = {sum_abs(coefficients):.2f}"
    if study.reported is not None:
        shape = f"{study.reported:.4g} held out, {shape}"
    elif study.searched is not None:
        shape = f"{study.searched:.4g} searched, {shape}"
    count = f"{effective_count(coefficients):.0f} checkpoints matter"
    return in_lines(f"{study.study}, {model}", shape, count)
