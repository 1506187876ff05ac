"""Landscapes: the loss on the plane through three models, with the candidates of searches (Liu et al., Fig. 3 and 6).

A candidate is shown at the nearest point of the plane: nearest in weights if the study has the inner products for that,
else in coefficients. It lies off the plane, so its own loss is not the plane's loss there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.plane import PLANE_ATTRIBUTE, Plane, corner_label, grid_axis, grid_positions
from lcsc_opt.database.history import Floats, StudyHistory, Trials
from lcsc_opt.database.names import BASELINES, is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha

MOST_CANDIDATES = 150  # of one study
_ON_GRID = 1e-9
_WIDE = 3.0  # the highest over the lowest loss, from which on colours are logarithmic
_TICKS = 6
_FARTHEST = 1.0  # how far beyond the grid an answer still widens the view, in units of the grid's side
_OUTLINE = {"width": 1.5, "color": "#FFFFFF"}


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidates:
    """Candidates of one search, at most about 150: ``positions [m, 2]`` on the plane of ``trials [m]``."""

    study: StudyHistory
    trials: Trials
    positions: Floats

    @property
    def answer(self) -> dict[str, Any] | None:
        """The study's answer as a row of :meth:`Landscape.points`."""
        for (x, y), trial in zip(self.positions.tolist(), self.trials, strict=True):
            if trial["number"] == self.study.chosen:
                return _point(f"{self.study.label}/{self.study.seed}, trial {trial['number']}", x, y, trial)
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane and the candidates near it.

    Attributes:
        study: ``experiment/Landscape/seed``; its trials are the corners, then the points of the grid.
        labels: of the three corners, which are at (0, 0), (1, 0) and (0, 1).
        axis: ``[n]`` values of x, and of y, on the grid.
        planned: ``[t, 2]``, the place of each trial, evaluated or not.
        values: ``[n, n]`` losses, a row for each y; NaN where there is none, or none yet.
        space: ``weights`` or ``coefficients``, the space in which candidates are projected.
        searches: of the same experiment and checkpoints.
    """

    study: StudyHistory
    labels: tuple[str, ...]
    axis: Floats
    planned: Floats
    values: Floats
    space: str
    searches: tuple[_Candidates, ...]

    @property
    def done(self) -> int:
        """How many points were evaluated or failed."""
        return len(self.study.finished)

    @property
    def lowest(self) -> dict[str, Any] | None:
        """The point with the lowest loss, as a row of :meth:`points`."""
        known = self.study.trials[~np.isnan(self.study.trials["loss"])]
        if not len(known):
            return None
        trial = known[known["loss"].argmin()]
        x, y = self.planned[trial["number"]].tolist()
        return _point("lowest on the plane", x, y, trial)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Name, x, y, loss and trial of the corners, the lowest point, and the answers of the searches."""
        trials = self.study.trials
        corners = [
            _point(label, x, y, trials[i] if i < len(trials) else None)
            for i, (label, (x, y)) in enumerate(zip(self.labels, self.planned[:3].tolist(), strict=True))
        ]
        others = [self.lowest, *(known.answer for known in self.searches)]
        return [*corners, *(point for point in others if point is not None)]

    @property
    def best_answer(self) -> dict[str, Any] | None:
        """The answer with the lowest loss on the search's noise; those of EMA grids do not count."""
        found = (known.answer for known in self.searches if known.study.optimizer not in BASELINES)
        return min((point for point in found if point is not None), key=lambda point: point["loss"], default=None)

    def as_row(self) -> dict[str, Any]:
        """JSON-able: what ``lcsc landscape --format json`` prints."""
        return {
            **{"study": self.study.study, "metric": self.study.metric, "space": self.space},
            **{"evaluated": self.done, "total": len(self.planned), "images": _images(self.study)},
            **{"points": self.points, "axis": self.axis.tolist()},
            "values": [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()],
        }


def landscape_names(reader: HistoryReader, experiment: str | None = None) -> list[str]:
    """The landscapes of the database, or of one experiment, in the order in which they were created."""
    landscapes = [name for name in reader.names() if not is_search(name)]
    return [name for name in landscapes if experiment in (None, split_name(name)[0])]


