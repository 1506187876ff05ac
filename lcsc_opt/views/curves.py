"""The best loss so far against its cost, over the seeds of each optimizer: data and figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from lcsc_opt.database.history import Floats, StudyHistory, Trials, best_ema
from lcsc_opt.database.names import label
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha

AXES = {
    "evaluations": "evaluations",
    "images": "images sampled",
    "model_calls": "model calls",
    "seconds": "wall-clock time (s)",
    "evaluation_seconds": "evaluation time, all workers together (s)",
}
"""What a search spends. ``seconds`` count while it runs, not between two runs of it."""

_NUMBER = "%{y:.4g}"
_FEW = 10  # evaluations
MOST_POINTS = 1000  # of one curve; about the width of a screen in pixels
LEAST_PAUSE = 30.0  # seconds without an evaluation that may be an interruption


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """A step function that only falls: ``values [m]`` from ``positions [m]`` on; known up to ``end``."""

    positions: Floats
    values: Floats
    end: float

    def at(self, positions: Floats) -> Floats:
        """``[n]`` values, NaN before the first step."""
        known = np.concatenate([[np.nan], self.values])
        return np.asarray(known[np.searchsorted(self.positions, positions, side="right")])

    def first_below(self, target: float) -> float | None:
        """Where the value is at most ``target`` for the first time."""
        reached = np.flatnonzero(self.values <= target)
        return float(self.positions[reached[0]]) if len(reached) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Curve:
    """One line of a comparison: the finished seeds of an optimizer, or one seed that is still searching.

    Attributes:
        optimizer: its name.
        seeds: the seeds that it is the mean of.
        finished: whether these searches are over.
        positions: ``[n]``, what was spent.
        mean: ``[n]``, the mean over the seeds of the best loss so far; a seed that has ended keeps its best.
        lowest: ``[n]``, the lowest of the seeds.
        highest: ``[n]``, the highest of the seeds.
        held_out: (what was spent at the end, held-out loss) for each seed that has one.
    """

    optimizer: str
    seeds: tuple[int, ...]
    finished: bool
    positions: Floats
    mean: Floats
    lowest: Floats
    highest: Floats
    held_out: tuple[tuple[float, float], ...]

    @property
    def label(self) -> str:
        """The name of the curve in legends."""
        if not self.finished:
            return f"{label(self.optimizer)}, seed {self.seeds[0]}, unfinished"
        return label(self.optimizer) + (f" ({len(self.seeds)} seeds)" if len(self.seeds) > 1 else "")


def default_axis(studies: Sequence[StudyHistory]) -> str:
    """Images, if any were sampled, else evaluations: optimizers may ask for different numbers of images."""
    return "images" if any(study.trials["images"].any() for study in studies) else "evaluations"


def curves(studies: Sequence[StudyHistory], axis: str) -> list[_Curve]:
    """The curves of an experiment over one of :data:`AXES`; optimizers in the order in which they were created."""
    grouped: dict[str, list[StudyHistory]] = {}
    for study in studies:
        if study.best is not None:
            key = study.optimizer if study.ended else study.study  # unique: only names of studies have slashes
            grouped.setdefault(key, []).append(study)
    return [_curve(group, axis) for group in grouped.values()]


def comparison_figure(
    studies: Sequence[StudyHistory],
    axis: str | None = None,
    *,
    log_x: bool = False,
    log_y: bool = True,
    theme: Theme = "light",
) -> go.Figure:
    """Best so far of each optimizer: mean and range over its seeds, EMA* as a line, held-out losses as marks.

    All but the marks are losses on the search's noise. ``axis`` is one of :data:`AXES`, or else the
    :func:`default_axis`. The loss is linear where one is not positive.
    """
    axis = axis or default_axis(studies)
    drawn = curves(studies, axis)
    experiment = studies[0].experiment if studies else "this experiment"
    if not drawn:
        return empty_figure(f"No result yet in {experiment}. Start a search: lcsc run STUDY_FILE", theme)
    ema = None if (grid := best_ema(studies)) is None else grid.searched
    lowest = [*(float(one.lowest.min()) for one in drawn), *(value for one in drawn for _, value in one.held_out)]
    log_y = log_y and min(lowest) > 0 and (ema is None or ema > 0)
    made = figure(theme, name=f"comparison/{experiment}/{axis}/{log_x}/{log_y}", hovermode="x unified")
    for one in drawn:
        if len(one.seeds) > 1:
            shared = {
                **{"x": one.positions, "mode": "lines", "legendgroup": inert(one.optimizer), "showlegend": False},
                **{"hoverinfo": "skip", "line": {"width": 0, "shape": "hv"}},
            }
            colour = with_alpha(style(one.optimizer).colour, 0.18)
            made.add_scatter(y=one.lowest, **shared)
            made.add_scatter(y=one.highest, fill="tonexty", fillcolor=colour, **shared)
    for one in drawn:
        _add_line(made, one)
    if ema is not None:
        made.add_hline(y=ema, line={"color": GREY, "dash": "dash", "width": 1})
        place = {"x": 1, "xref": "paper", "y": math.log10(ema) if log_y else ema, "xanchor": "right"}
        made.add_annotation(text="EMA*", **place, yanchor="bottom", showarrow=False, font={"color": GREY})
    made.update_xaxes(title_text=AXES[axis], type="log" if log_x else "linear", tickformat="~s")
    if axis == "evaluations" and not log_x and max(one.positions[-1] for one in drawn) < _FEW:
        made.update_xaxes(dtick=1)  # no ticks between whole numbers
    metric = next((study.metric for study in studies if study.best is not None and study.metric != "loss"), "loss")
    made.update_yaxes(title_text=f"best {inert(metric)} so far<br>(marks: held out)")
    return made.update_yaxes(type="log" if log_y else "linear", tickformat="~g")


def _curve(studies: Sequence[StudyHistory], axis: str) -> _Curve:
    """Best so far of one optimizer; each study has a complete trial, and all are finished, or there is only one."""
    steps = [best_so_far(study, axis) for study in studies]
    start = max(step.positions[0] for step in steps)
    ends = [step.end for step in steps]
    positions = np.unique(np.concatenate([*(step.positions for step in steps), ends]))
    positions = thinned(positions[positions >= start])
    values = np.stack([step.at(positions) for step in steps])
    measured = zip(ends, (study.held_out_loss for study in studies), strict=True)
    return _Curve(
        optimizer=studies[0].optimizer,
        seeds=tuple(study.seed for study in studies),
        finished=all(study.ended for study in studies),
        positions=positions,
        mean=values.mean(axis=0),
        lowest=values.min(axis=0),
        highest=values.max(axis=0),
        held_out=tuple((end, loss) for end, loss in measured if loss is not None),
    )


def best_so_far(study: StudyHistory, axis: str) -> _Steps:
    """The points at which a study's best loss fell. Their cost includes trials whose losses do not compare."""
    trials = study.compared
    if axis == "evaluations":
        positions = np.arange(1, len(trials) + 1, dtype=np.float64)
    elif axis != "seconds":
        positions = np.cumsum(trials["seconds" if axis == "evaluation_seconds" else axis], dtype=np.float64)
    else:  # with several workers, only seconds are not in the order of tells
        positions = wall_clock(trials)
        order = np.argsort(positions, kind="stable")
        trials, positions = trials[order], positions[order]
    improved = improvements(trials["loss"])
    end = float(positions[-1]) if len(positions) else 0.0
    return _Steps(positions[improved], trials["loss"][improved], end)


