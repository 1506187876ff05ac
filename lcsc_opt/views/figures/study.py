"""The figures of one study."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.coefficients.layer_groups import mean_of_rows
from lcsc_opt.coefficients.profiles import effective_count, starts_of, sum_abs
from lcsc_opt.database.history import Floats, Standing, Trials, ema_grid
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.summary import PARTS, is_finished
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import GREY, PART_COLOURS, Theme, empty_figure, in_lines, inert, style
from lcsc_opt.views.study_status import EVALUATION

_NO_RESULT = "No complete trial yet. Continue the search: lcsc run"
_STEP_TITLE = "training step of the checkpoint"
_COEFFICIENT_HOVER = "step %{x:,}: %{customdata:.4g}"
# where a layer is on the way through the network, by the first of these words in its name
_LAYER_WORDS = re.compile(
    r"(?:^|[._])(?:(?P<first>conv_in|input(?!_block)|embed|time|map|[a-z]_embed)|(?P<second>down|input_block|enc)"
    r"|(?P<middle>mid|block|layer)|(?P<fourth>up|output_block|dec)|(?P<last>out|final|head))"
)
_LAYER_PLACES = {"first": 0, "second": 1, "middle": 2, "fourth": 3, "last": 4}
# pixels
_BARS_HEIGHT = 240
_MEANS_HEIGHT = 200  # of bars above a heat map
_HEAT_MAP_ROW = 13  # with its label
_LOWEST_HEAT_MAP = 120
_HIGHEST_HEAT_MAP = 780

MOST_BARS = 120  # in a figure of trials
_IRREGULAR = 1.01  # densities are drawn if the longest interval between checkpoints over the shortest exceeds this


def own_figures(
    reader: HistoryReader,
    study: Standing,
    studies: Sequence[Standing],
    names: Collection[str],
    *,
    theme: Theme = "light",
) -> dict[str, go.Figure]:
    """Figures of one study, compared with EMA* of its experiment.

    The ``names`` are of ``best_so_far``, ``coefficients``, ``times``.
    """
    ema = ema_grid(studies)
    compared: list[Standing] = [study]
    if ema is not None and ema.study != study.study:
        compared.append(ema)
    draw_figure: dict[str, Callable[[], go.Figure]] = {
        "best_so_far": lambda: comparison_figure(compared, theme=theme),
        "coefficients": lambda: coefficients_figure(reader, study, ema, theme=theme),
        "times": lambda: _times_figure(study, reader.trials(study), theme),
    }
    return {name: draw_figure[name]() for name in draw_figure if name in names}


def coefficients_figure(
    reader: HistoryReader, study: Standing, ema: Standing | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """The answer's coefficients over training steps, with EMA*'s (Liu et al. 2024, Fig. 5, 7, 8).

    A bar covers the training that its checkpoint stands for. Where checkpoints are not equally far apart its height is
    per training step, so that its area is the coefficient. With a row of coefficients for each layer group, bars are
    their mean, and a heat map under them has the rows, in the order of the way through the network where names tell it.
    """
    rows = reader.answer(study)
    if rows is None:
        return empty_figure(_NO_RESULT, theme)
    has_rows = rows.ndim > 1
    traces: list[go.Bar | go.Scatter] = [_bars(study, mean_of_rows(rows))]
    ema_coefficients = None
    if ema is not None:
        ema_coefficients = reader.answer(ema)
    if ema is not None and ema_coefficients is not None and ema.study != study.study:
        traces.append(_ema_line(ema, ema_coefficients))
    bars = Panel(
        traces,
        y=Axis(_coefficient_title(study, is_mean=has_rows)),
        title=_heading(study, rows),
        height=_MEANS_HEIGHT if has_rows else _BARS_HEIGHT,
    )
    return draw(
        [bars, _rows_panel(study, rows)] if has_rows else [bars],
        x=Axis(_STEP_TITLE, tick_format="~s"),
        theme=theme,
        view=f"coefficients/{study.study}",
        barmode="overlay",
        bargap=0,
        showlegend=ema_coefficients is not None,
    )


def _bars(study: Standing, coefficients: Floats) -> go.Bar:
    """A bar ``[K]`` for each checkpoint, over the steps since the checkpoint before it."""
    steps = study.steps
    intervals = _intervals(steps)
    return go.Bar(
        x=steps,
        width=intervals,
        offset=-intervals,
        y=_bar_heights(coefficients, steps),
        name=inert(f"{study.label}/{study.seed}"),
        customdata=coefficients,
        marker={"color": style(study.optimizer).colour, "line": {"width": 0}},
        hovertemplate=_COEFFICIENT_HOVER,
    )


def _ema_line(ema: Standing, coefficients: Floats) -> go.Scatter:
    steps = ema.steps
    return go.Scatter(
        x=steps,
        y=_bar_heights(coefficients, steps),
        mode="lines",
        line={"color": GREY, "width": 2, "shape": "vh"},
        name="EMA*",
        customdata=coefficients,
        hovertemplate=_COEFFICIENT_HOVER,
    )


def _rows_panel(study: Standing, rows: Floats) -> Panel:
    """A heat map of ``[S, K]``, a row for each layer group, in the order of the way through the network."""
    steps = study.steps
    order = sorted(range(len(rows)), key=lambda group: _layer_place(study.layer_groups[group]))
    heights = _bar_heights(rows[order], steps)
    absolute = np.abs(heights)
    largest = float(np.quantile(absolute, 0.995)) or float(absolute.max()) or 1.0  # a few cells may be off the scale
    heat_map = go.Heatmap(
        x=[starts_of(steps)[0], *steps],  # edges of cells, where those of bars are
        y=[inert(study.layer_groups[group]) for group in order],
        z=heights.astype(np.float32),
        zmin=-largest,
        zmax=largest,
        autocolorscale=True,
        colorbar={"title": {"text": "per step" if _is_irregular(steps) else "coefficient"}, "thickness": 12},
        customdata=np.broadcast_to(np.array(steps, dtype=np.int32), heights.shape),
        hovertemplate="%{y}, step %{customdata:,}: %{z:.4g}<extra></extra>",
    )
    y_options = {"type": "category", "autorange": "reversed", "tickfont": {"size": 9}, "ticklen": 2}
    return Panel(
        [heat_map],
        y=Axis(options=y_options),
        height=min(max(_HEAT_MAP_ROW * len(rows), _LOWEST_HEAT_MAP), _HIGHEST_HEAT_MAP),
    )


def _layer_place(name: str) -> int:
    """Where a layer is on the way through the network, as far as its name tells: 0 at its beginning, 4 at its end."""
    match = _LAYER_WORDS.search(name)
    if match is None or match.lastgroup is None:
        return _LAYER_PLACES["middle"]
    return _LAYER_PLACES[match.lastgroup]


def _heading(study: Standing, coefficients: Floats) -> str:
    """The title of an answer's panel: the trial, its loss, and the shape of its coefficients."""
    shape = f"Σ|a| = {sum_abs(coefficients):.2f}"
    if study.reported is not None:
        shape = f"{study.reported:.4g} held out, {shape}"
    elif study.searched is not None:
        shape = f"{study.searched:.4g} searched, {shape}"
    count = f"{effective_count(coefficients):.0f} checkpoints matter"
    return in_lines(f"{study.study}, trial {study.chosen}", shape, count)


