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
from lcsc_opt.coefficients.plane import PLANE_ATTRIBUTE, Plane, plane_grid
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.history import Floats, StudyHistory, Trials
from lcsc_opt.database.names import is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha

MOST_CANDIDATES = 150  # of one study
_ON_GRID = 1e-9
_TICKS = 6
_OUTLINE = {"width": 1.5, "color": "#FFFFFF"}


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane and the candidates near it.

    Attributes:
        study: ``experiment/Landscape/seed``; its trials are the corners, then the points of the grid.
        labels: of the three corners, which are at (0, 0), (1, 0) and (0, 1).
        axis: ``[n]`` values of x, and of y, on the grid.
        planned: ``[t, 2]``, the place of each trial, evaluated or not.
        values: ``[n, n]`` losses, a row for each y; NaN where a point has none, or none yet.
        space: ``weights`` or ``coefficients``, the space in which candidates are projected.
        searches: of the same experiment and checkpoints, each with at most about 150 of its trials ``[m]`` and their
            positions ``[m, 2]``.
    """

    study: StudyHistory
    labels: tuple[str, ...]
    axis: Floats
    planned: Floats
    values: Floats
    space: str
    searches: tuple[tuple[StudyHistory, Trials, Floats], ...]

    @property
    def lowest(self) -> dict[str, Any] | None:
        """The point with the lowest loss, as a row of :attr:`points`."""
        known = self.study.trials[~np.isnan(self.study.trials["loss"])]
        if not len(known):
            return None
        trial = known[known["loss"].argmin()]
        return _point("lowest on the plane", self.planned[trial["number"]], trial)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Name, x, y, loss and trial of the corners, the lowest point, and the answers of the searches."""
        trials = [*self.study.trials[:3], None, None, None]
        corners = [_point(label, self.planned[i], trials[i]) for i, label in enumerate(self.labels)]
        answers = [
            _point(f"{study.label}/{study.seed}, trial {study.chosen}", positions[place], study_trials[place])
            for study, study_trials, positions in self.searches
            for place in np.flatnonzero(study_trials["number"] == study.chosen)
        ]
        return [*corners, *filter(None, [self.lowest]), *answers]

    @staticmethod
    def names(reader: HistoryReader, experiment: str | None = None) -> list[str]:
        """The landscapes of the database, or of one experiment, in the order in which they were created."""
        landscapes = [name for name in reader.names() if not is_search(name)]
        return [name for name in landscapes if experiment in (None, split_name(name)[0])]

    @classmethod
    def read(cls, reader: HistoryReader, name: str) -> Landscape:
        """A landscape and the searches of its experiment over the same checkpoints, as they are now.

        Raises:
            StudyStoreError: there is no such landscape.
        """
        if name not in cls.names(reader):
            raise StudyStoreError(f"{name}: no such landscape; compute one: lcsc landscape experiment/optimizer/seed")
        siblings = [other for other in reader.searches() if split_name(other)[0] == split_name(name)[0]]
        own, *others = reader.read_studies([name, *siblings])
        attributes = StoredStudy.open(reader.storage, name).attributes
        options = attributes["specification"]["optimizer"]["options"]
        plane, grid = Plane.through(options["corners"], own.steps), (int(options["size"]), float(options["margin"]))
        stored = attributes[PLANE_ATTRIBUTE]["products"]
        products = None if stored is None else array_of(stored)
        axis, planned = plane_grid(*grid)
        values = np.full((len(axis), len(axis)), np.nan)
        nearest = np.abs(planned[:, :, None] - axis).argmin(axis=2)
        there = np.flatnonzero((np.abs(planned - axis[nearest]) <= _ON_GRID).all(axis=1))  # corners may be off the grid
        there = there[there < len(own.trials)]
        values[nearest[there, 1], nearest[there, 0]] = own.trials["loss"][there]
        searches = []
        for study in others:
            if study.steps == own.steps and study.best is not None:
                complete = study.finished[~np.isnan(study.finished["loss"])]
                evenly = thinned(np.arange(len(complete)), MOST_CANDIDATES)
                trials = complete[np.union1d(evenly, np.flatnonzero(complete["number"] == study.chosen))]
                coefficients = reader.coefficients(study, trials["number"].tolist())
                searches.append((study, trials, plane.project(coefficients, products)))
        labels = tuple(Plane.label(corner) for corner in options["corners"])
        space = "coefficients" if products is None else "weights"
        return cls(own, labels, axis, planned, values, space, tuple(searches))

    def as_row(self) -> dict[str, Any]:
        """JSON-able: what ``lcsc landscape --format json`` prints."""
        return {
            **{"study": self.study.study, "metric": self.study.metric, "space": self.space},
            **{"evaluated": len(self.study.finished), "total": len(self.planned), "images": _images(self.study)},
            **{"points": self.points, "axis": self.axis.tolist()},
            "values": [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()],
        }

    def figure(self, *, theme: Theme = "light") -> go.Figure:
        """The loss on the plane as contours; on it the corners, the candidates of searches, and their answers."""
        name = self.study.study
        if np.isnan(self.values).all():
            return empty_figure(f"{name}: no point of the plane is evaluated yet. Continue: lcsc resume", theme)
        made = figure(theme, name=f"landscape/{name}", title=_title(self), height=720)
        _add_contours(made, self)
        for search in self.searches:
            _add_candidates(made, *search)
        corners = self.points[:3]
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
        if (lowest := self.lowest) is not None:
            made.add_annotation(text=_with_loss(lowest), x=lowest["x"], y=lowest["y"], ax=70, ay=-45, arrowhead=2)
        # the grid, and answers up to its side beyond it
        low, high = self.axis[0], self.axis[-1]
        side, places = high - low, np.array([[point["x"], point["y"]] for point in self.points])
        start = np.clip(places.min(axis=0), low - side, low) - 0.03 * side
        end = np.clip(places.max(axis=0), high, high + side) + 0.03 * side
        first, second, third = (inert(label) for label in self.labels)
        made.update_xaxes(title_text=f"x: from {first} (0) to {second} (1)", range=[start[0], end[0]])
        made.update_yaxes(title_text=f"y: from {first} (0) to {third} (1)", range=[start[1], end[1]], scaleanchor="x")
        made.update_xaxes(constrain="domain").update_yaxes(constrain="domain")
        made.update_annotations(bgcolor="rgba(255,255,255,0.85)", font={"color": "#000000"})
        return made.update_layout(legend={"orientation": "h", "y": -0.12}, hovermode="closest", margin={"t": 110})


