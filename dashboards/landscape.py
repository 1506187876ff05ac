"""The loss on the plane through three models, and where the candidates of searches lie near it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import Input, Output, State, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import empty_figure, number
from lcsc_opt.views.landscape import Landscape, landscape_figure, landscape_names, read_landscape


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    reader = parts.shared_reader(storage)
    app = parts.new_page(__name__, "Landscape")
    app.layout = _layout
    parts.remember(app, ["landscape"])

    def chosen(asked: Mapping[str, str]) -> tuple[str | None]:
        near = landscape_names(reader, asked.get("experiment"))
        return (asked.get("landscape", near[-1] if near else None),)

    parts.choose(app, ["landscape"], chosen, lambda: landscape_names(reader))

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
            study = parts.chosen_study(reader, {}) or "experiment/optimizer/seed"
            nothing = f"No landscape in this database yet. Compute one: lcsc landscape {study}"
            return "", nothing, "", empty_figure(nothing, theme), parts.IDLE_MS, ""
        data = read_landscape(reader, name)
        studies = [data.study, *(study for study, *_ in data.searches)]
        now, rhythm = parts.signature(studies, theme), parts.rhythm(studies)
        if now == seen:
            return *[no_update] * 4, rhythm, no_update
        return "", _headline(data), _points(data), landscape_figure(data, theme=theme), rhythm, now

    return app


def _layout() -> html.Main:
    return parts.page_layout(
        html.H1("Landscape"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Landscape", dcc.Dropdown(id="landscape", clearable=False))], className="controls"),
        parts.graph("plane", label="The loss on the plane through three models, with candidates"),
        parts.section("Named points", html.Div(id="points")),
        html.P(
            "The plane and the searches are evaluated on the same noise, so the lowest values flatter themselves a "
            "little: lcsc evaluate measures a study's answer on held-out noise.",
            className="note",
        ),
    )


def _headline(data: Landscape) -> str:
    """The result of the plane, in one line."""
    name, lowest, finished, total = data.study.study, data.lowest, len(data.study.finished), len(data.planned)
    done = "" if finished >= total else f", after {finished:,} of {total:,} points"
    if lowest is None:
        return f"{name} has no value yet{done}. Continue it: lcsc resume {name}"
    place = f"({lowest['x']:.3g}, {lowest['y']:.3g})"
    return f"{name}: lowest {data.study.metric} on the plane {lowest['loss']:.4g} at {place}{done}"


def _points(data: Landscape) -> Any:
    rows = [
        [point["name"], f"{point['x']:.3g}", f"{point['y']:.3g}", number(point["loss"]), point["trial"]]
        for point in data.points
    ]
    return parts.table(("", "x", "y", data.study.metric, "trial"), rows)