def _coefficient_title(study: Standing, *, is_mean: bool) -> str:
    """The title of the axis of bars, in two lines above a heat map, where there is little height."""
    title = "coefficient"
    separator = " "
    if is_mean:
        title = "mean coefficient"
        separator = "<br>"
    if _is_irregular(study.steps):
        title += f"{separator}per training step"
    return title


def _is_irregular(steps: Sequence[int]) -> bool:
    """Whether the intervals between checkpoints differ, so that coefficients are drawn per training step."""
    intervals = _intervals(steps)
    return bool(intervals.max() > _IRREGULAR * intervals.min())


def _bar_heights(coefficients: Floats, steps: Sequence[int]) -> Floats:
    """The heights of bars, as the coefficients ``[..., K]``.

    A checkpoint stands for the steps since the checkpoint before it. If these intervals differ, each coefficient is
    divided by its interval. The first checkpoint has no such interval; its coefficient is divided by the next one.
    """
    if not _is_irregular(steps):
        return coefficients
    heights: Floats = coefficients / _intervals(steps)
    return heights


def _intervals(steps: Sequence[int]) -> Floats:
    """How many training steps each row stands for, ``[K]``."""
    intervals: Floats = np.array(steps, dtype=np.float64) - starts_of(steps)
    return intervals


def _times_figure(study: Standing, trials: Trials, theme: Theme) -> go.Figure:
    """Seconds a trial, stacked by part, over the search: means over groups of consecutive trials, where there are many.

    ``other`` is what the objective's parts leave of an evaluation; without parts, an evaluation is one.
    """
    trials = trials[is_finished(trials)]
    if not len(trials):
        return empty_figure("No trial has ended yet. Continue the search: lcsc run", theme, height=220)
    seconds = {part.removesuffix("_seconds"): trials[part].astype(np.float64) for part in PARTS}
    named = np.sum(list(seconds.values()), axis=0)
    if not named.any():
        seconds[EVALUATION] = trials["seconds"]
        named = trials["seconds"]
    seconds["other"] = np.maximum(trials["seconds"] - named, 0.0)
    group_size = math.ceil(len(trials) / MOST_BARS)
    starts = np.arange(0, len(trials), group_size)
    sizes = np.diff(np.append(starts, len(trials)))
    bars = []
    for part, values in seconds.items():
        if not values.any():
            continue
        bars.append(
            go.Bar(
                x=trials["number"][starts],
                y=np.add.reduceat(values, starts) / sizes,
                width=group_size,
                offset=0,
                name=part,
                marker={"color": PART_COLOURS[part], "line": {"width": 0}},
                hovertemplate="%{y:.3g} s",
            )
        )
    x_title = "trial"
    if group_size > 1:
        x_title += f" (mean of {group_size})"
    return draw(
        [Panel(bars, y=Axis("time per trial (s)"), height=200)],
        x=Axis(x_title),
        theme=theme,
        view=f"times/{study.study}",
        barmode="stack",
        bargap=0,
        hovermode="x unified",
        showlegend=True,
    )
