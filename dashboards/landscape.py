"""The loss on the plane through three models, and where the candidates of searches lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import Input, Output, State, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.dashboard.server import shared_reader
from lcsc_opt.views.figures.landscape import landscape_figure
from lcsc_opt.views.figures.look import empty_figure
from lcsc_opt.views.landscape import Landscape, LandscapeReader

STUDY = "experiment/optimizer/seed"  # shown if the database holds no study to name


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    reader = shared_reader(storage)
    landscapes = LandscapeReader(reader)
    app = parts.new_page(__name__, "Landscape")
    app.layout = _layout
    parts.remember(app, ["landscape"])

    def chosen(asked: Mapping[str, str]) -> tuple[str | None]:
        near = landscapes.names(asked.get("experiment"))
        return (asked.get("landscape", near[-1] if near else None),)

    parts.choose(app, ["landscape"], chosen, landscapes.names)

    @app.callback(
        *(Output(name, "children") for name in ("problem", "headline", "points")),
        parts.drawn(app, "plane"),
        Output("tick", "interval"),
        Output("seen", "data"),
        Input("tick", "n_intervals"),
        Input("theme", "data"),
        Input("landscape", "value"),
        State("seen", "data"),
    )
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            nothing = missing(parts.chosen_study(reader, {}))
            return "", nothing, "", empty_figure(nothing, theme), parts.IDLE_MS, ""
        data = landscapes.read(name)
        rhythm = parts.RUNNING_MS if data.running else parts.IDLE_MS
        now = repr((name, theme, data.signature))
        if now == seen:
            return *[no_update] * 4, rhythm, no_update
        return "", headline(data), _points(data), landscape_figure(data, theme=theme), rhythm, now

    return app


def _layout() -> html.Main:
    return parts.page_layout(
        html.H1("Landscape"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Landscape", dcc.Dropdown(id="landscape", clearable=False))], className="controls"),
        parts.graph("plane", label="The loss on the plane through three models, with candidates"),
        parts.section("Named points", html.Div(id="points")),
        html.P(
            "A point (x, y) is the model that x and y lead to from the first corner. The plane and the searches are "
            "evaluated on the same noise, so the lowest values flatter themselves a little: lcsc evaluate measures a "
            "study's answer on held-out noise.",
            className="note",
        ),
    )


def missing(study: str | None) -> str:
    """A line that says which command makes a landscape."""
    return f"No landscape in this database yet. Compute one: lcsc landscape {study or STUDY}"


def headline(data: Landscape) -> str:
    """The result of the plane, in one line."""
    done = "" if data.done >= data.total else f", after {data.done:,} of {data.total:,} points"
    if data.best is None:
        return f"{data.study} has no value yet{done}. Continue it: lcsc resume {data.study}"
    corners = [point.loss for point in data.corners if point.loss is not None]
    against = f", the best corner has {min(corners):.4g}" if corners else ""
    lowest = f"lowest {data.metric} on the plane {data.best.loss:.4g} at ({data.best.x:.3g}, {data.best.y:.3g})"
    found = data.found
    best = "" if found is None or found.answer is None else f"; {found.label} found {found.answer.loss:.4g}"
    edge = "; it is on the edge of the grid, a larger --margin may show lower ones" if data.at_edge else ""
    return f"{data.study}: {lowest}{against}{edge}{best}{done}"


def _points(data: Landscape) -> Any:
    rows = [
        [label, f"{point.x:.3g}", f"{point.y:.3g}", parts.number(point.loss), point.trial]
        for label, point in data.named_points()
    ]
    return parts.table(("", "x", "y", data.metric, "trial"), rows)
