"""The figures of one study, and of the answers of several, drawn from their histories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.history import PARTS, Floats, StudyHistory, best_ema
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import comparison_figure, improvements, thinned
from lcsc_opt.views.figures.look import GREY, PART_COLOURS, Theme, empty_figure, figure, inert, style, template
from lcsc_opt.views.study_status import seconds_outside

_NO_RESULT = "No complete trial yet. Continue the search: lcsc resume"
_STEP_TITLE = "training step of the checkpoint"
_COEFFICIENT = "step %{x:,}: %{customdata:.4g}"
_WAY = re.compile(  # through a network, by the first of these words in the name of a layer
    r"(?:^|[._])(?:(?P<first>conv_in|input(?!_block)|embed|time|map|[a-z]_embed)|(?P<second>down|input_block|enc)"
    r"|(?P<middle>mid|block|layer)|(?P<fourth>up|output_block|dec)|(?P<last>out|final|head))"
)
_BARS, _MEANS = 240, 150  # pixels: panels of bars, alone and over a heat map
_ROW, _LEAST, _MOST = 13, 120, 780  # pixels: a row of a heat map with its label, and all of them
_MOST_NUMBERS = 12  # studies up to which distances are written into their cells
MOST_IMPROVEMENTS = 60  # rows of the heatmap
_MOST_BARS = 120  # in a figure of trials
_IRREGULAR = 1.01  # densities are drawn if the longest interval between checkpoints over the shortest exceeds this
_OTHER = "other"


def own_figures(
    reader: HistoryReader,
    study: StudyHistory,
    studies: Sequence[StudyHistory],
    wanted: Collection[str],
    *,
    theme: Theme = "light",
) -> dict[str, go.Figure]:
    """What is drawn of one study of these studies of an experiment.

    The ``wanted`` are of ``best_so_far``, ``coefficients``, ``movement``, ``times``.
    """
    ema = best_ema(studies)
    both = [study] if ema is None or ema.study == study.study else [study, ema]
    draw: dict[str, Callable[[], go.Figure]] = {
        "best_so_far": lambda: comparison_figure(both, theme=theme),
        "coefficients": lambda: coefficients_figure(reader, [study], ema, theme=theme),
        "movement": lambda: _movement_figure(reader, study, theme),
        "times": lambda: _times_figure(study, theme),
    }
    return {name: draw[name]() for name in draw if name in wanted}


def coefficients_figure(
    reader: HistoryReader, studies: Sequence[StudyHistory], ema: StudyHistory | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """The answers' coefficients over training steps, with EMA*'s (Liu et al. 2024, Fig. 5, 7); seeds: Fig. 8.

    A panel for each answer. A bar covers the training that its checkpoint stands for. Where checkpoints are not equally
    far apart its height is per training step, so that its area is the coefficient. With a row of coefficients for each
    layer group, bars are their mean, and a heat map under them has the rows, in the order of the way through the
    network where names tell it.
    """
    found = [(study, answer) for study in studies if (answer := reader.answer(study)) is not None]
    if not found:
        return empty_figure(_NO_RESULT, theme)
    against = None if ema is None else reader.answer(ema)
    titles, panels = list[str](), list[int]()
    for study, coefficients in found:
        titles.append(_heading(study, coefficients))
        panels.append(_BARS if coefficients.ndim == 1 else _MEANS)
        if coefficients.ndim > 1:
            titles.append("")
            panels.append(min(max(_ROW * len(coefficients), _LEAST), _MOST))
    height = 180 + sum(panels)
    spacing = (50 if any(titles[1:]) else 25) / height
    how: dict[str, Any] = {"row_heights": panels, "subplot_titles": titles, "vertical_spacing": spacing}
    made = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, **how)
    row = 0
    for study, rows in found:
        row, coefficients = row + 1, rows.reshape(-1, len(study.steps)).mean(axis=0)
        heights, per_step = _as_heights(coefficients, np.array(study.steps, dtype=np.float64))
        intervals = np.diff(study.steps, prepend=2 * study.steps[0] - study.steps[1])
        made.add_bar(
            x=study.steps,
            y=heights,
            width=intervals,
            offset=-intervals,
            name=inert(f"{study.label}/{study.seed}"),
            customdata=coefficients,
            marker={"color": style(study.optimizer).colour, "line": {"width": 0}},
            hovertemplate=_COEFFICIENT,
            row=row,
            col=1,
        )
        if ema is not None and against is not None and ema.study != study.study:
            made.add_scatter(
                **{"x": ema.steps, "y": _as_heights(against, np.array(ema.steps, dtype=np.float64))[0]},
                **{"mode": "lines", "line": {"color": GREY, "width": 2, "shape": "vh"}},
                **{"name": "EMA*", "legendgroup": "EMA*", "showlegend": row == 1},
                **{"customdata": against, "hovertemplate": _COEFFICIENT, "row": row, "col": 1},
            )
        title = "mean " * (rows.ndim > 1) + "coefficient" + ("<br>" if rows.ndim > 1 else " ") * per_step
        made.update_yaxes(title_text=title + "per training step" * per_step, matches="y", row=row, col=1)
        if rows.ndim > 1:
            row, order = row + 1, sorted(range(len(rows)), key=lambda group: _place(study.layer_groups[group]))
            heights, per_step = _as_heights(rows[order], np.array(study.steps, dtype=np.float64))
            bar: dict[str, Any] = {"title": {"text": "per step" if per_step else "coefficient"}, "lenmode": "pixels"}
            bar |= {"len": min(panels[row - 1], _BARS), "yanchor": "top", "y": made.layout[f"yaxis{row}"].domain[1]}
            names = [inert(study.layer_groups[group]) for group in order]
            made.add_trace(_heat_map(heights, study.steps, names, **bar), row=row, col=1)
            made.update_yaxes(type="category", autorange="reversed", tickfont={"size": 9}, ticklen=2, row=row, col=1)
    made.update_annotations(font_size=13, x=0, xanchor="left", align="left")
    made.update_xaxes(tickformat="~s").update_xaxes(title_text=_STEP_TITLE, row=len(panels), col=1)
    name = inert(f"coefficients/{found[0][0].study}/{len(found)}")
    made.update_layout(template=template(theme), uirevision=name, barmode="overlay", bargap=0)
    return made.update_layout(height=height, showlegend=against is not None)


def _heat_map(
    coefficients: Floats, steps: Sequence[int], names: Sequence[str], *, prefix: str = "", **bar: Any
) -> go.Heatmap:
    """A row of cells for each row of ``[n, K]``, whose ``names`` [n] stand behind ``prefix`` under the pointer.

    ``bar`` is of the scale of colours.
    """
    largest = float(np.quantile(np.abs(coefficients), 0.995)) or float(np.abs(coefficients).max()) or 1.0
    return go.Heatmap(
        x=[2 * steps[0] - steps[1], *steps],  # the edges of cells, which are where those of bars are
        y=names,
        z=coefficients.astype(np.float32),
        zmin=-largest,
        zmax=largest,
        autocolorscale=True,
        colorbar={"title": {"text": "coefficient"}, "thickness": 12, **bar},
        customdata=np.broadcast_to(np.array(steps, dtype=np.int32), coefficients.shape),
        hovertemplate=prefix + "%{y}, step %{customdata:,}: %{z:.4g}<extra></extra>",
    )


def _place(name: str) -> int:
    """Where a layer is on the way through the network, as far as its name tells: 0 at its beginning, 4 at its end."""
    found = _WAY.search(name)
    return 2 if found is None else int(found.lastgroup is not None and list(_WAY.groupindex).index(found.lastgroup))


def _heading(study: StudyHistory, coefficients: Floats) -> str:
    loss, kind = study.held_out_loss, "held out"
    if loss is None:
        loss, kind = study.searched, "searched"
    shape = f"Σ|a| = {sum_abs(coefficients):.2f}, {effective_count(coefficients):.0f} checkpoints matter"
    shown = shape if loss is None else f"{loss:.4g} {kind}, {shape}"
    groups = f", mean of {len(coefficients)} layer groups" * (coefficients.ndim > 1)
    return f"{inert(f'{study.study}, trial {study.chosen}{groups}')}<br>{inert(shown)}"


def _as_heights(coefficients: Floats, steps: Floats) -> tuple[Floats, bool]:
    """``[K]``, the heights of bars, and whether they are per training step.

    A checkpoint stands for the steps since the checkpoint before it. If these intervals differ, each coefficient is
    divided by its interval. The first checkpoint has no such interval; its coefficient is divided by the next one.
    """
    intervals = np.diff(steps)
    if len(intervals) == 0 or intervals.max() <= _IRREGULAR * intervals.min():
        return coefficients, False
    return coefficients / np.concatenate([intervals[:1], intervals]), True


def _movement_figure(reader: HistoryReader, study: StudyHistory, theme: Theme) -> go.Figure:
    """The best coefficients at each improvement, first above last: where weight came from and went to.

    Of many improvements some are chosen evenly.
    """
    finished = study.compared
    improved = finished["number"][improvements(finished["loss"])]
    if not len(improved):
        return empty_figure(_NO_RESULT, theme)
    shown = thinned(improved, MOST_IMPROVEMENTS).tolist()
    found = reader.coefficients(study, shown)
    rows = found.reshape(len(shown), -1, len(study.steps)).mean(axis=1)
    title = f"{len(shown)} of {len(improved)} improvements" if len(improved) > len(shown) else ""
    made = figure(theme, name=f"movement/{study.study}", title=title)
    made.add_trace(_heat_map(rows, study.steps, [str(number) for number in shown], prefix="trial "))
    made.update_yaxes(title_text="trial", type="category", autorange="reversed", nticks=12)
    return made.update_xaxes(title_text=_STEP_TITLE, tickformat="~s")


def _times_figure(study: StudyHistory, theme: Theme) -> go.Figure:
    """Seconds a trial, stacked by part, over the search: means over groups of consecutive trials, where there are many.

    ``other`` is the optimizer, the database, waiting, and parts without a name.
    """
    trials = study.trials[np.isin(study.trials["number"], study.finished["number"])]
    if not len(trials):
        return empty_figure("No trial has ended yet. Continue the search: lcsc resume", theme, height=220)
    columns = {part.removesuffix("_seconds"): trials[part].astype(np.float64) for part in PARTS}
    unnamed = np.maximum(trials["seconds"] - np.sum(list(columns.values()), axis=0), 0.0)
    columns[_OTHER] = unnamed + seconds_outside(study, trials)
    width = math.ceil(len(trials) / _MOST_BARS)
    starts = np.arange(0, len(trials), width)
    sizes = np.diff(np.append(starts, len(trials)))
    made = figure(theme, name=f"times/{study.study}", barmode="stack", bargap=0, height=340)
    for part, values in columns.items():
        if part == _OTHER or values.any():
            made.add_bar(
                x=trials["number"][starts],
                y=np.add.reduceat(values, starts) / sizes,
                width=width,
                offset=0,
                name="other: optimizer, database, waiting" if part == _OTHER else part,
                marker={"color": PART_COLOURS[part], "line": {"width": 0}},
                hovertemplate="%{y:.3g} s",
            )
    made.update_layout(hovermode="x unified", showlegend=True)
    made.update_xaxes(title_text="trial" + (f" (mean of {width})" if width > 1 else ""))
    return made.update_yaxes(title_text="time per trial (s)")


def distances_figure(reader: HistoryReader, studies: Sequence[StudyHistory], *, theme: Theme = "light") -> go.Figure:
    """The L2 norms of the differences between the answers' coefficients, of the studies with the first one's steps.

    With a row of coefficients for each layer group, the root mean square over rows.
    """
    optimizers = list(dict.fromkeys(study.optimizer for study in studies))
    ordered = sorted(studies, key=lambda study: optimizers.index(study.optimizer))
    answers = [(study, answer) for study in ordered if (answer := reader.answer(study)) is not None]
    answers = [(study, answer) for study, answer in answers if study.steps == answers[0][0].steps]
    groups = next((study.layer_groups for study, answer in answers if answer.ndim > 1), ())
    answers = [(study, answer) for study, answer in answers if answer.ndim == 1 or study.layer_groups == groups]
    if len(answers) < 2:
        return empty_figure("One answer has no distance. Search with another seed: lcsc run STUDY_FILE --seed 1", theme)
    shape = (len(groups) or 1, len(answers[0][0].steps))
    found = np.stack([np.broadcast_to(answer, shape) for _, answer in answers])
    squares = np.square(found[:, None] - found[None]).sum(axis=-1)
    labels = [inert(f"{study.label}/{study.seed}") for study, _ in answers]
    made = figure(theme, name="distances", height=200 + min(28 * len(labels), 500))
    made.add_heatmap(
        x=list(range(len(labels))),
        y=list(range(len(labels))),
        z=np.sqrt(squares.mean(axis=-1)),
        autocolorscale=True,
        texttemplate="%{z:.2f}" if len(labels) <= _MOST_NUMBERS else None,
        customdata=[[f"{one} to {other}" for other in labels] for one in labels],
        colorbar={"title": {"text": "distance"}, "thickness": 12},
        hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
    )
    ticks = {"tickvals": list(range(len(labels))), "ticktext": labels}
    return made.update_xaxes(**ticks).update_yaxes(autorange="reversed", **ticks)