def landscape_studies(reader: HistoryReader, name: str) -> tuple[StudyHistory, list[StudyHistory]]:
    """A landscape, and the searches of its experiment over the same checkpoints.

    Raises:
        StudyStoreError: there is no such landscape.
    """
    if name not in landscape_names(reader):
        raise StudyStoreError(f"{name}: no such landscape; compute one: lcsc landscape experiment/optimizer/seed")
    experiment = split_name(name)[0]
    searches = [other for other in reader.searches() if split_name(other)[0] == experiment]
    own, *found = reader.read_studies([name, *searches])
    return own, [study for study in found if study.steps == own.steps and study.best is not None]


def read_landscape(reader: HistoryReader, name: str) -> Landscape:
    """A landscape and the searches of its experiment as they are now.

    Raises:
        StudyStoreError: there is no such landscape, or its plane cannot be read.
    """
    own, searches = landscape_studies(reader, name)
    attributes = StoredStudy.open(reader.storage, name).attributes
    try:
        options = attributes["specification"]["optimizer"]["options"]
        plane, grid = Plane.through(options["corners"], own.steps), (int(options["size"]), float(options["margin"]))
        labels = tuple(corner_label(corner) for corner in options["corners"])
        stored = (attributes.get(PLANE_ATTRIBUTE) or {}).get("products")
        products = None if stored is None else np.array(stored, dtype=np.float64).reshape(2, len(own.steps))
    except (KeyError, TypeError, ValueError) as error:  # a StudySpecError is a ValueError
        raise StudyStoreError(f"{name}: not a landscape of this version ({error}); delete it") from error
    axis, planned = grid_axis(*grid), grid_positions(*grid)
    values = np.full((len(axis), len(axis)), np.nan)
    nearest = np.abs(planned[:, :, None] - axis).argmin(axis=2)
    there = np.flatnonzero((np.abs(planned - axis[nearest]) <= _ON_GRID).all(axis=1))  # corners may be off the grid
    there = there[there < len(own.trials)]
    values[nearest[there, 1], nearest[there, 0]] = own.trials["loss"][there]
    near = tuple(_near(reader, plane, products, study) for study in searches)
    return Landscape(own, labels, axis, planned, values, "coefficients" if products is None else "weights", near)


def _near(reader: HistoryReader, plane: Plane, products: Floats | None, study: StudyHistory) -> _Candidates:
    complete = study.finished[~np.isnan(study.finished["loss"])]
    evenly = thinned(np.arange(len(complete)), MOST_CANDIDATES)
    trials = complete[np.union1d(evenly, np.flatnonzero(complete["number"] == study.chosen))]
    coefficients = reader.coefficients(study, trials["number"].tolist())
    return _Candidates(study, trials, plane.project(coefficients, products))


def _point(name: str, x: float, y: float, trial: Any) -> dict[str, Any]:
    loss = math.nan if trial is None else float(trial["loss"])
    number = None if trial is None else int(trial["number"])
    return {"name": name, "x": x, "y": y, "loss": None if math.isnan(loss) else loss, "trial": number}


def _images(study: StudyHistory) -> int:
    return int(study.trials["images"].max(initial=0))


def landscape_figure(data: Landscape, *, theme: Theme = "light") -> go.Figure:
    """The loss on the plane as contours; on it the corners, the candidates of searches, and their answers."""
    name = data.study.study
    if np.isnan(data.values).all():
        return empty_figure(f"{name}: no point of the plane is evaluated yet. Continue: lcsc resume", theme)
    made = figure(theme, name=f"landscape/{name}", title=_title(data), height=720)
    _add_contours(made, data)
    for known in data.searches:
        _add_candidates(made, known)
    corners = data.points[:3]
    made.add_scatter(
        x=[point["x"] for point in [*corners, corners[0]]],
        y=[point["y"] for point in [*corners, corners[0]]],
        mode="lines+markers+text",
        name="corners",
        text=[*(_with_loss(point) for point in corners), ""],
        textposition=["bottom right", "bottom right", "top right", "middle center"],
        line={"width": 1, "dash": "dot", "color": GREY},
        marker={"symbol": "square", "size": 10, "color": GREY, "line": _OUTLINE},
        hovertemplate="%{text}<extra></extra>",
    )
    low, high = _view(data)
    for point, height in ((data.lowest, 45), (data.best_answer, 150)):  # so that one does not cover the other
        if point is not None and low[0] <= point["x"] <= high[0] and low[1] <= point["y"] <= high[1]:
            ax, ay = (70 if point["x"] < 0.5 else -70), (-height if point["y"] < 0.5 else height)
            made.add_annotation(text=_with_loss(point), x=point["x"], y=point["y"], ax=ax, ay=ay, arrowhead=2)
    first, second, third = (inert(label) for label in data.labels)
    made.update_xaxes(title_text=f"x: from {first} (0) to {second} (1)", range=[low[0], high[0]], constrain="domain")
    made.update_yaxes(title_text=f"y: from {first} (0) to {third} (1)", range=[low[1], high[1]], constrain="domain")
    made.update_yaxes(scaleanchor="x").update_annotations(bgcolor="rgba(255,255,255,0.85)", font={"color": "#000000"})
    return made.update_layout(legend={"orientation": "h", "y": -0.12}, hovermode="closest", margin={"t": 110})


