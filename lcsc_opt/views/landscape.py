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
from lcsc_opt.database.history import Floats, Standing, Trials
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views import number
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import GREY, Theme, empty_figure, inert, style, with_alpha

MOST_CANDIDATES = 150  # of one study
_COLOUR_TICKS = 6
_OUTLINE = {"width": 1.5, "color": "#FFFFFF"}
CAPTION = "Candidates are drawn at the nearest point of the plane, whose loss differs from theirs."


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the plane, or a candidate at the point of the plane that is nearest to it.

    Attributes:
        name: its label.
        x: the coordinate from the first corner, 0, to the second, 1.
        y: the coordinate from the first corner, 0, to the third, 1.
        loss: the loss of the point or of the candidate, or the score that is maximized; ``None`` if its evaluation
            failed or has not ended.
        trial: the number of its trial; ``None`` if it was not evaluated.
    """

    name: str
    x: float
    y: float
    loss: float | None
    trial: int | None

    @classmethod
    def of_trial(cls, name: str, position: Sequence[float], trial: Any, study: Standing) -> Point:
        """The point of a trial of a study, a row of :data:`TRIAL` or ``None``."""
        x, y = position
        if trial is None:
            return cls(name, x, y, None, None)
        return cls(name, x, y, study.shown(_known(float(trial["loss"]))), int(trial["number"]))

    @property
    def text(self) -> str:
        """The name with the loss, as plotly shows it."""
        return inert(f"{self.name}: {number(self.loss)}")


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectedSearch:
    """A search, with its trials at the nearest points of the plane.

    Attributes:
        study: the search.
        trials: ``[m]``, some of its trials, among them its answer.
        positions: ``[m, 2]``, the nearest point of the plane to each trial.
    """

    study: Standing
    trials: Trials
    positions: Floats

    @classmethod
    def of(
        cls,
        reader: HistoryReader,
        study: Standing,
        plane: Plane,
        products: Floats,
    ) -> ProjectedSearch:
        """At most about 150 complete trials of a search, chosen evenly.

        Args:
            reader: the reader of the study.
            study: the search; it has a complete trial.
            plane: the plane of the landscape.
            products: scalar products of the plane's directions with the checkpoints, see :meth:`Plane.project`.
        """
        all_trials = reader.trials(study)
        complete = all_trials[~np.isnan(all_trials["loss"])]
        evenly = thinned(np.arange(len(complete)), MOST_CANDIDATES)
        answer = np.flatnonzero(complete["number"] == study.chosen)
        trials = complete[np.union1d(evenly, answer)]
        coefficients = reader.coefficients(study, trials["number"].tolist())
        return cls(study, trials, plane.project(coefficients, products))

    @property
    def answer(self) -> Point:
        """The search's answer."""
        [index] = np.flatnonzero(self.trials["number"] == self.study.chosen)
        name = f"{self.study.label}/{self.study.seed}, trial {self.study.chosen}"
        return Point.of_trial(name, self.positions[index].tolist(), self.trials[index], self.study)


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane and the candidates near it.

    Attributes:
        study: ``experiment/Landscape/seed``.
        axis: ``[n]`` values of x, and of y, on the grid.
        total: how many points there are, evaluated or not.
        values: ``[n, n]`` losses, or maximized scores, a row for each y; NaN where a point has none, or none yet.
        corners: the three models.
        best: the point with the lowest loss, or the highest score; ``None`` before a point has one.
        searches: the searches of the same experiment and checkpoints.
    """

    study: Standing
    axis: Floats
    total: int
    values: Floats
    corners: tuple[Point, ...]
    best: Point | None
    searches: tuple[ProjectedSearch, ...]

    @staticmethod
    def names(reader: HistoryReader, experiment: str | None = None) -> list[str]:
        """The landscapes of the database, or of one experiment, in the order in which they were created."""
        landscapes = [name for name in reader.names() if not is_ranked(name)]
        return [name for name in landscapes if experiment in (None, split_name(name)[0])]

    @classmethod
    def read(cls, reader: HistoryReader, name: str) -> Landscape:
        """A landscape and the searches of its experiment over the same checkpoints, as they are now.

        Raises:
            StudyStoreError: there is no such landscape.
        """
        if name not in cls.names(reader):
            raise StudyStoreError(f"{name}: no such landscape; compute one: lcsc run FILE --optimizer Landscape")
        experiment = split_name(name)[0]
        searches = [search for search in reader.searches() if split_name(search)[0] == experiment]
        landscape = reader.read_study(name)
        attributes = StoredStudy.open(reader.storage, name).attributes
        options = attributes["specification"]["optimizer"]["options"]
        plane = Plane.through(options.get("corners"), landscape.steps)
        products = array_of(attributes["plane"]["products"])
        axis, planned = plane_grid(options.get("size", DEFAULT_SIZE))
        # the last points may not be asked for yet
        trial_at = dict(zip(planned, reader.trials(landscape), strict=False))
        loss_at = {position: landscape.sign * float(trial["loss"]) for position, trial in trial_at.items()}
        evaluated = [position for position, loss in loss_at.items() if not math.isnan(loss)]
        best = None
        if evaluated:
            position = min(evaluated, key=lambda place: landscape.sign * loss_at[place])
            name = "lowest on the plane" if landscape.sign > 0 else "highest on the plane"
            best = Point.of_trial(name, position, trial_at[position], landscape)
        values = np.full((len(axis), len(axis)), math.nan)
        for row, y in enumerate(axis.tolist()):
            for column, x in enumerate(axis.tolist()):
                values[row, column] = loss_at.get((x, y), math.nan)
        corners = []
        for label, position in zip(plane.labels, planned, strict=False):  # the corners are planned first
            corners.append(Point.of_trial(label, position, trial_at.get(position), landscape))
        comparable = [
            study
            for study in reader.read_studies(searches)
            if study.steps == landscape.steps and study.best is not None
        ]
        return cls(
            study=landscape,
            axis=axis,
            total=len(planned),
            values=values,
            corners=tuple(corners),
            best=best,
            searches=tuple(ProjectedSearch.of(reader, study, plane, products) for study in comparable),
        )

    @property
    def named_points(self) -> list[Point]:
        """The corners, the best point, and the searches' answers."""
        points = list(self.corners)
        if self.best is not None:
            points.append(self.best)
        return points + [search.answer for search in self.searches]

    def figure(self, *, theme: Theme = "light") -> go.Figure:
        """The loss on the plane as contours; on it the corners, the candidates of searches, and their answers."""
        name = self.study.study
        if np.isnan(self.values).all():
            return empty_figure(f"{name}: no point of the plane has been evaluated yet. Continue: lcsc run", theme)
        _, second, third = (inert(corner.name) for corner in self.corners)
        title = ""
        evaluated = self.study.evaluations
        if evaluated < self.total:
            title = f"{evaluated} of {self.total} points"
        (left, right), (bottom, top) = self._ranges()
        marks = [_corners(self.corners)]
        if self.best is not None:
            marks.append(_best(self.best))
        panel = Panel(
            [_contours(self), *_candidates(self.searches), *marks],
            y=Axis(
                f"y: to {third}",
                options={"range": [bottom, top], "scaleanchor": "x", "constrain": "domain"},
            ),
            height=540,
        )
        return draw(
            [panel],
            x=Axis(f"x: to {second}", options={"range": [left, right], "constrain": "domain"}),
            theme=theme,
            view=f"landscape/{name}",
            title=title,
            legend={"orientation": "h", "y": -0.12},
            hovermode="closest",
        )

    def _ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of x and y: the grid, and answers up to its side beyond it."""
        low = self.axis[0]
        high = self.axis[-1]
        side = high - low
        places = np.array([[point.x, point.y] for point in self.named_points])
        start = np.clip(places.min(axis=0), low - side, low) - 0.03 * side
        end = np.clip(places.max(axis=0), high, high + side) + 0.03 * side
        return (start[0], end[0]), (start[1], end[1])


def _known(loss: float) -> float | None:
    """The loss; ``None`` where it is NaN, which JSON does not have."""
    if math.isnan(loss):
        return None
    return loss


def _contours(landscape: Landscape) -> go.Contour:
    """The plane; colours are logarithms of the losses if all are above zero."""
    values = landscape.values
    metric = inert(landscape.study.metric)
    is_logarithmic = bool(np.nanmin(values) > 0)
    heights = np.log10(values) if is_logarithmic else values
    ticks = np.linspace(np.nanmin(heights), np.nanmax(heights), _COLOUR_TICKS)
    tick_losses = 10**ticks if is_logarithmic else ticks
    return go.Contour(
        x=landscape.axis,
        y=landscape.axis,
        z=heights,
        text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in values],
        colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
        connectgaps=True,
        ncontours=20,
        contours={"coloring": "heatmap"},
        line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
        name="plane",
        showlegend=False,
        colorbar={
            "title": {"text": metric},
            "thickness": 12,
            "tickvals": ticks.tolist(),
            "ticktext": [f"{loss:.3g}" for loss in tick_losses],
        },
        # a name must not be read as a part of the template
        hovertemplate="(%{x:.3g}, %{y:.3g}): " + metric.replace("%{", "% {") + " %{text}<extra></extra>",
    )


def _candidates(searches: Sequence[ProjectedSearch]) -> list[go.Scatter]:
    """A dot for each candidate, and a large mark for the answer."""
    traces: list[go.Scatter] = []
    in_legend = set[str]()
    for search in searches:
        look = style(search.study.optimizer)
        label = inert(search.study.label)
        study_name = inert(search.study.study)
        sign = search.study.sign
        is_answer = search.trials["number"] == search.study.chosen
        colours = np.where(is_answer, with_alpha(look.colour, 1.0), with_alpha(look.colour, 0.55))
        traces.append(
            go.Scatter(
                x=search.positions[:, 0],
                y=search.positions[:, 1],
                mode="markers",
                name=label,
                legendgroup=label,
                showlegend=label not in in_legend,
                marker={
                    "symbol": look.marker,
                    "size": np.where(is_answer, 15, 5),
                    "color": colours.tolist(),
                    "line": {**_OUTLINE, "width": np.where(is_answer, 1.5, 0)},
                },
                text=[f"{study_name}, trial {trial['number']}: {sign * trial['loss']:.4g}" for trial in search.trials],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        in_legend.add(label)
    return traces


def _corners(corners: Sequence[Point]) -> go.Scatter:
    """The three models, joined; the first is the origin."""
    first = corners[0]
    texts = [corner.text for corner in corners]
    return go.Scatter(
        x=[*(corner.x for corner in corners), first.x],
        y=[*(corner.y for corner in corners), first.y],
        mode="lines+markers+text",
        name="corners",
        text=[*(inert(corner.name) for corner in corners), ""],
        hovertext=[*texts, texts[0]],
        textposition=["bottom right", "bottom right", "top right", "middle center"],
        line={"width": 1, "dash": "dot", "color": GREY},
        marker={"symbol": "square", "size": 10, "color": GREY, "line": _OUTLINE},
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _best(best: Point) -> go.Scatter:
    """The best point of the plane."""
    return go.Scatter(
        x=[best.x],
        y=[best.y],
        mode="markers",
        name=inert(best.name),
        marker={"symbol": "x", "size": 11, "color": GREY, "line": _OUTLINE},
        hovertext=[best.text],
        hovertemplate="%{hovertext}<extra></extra>",
    )