def improvements(losses: Floats) -> npt.NDArray[np.intp]:
    """The indices at which a loss is lower than all before it; NaN is not."""
    before = np.fmin.accumulate(np.concatenate([[np.inf], losses]))[:-1]
    return np.flatnonzero(losses < before)


def wall_clock(trials: Trials) -> Floats:
    """``[n]`` seconds for which the search had run when each trial ended.

    A short pause between evaluations counts: it is the time of the optimizer and the database. A pause longer than
    three evaluations and than ``LEAST_PAUSE`` does not count: then the search was interrupted. A trial that was
    interrupted and evaluated again counts with its last evaluation only.
    """
    if not len(trials):
        return np.zeros(0)
    ended = np.where(np.isnan(trials["ended"]), np.nanmax(trials["ended"], initial=0.0), trials["ended"])
    began = np.fmax(trials["started"], ended - trials["seconds"])
    order = np.argsort(began, kind="stable")
    busy_until = np.maximum.accumulate(ended[order])
    pause = max(LEAST_PAUSE, 3 * float(np.median(trials["seconds"])))
    idle = began[order][1:] - busy_until[:-1]
    left_out = np.concatenate([[0.0], np.cumsum(np.where(idle > pause, idle, 0.0))])
    block = np.empty(len(trials), dtype=np.int64)
    block[order] = np.arange(len(trials))
    return np.asarray(ended - began[order[0]] - left_out[block])


def thinned(positions: npt.NDArray[Any], most: int = MOST_POINTS) -> npt.NDArray[Any]:
    """At most ``most`` of the positions, chosen evenly, with the first and the last."""
    if len(positions) <= most:
        return positions
    return np.asarray(positions[np.linspace(0, len(positions) - 1, most).round().astype(np.intp)])


def _add_line(made: go.Figure, one: _Curve) -> None:
    drawn = style(one.optimizer)
    width = 2.5 if one.finished else 1.2
    made.add_scatter(
        x=one.positions,
        y=one.mean,
        mode="lines" if len(one.positions) > 1 else "lines+markers",  # a line of one point is not seen
        name=inert(one.label),
        legendgroup=inert(one.optimizer),
        line={"color": drawn.colour, "dash": drawn.dash, "width": width, "shape": "hv"},
        hovertemplate=_NUMBER,
    )
    if not one.held_out:
        return
    made.add_scatter(
        x=[end for end, _ in one.held_out],
        y=[value for _, value in one.held_out],
        mode="markers",
        name=f"{inert(one.label)}, held out",
        legendgroup=inert(one.optimizer),
        showlegend=False,
        cliponaxis=False,
        marker={"symbol": drawn.marker, "size": 10, "color": drawn.colour, "line": {"width": 1, "color": "#FFFFFF"}},
        hovertemplate=_NUMBER,
    )