def _point(name: str, position: Floats, trial: Any) -> dict[str, Any]:
    x, y = position.tolist()
    loss = math.nan if trial is None else float(trial["loss"])
    number = None if trial is None else int(trial["number"])
    return {"name": name, "x": x, "y": y, "loss": None if math.isnan(loss) else loss, "trial": number}


def _images(study: StudyHistory) -> int:
    return int(study.trials["images"].max(initial=0))


def _title(data: Landscape) -> str:
    """What is shown, and what a reader must know about it."""
    done, total, images = len(data.study.finished), len(data.planned), _images(data.study)
    first = f"{data.study.metric} on the plane through {', '.join(data.labels)}"
    lines = [inert(first if done >= total else f"{first}: {done} of {total} points")]
    if data.searches:
        where = f"Candidates are where the plane is nearest in {data.space}; their own loss is another one."
        lines.append(f"<sub>{where}</sub>")
    if any(_images(study) != images for study, *_ in data.searches):
        lines.append(f"<sub>The plane is of {images:,} images a point, the searches are not.</sub>")
    return "<br>".join(lines)


def _add_contours(made: go.Figure, data: Landscape) -> None:
    """Colours are how far a loss is above the lowest, in orders of magnitude if all are above zero."""
    lowest, highest = float(np.nanmin(data.values)), float(np.nanmax(data.values))
    positive = lowest > 0
    losses = (np.geomspace if positive else np.linspace)(lowest, highest, _TICKS)
    heights, ticks = (np.log10(x / lowest) if positive else x - lowest for x in (data.values, losses))
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
            **{"title": {"text": metric}, "thickness": 12, "tickvals": ticks.tolist()},
            "ticktext": [f"{loss:.3g}" for loss in losses],
        },
        hovertemplate="(%{x:.3g}, %{y:.3g}): " + metric.replace("%{", "% {") + " %{text}<extra></extra>",
    )


def _add_candidates(made: go.Figure, study: StudyHistory, trials: Trials, positions: Floats) -> None:
    """A dot for each candidate, and a large mark for the answer."""
    drawn, label, name = style(study.optimizer), inert(study.label), inert(study.study)
    answers = (trials["number"] == study.chosen).tolist()
    made.add_scatter(
        x=positions[:, 0],
        y=positions[:, 1],
        mode="markers",
        name=label,
        legendgroup=label,
        showlegend=not any(trace.name == label for trace in made.data),
        marker={
            "symbol": drawn.marker,
            "size": [15 if answer else 5 for answer in answers],
            "color": [with_alpha(drawn.colour, 1.0 if answer else 0.55) for answer in answers],
            "line": {**_OUTLINE, "width": [1.5 if answer else 0 for answer in answers]},
        },
        text=[f"{name}, trial {trial['number']}: {trial['loss']:.4g}" for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


def _with_loss(point: dict[str, Any]) -> str:
    return inert(point["name"] if point["loss"] is None else f"{point['name']}: {point['loss']:.4g}")
