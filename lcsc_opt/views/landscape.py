"""Landscapes: the loss on the plane through three models, with the trials of searches (Liu et al. 2024, Fig. 3, 6)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.layer_groups import mean_of_rows
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, Plane, plane_grid
from lcsc_opt.database.history import Floats, Standing
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import count, number
from lcsc_opt.views.curves import thinned
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import GREY, Theme, empty_figure, inert, style, with_alpha

MOST_TRIALS = 150  # of one search
_COLOUR_TICKS = 6
CAPTION = (
    "A trial is drawn at the point of the plane whose coefficients are nearest to its own; the plane's loss there is "
    "another. The large marks are the searches' answers. A double click shows trials beyond the plane."
)


def landscapes(reader: HistoryReader, experiment: str | None = None) -> list[str]:
    """The names of all landscapes, or of one experiment's, in the order in which they were created."""
    names = [name for name in reader.names() if not is_ranked(name)]
    return [name for name in names if experiment in (None, split_name(name)[0])]


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane, and the searches of its experiment.

    Attributes:
        study: ``experiment/Landscape/seed``.
        searches: those of the same checkpoints that have a result.
        plane: through the corners.
        axis: ``[n]`` values of x, and of y.
        values: ``[n, n]`` losses, or maximized scores, a row for each y; NaN where a point has none, or none yet.
    """

    study: Standing
    searches: Sequence[Standing]
    plane: Plane
    axis: Floats
    values: Floats

    @classmethod
    def read(cls, reader: HistoryReader, name: str) -> Landscape:
        """A landscape as it is now.

        Raises:
            StudyStoreError: there is no such landscape.
        """
        if name not in landscapes(reader):
            raise StudyStoreError(f"{name}: no such landscape; compute one: lcsc run FILE --optimizer Landscape")
        study = reader.read_study(name)
        of_experiment = [search for search in reader.searches() if split_name(search)[0] == study.experiment]
        searches = [search for search in reader.read_studies(of_experiment) if search.steps == study.steps]
        options = study.settings["optimizer"]["options"]
        axis, points = plane_grid(options.get("size", DEFAULT_SIZE))
        # the last points may not be asked for yet
        loss_at = dict(zip(points, reader.trials(study)["loss"], strict=False))
        losses = [[loss_at.get((x, y), math.nan) for x in axis.tolist()] for y in axis.tolist()]
        return cls(
            study=study,
            searches=[search for search in searches if search.best is not None],
            plane=Plane.through(options.get("corners"), study.steps),
            axis=axis,
            values=study.sign * np.array(losses),
        )

    @property
    def headline(self) -> str:
        """Its best point, in one line."""
        name = self.study.study
        progress = f"{count(self.study.evaluations, self.values.size)} points"
        if np.isnan(self.values).all():
            return f"{name} has no value yet: {progress}. Continue it: lcsc run {name}"
        extreme = "lowest" if self.study.sign > 0 else "highest"
        row, column = np.unravel_index(np.nanargmin(self.study.sign * self.values), self.values.shape)
        place = f"({self.axis[column]:.3g}, {self.axis[row]:.3g})"
        return f"{name}: {extreme} {self.study.metric} {number(self.values[row, column])} at {place}, {progress}"

    def figure(self, reader: HistoryReader, *, theme: Theme = "light") -> go.Figure:
        """The loss on the plane as contours; on it the corners, and the trials of searches."""
        if np.isnan(self.values).all():
            return empty_figure(self.headline, theme)
        _, second, third = map(inert, self.plane.labels)
        ends = [self.axis[0], self.axis[-1]]
        traces = [self._contours(), *(self._trials(reader, search) for search in self.searches), self._corners()]
        y_options = {"range": ends, "scaleanchor": "x", "constrain": "domain"}
        return draw(
            [Panel(traces, y=Axis(f"y: to {third}", options=y_options), height=540)],
            x=Axis(f"x: to {second}", options={"range": ends, "constrain": "domain"}),
            theme=theme,
            view=f"landscape/{self.study.study}",
            legend={"orientation": "h", "y": -0.12},
            hovermode="closest",
        )

    def _contours(self) -> go.Contour:
        """The plane; colours are logarithms of the losses if all are above zero."""
        heights = self.values
        is_logarithmic = bool(np.nanmin(heights) > 0)
        if is_logarithmic:
            heights = np.log10(heights)
        ticks = np.linspace(np.nanmin(heights), np.nanmax(heights), _COLOUR_TICKS)
        tick_losses = 10**ticks if is_logarithmic else ticks
        metric = inert(self.study.metric)
        return go.Contour(
            x=self.axis,
            y=self.axis,
            z=heights,
            text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in self.values],
            colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
            connectgaps=True,
            ncontours=20,
            contours={"coloring": "heatmap"},
            line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
            colorbar={
                "title": {"text": metric},
                "thickness": 12,
                "tickvals": ticks,
                "ticktext": [f"{loss:.3g}" for loss in tick_losses],
            },
            hovertemplate="(%{x:.3g}, %{y:.3g}): %{text}<extra></extra>",
        )

    def _trials(self, reader: HistoryReader, search: Standing) -> go.Scatter:
        """Some trials of a search, chosen evenly, and its answer as a large mark."""
        trials = reader.trials(search)
        trials = trials[~np.isnan(trials["loss"])]
        is_answer = trials["number"] == search.chosen
        shown = np.union1d(thinned(np.arange(len(trials)), MOST_TRIALS), np.flatnonzero(is_answer))
        trials = trials[shown]
        is_answer = is_answer[shown]
        coefficients = reader.coefficients(search, trials["number"].tolist())
        positions = self.plane.project(np.stack([mean_of_rows(each) for each in coefficients]))
        look = style(search.optimizer)
        study_name = inert(search.study)
        return go.Scatter(
            x=positions[:, 0],
            y=positions[:, 1],
            mode="markers",
            name=inert(f"{search.label}/{search.seed}"),
            marker={
                "symbol": look.marker,
                "size": np.where(is_answer, 15, 5),
                "opacity": np.where(is_answer, 1.0, 0.55),
                "color": look.colour,
            },
            text=[f"{study_name}, trial {trial['number']}: {search.sign * trial['loss']:.4g}" for trial in trials],
            hovertemplate="%{text}<extra></extra>",
        )

    def _corners(self) -> go.Scatter:
        """The three models, joined; the first is the origin."""
        return go.Scatter(
            x=[0, 1, 0, 0],
            y=[0, 0, 1, 0],
            mode="lines+markers+text",
            name="corners",
            text=[*map(inert, self.plane.labels), ""],
            textposition=["bottom right", "bottom right", "top right", "middle center"],
            line={"width": 1, "dash": "dot", "color": GREY},
            marker={"symbol": "square", "size": 10, "color": GREY},
            hoverinfo="text",
        )
