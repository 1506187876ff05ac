"""Landscapes: the loss on the plane through three models, with the candidates of searches (Liu et al., Fig. 3 and 6).

A candidate is shown at the nearest point of the plane. It lies off the plane, so its own loss is not the plane's there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, Plane, plane_grid
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.history import Floats, StudyHistory, Trials
from lcsc_opt.database.names import is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha

MOST_CANDIDATES = 150  # of one study
_TICKS = 6
_OUTLINE = {"width": 1.5, "color": "#FFFFFF"}


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane and the candidates near it.

    Attributes:
        study: ``experiment/Landscape/seed``.
        axis: ``[n]`` values of x, and of y, on the grid.
        total: how many points there are, evaluated or not.
        values: ``[n, n]`` losses, a row for each y; NaN where a point has none, or none yet.
        lowest: the point with the lowest loss, as one of the points; ``None`` before a point has one.
        points: name, x, y, loss and trial of the corners, of the lowest point, and of the searches' answers.
        searches: of the same experiment and checkpoints, each with at most about 150 of its trials ``[m]`` and their
            positions ``[m, 2]``.
    """

    study: StudyHistory
    axis: Floats
    total: int
    values: Floats
    lowest: dict[str, Any] | None
    points: list[dict[str, Any]]
    searches: tuple[tuple[StudyHistory, Trials, Floats], ...]

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
        plane, size = Plane.through(options.get("corners"), own.steps), options.get("size", DEFAULT_SIZE)
        axis, planned = plane_grid(size)
        products = array_of(attributes["plane"]["products"])
        trials = dict(zip(planned, own.trials, strict=False))
        losses = {place: float(trial["loss"]) for place, trial in trials.items()}
        values = np.array([[losses.get((x, y), math.nan) for x in axis.tolist()] for y in axis.tolist()])
        points = [_point(label, place, trials.get(place)) for label, place in zip(plane.labels, planned, strict=False)]
        known = [place for place, loss in losses.items() if not math.isnan(loss)]
        first = min(known, key=losses.__getitem__, default=None)
        lowest = None if first is None else _point("lowest on the plane", first, trials[first])
        points += [lowest] if lowest else []
        searches = []
        for study in others:
            if study.steps == own.steps and study.best is not None:
                complete = study.finished[~np.isnan(study.finished["loss"])]
                evenly = thinned(np.arange(len(complete)), MOST_CANDIDATES)
                shown = complete[np.union1d(evenly, np.flatnonzero(complete["number"] == study.chosen))]
                positions = plane.project(reader.coefficients(study, shown["number"].tolist()), products)
                searches.append((study, shown, positions))
                [answer] = np.flatnonzero(shown["number"] == study.chosen)
                label = f"{study.label}/{study.seed}, trial {study.chosen}"
                points.append(_point(label, positions[answer].tolist(), shown[answer]))
        return cls(own, axis, len(planned), values, lowest, points, tuple(searches))

    def as_row(self) -> dict[str, Any]:
        """JSON-able: what ``lcsc landscape --format json`` prints."""
        return {
            **{"study": self.study.study, "metric": self.study.metric},
            **{"evaluated": len(self.study.finished), "total": self.total},
            **{"points": self.points, "axis": self.axis.tolist()},
            "values": [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()],
        }

    def figure(self, *, theme: Theme = "light") -> go.Figure:
        """The loss on the plane as contours; on it the corners, the candidates of searches, and their answers."""
        name = self.study.study
        if np.isnan(self.values).all():
            return empty_figure(f"{name}: no point of the plane is evaluated yet. Continue: lcsc resume", theme)
        done, corners = len(self.study.finished), self.points[:3]
        first, second, third = (inert(point["name"]) for point in corners)
        title = f"{inert(self.study.metric)} on the plane through {first}, {second}, {third}"
        title += f": {done} of {self.total} points" if done < self.total else ""
        title += "<br><sub>Candidates are where the plane is nearest; their own loss is another one.</sub>"
        made = figure(theme, name=f"landscape/{name}", title=title, height=720)
        _add_contours(made, self)
        for search in self.searches:
            _add_candidates(made, *search)
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
        if self.lowest is not None:
            place = {"x": self.lowest["x"], "y": self.lowest["y"]}
            made.add_annotation(text=_with_loss(self.lowest), **place, ax=70, ay=-45, arrowhead=2)
        # the grid, and answers up to its side beyond it
        low, high = self.axis[0], self.axis[-1]
        side, places = high - low, np.array([[point["x"], point["y"]] for point in self.points])
        start = np.clip(places.min(axis=0), low - side, low) - 0.03 * side
        end = np.clip(places.max(axis=0), high, high + side) + 0.03 * side
        made.update_xaxes(title_text=f"x: from {first} (0) to {second} (1)", range=[start[0], end[0]])
        made.update_yaxes(title_text=f"y: from {first} (0) to {third} (1)", range=[start[1], end[1]], scaleanchor="x")
        made.update_xaxes(constrain="domain").update_yaxes(constrain="domain")
        made.update_annotations(bgcolor="rgba(255,255,255,0.85)", font={"color": "#000000"})
        return made.update_layout(legend={"orientation": "h", "y": -0.12}, hovermode="closest", margin={"t": 110})


def _point(name: str, place: Sequence[float], trial: Any) -> dict[str, Any]:
    loss = math.nan if trial is None else float(trial["loss"])
    number = None if trial is None else int(trial["number"])
    return {"name": name, "x": place[0], "y": place[1], "loss": None if math.isnan(loss) else loss, "trial": number}


def _add_contours(made: go.Figure, data: Landscape) -> None:
    """Colours are logarithms of the losses if all are above zero."""
    positive, metric = bool(np.nanmin(data.values) > 0), inert(data.study.metric)
    heights = np.log10(data.values) if positive else data.values
    ticks = np.linspace(np.nanmin(heights), np.nanmax(heights), _TICKS)
    made.add_contour(
        x=data.axis,
        y=data.axis,
        z=heights,
        text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in data.values],
        colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
        connectgaps=True,
        ncontours=20,
        contours={"coloring": "heatmap"},
        line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
        name="plane",
        showlegend=False,
        colorbar={
            **{"title": {"text": metric}, "thickness": 12, "tickvals": ticks.tolist()},
            "ticktext": [f"{loss:.3g}" for loss in (10**ticks if positive else ticks)],
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