def _title(data: Landscape) -> str:
    """What is shown, and what a reader must know about it."""
    done = "" if data.done >= len(data.planned) else f": {data.done} of {len(data.planned)} points"
    notes = []
    if data.searches:
        notes.append(f"Candidates are where the plane is nearest in {data.space}; their own loss is another one.")
    if any(_images(known.study) != _images(data.study) for known in data.searches):
        notes.append(f"The plane is of {_images(data.study):,} images a point, the searches are not.")
    first = inert(f"{data.study.metric} on the plane through {', '.join(data.labels)}{done}")
    return "<br>".join([first, *(f"<sub>{note}</sub>" for note in notes)])


def _add_contours(made: go.Figure, data: Landscape) -> None:
    """Colours are how far a loss is above the lowest, in orders of magnitude where losses differ much."""
    lowest, highest = float(np.nanmin(data.values)), float(np.nanmax(data.values))
    wide = lowest > 0 and highest / lowest > _WIDE
    losses = (np.geomspace if wide else np.linspace)(lowest, highest, _TICKS)
    heights, ticks = (np.log10(x / lowest) if wide else x - lowest for x in (data.values, losses))
    metric = inert(data.study.metric)
    made.add_contour(
        x=data.axis,
        y=data.axis,
        z=heights,
        text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in data.values],
        zmin=0,
        zmax=max(float(ticks[-1]), 1e-12),
        colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
        connectgaps=True,
        ncontours=20,
        contours={"coloring": "heatmap"},
        line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
        name="plane",
        showlegend=False,
        colorbar={
            **{"title": {"text": metric}, "thickness": 12},
            **{"tickvals": ticks.tolist(), "ticktext": [f"{loss:.3g}" for loss in losses]},
        },
        hovertemplate="(%{x:.3g}, %{y:.3g}): " + metric.replace("%{", "% {") + " %{text}<extra></extra>",
    )


def _add_candidates(made: go.Figure, known: _Candidates) -> None:
    """A dot for each candidate, and a large mark for the answer."""
    drawn, label = style(known.study.optimizer), inert(known.study.label)
    name = inert(known.study.study)
    made.add_scatter(
        x=known.positions[:, 0],
        y=known.positions[:, 1],
        mode="markers",
        legendgroup=label,
        showlegend=False,
        marker={"symbol": drawn.marker, "size": 5, "color": with_alpha(drawn.colour, 0.55)},
        text=[f"{name}, trial {trial['number']}: {trial['loss']:.4g}" for trial in known.trials],
        hovertemplate="%{text}<extra></extra>",
    )
    if (answer := known.answer) is not None:
        made.add_scatter(
            x=[answer["x"]],
            y=[answer["y"]],
            mode="markers",
            name=label,
            legendgroup=label,
            showlegend=not any(trace.name == label for trace in made.data),
            text=[_with_loss(answer)],
            marker={"symbol": drawn.marker, "size": 15, "color": drawn.colour, "line": _OUTLINE},
            hovertemplate="%{text}<extra></extra>",
        )


def _with_loss(point: dict[str, Any]) -> str:
    return inert(point["name"] if point["loss"] is None else f"{point['name']}: {point['loss']:.4g}")


def _view(data: Landscape) -> tuple[Floats, Floats]:
    """The lowest and the highest x and y that are shown: the grid, and answers that are not far from it."""
    ends = np.array([[data.axis[0]] * 2, [data.axis[-1]] * 2])
    side = _FARTHEST * float(data.axis[-1] - data.axis[0])
    found = np.array([[point["x"], point["y"]] for point in data.points])
    near = found[((found >= ends[0] - side) & (found <= ends[1] + side)).all(axis=1)]
    shown = np.concatenate([ends, near])
    pad = 0.03 * float(np.ptp(shown, axis=0).max())
    return shown.min(axis=0) - pad, shown.max(axis=0) + pad
