"""The loss on the plane through three models, and where the candidates of searches lie near it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import Output, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.views import number
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import empty_figure
from lcsc_opt.views.landscape import Landscape


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Landscape", storage, _content())
    reader = page.reader

    def chosen(asked: Mapping[str, str]) -> tuple[str | None]:
        near = Landscape.names(reader, asked.get("experiment"))
        return (asked.get("landscape", near[-1] if near else None),)

    page.choose(["landscape"], chosen, lambda: Landscape.names(reader))

    @page.refreshes(Output("points", "children"), page.drawn("plane"), controls=["landscape"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            study = page.chosen_study({}) or "experiment/optimizer/seed"
            nothing = f"No landscape in this database yet. Compute one: lcsc landscape {study}"
            return "", nothing, "", empty_figure(nothing, theme), parts.IDLE_MS, ""
        data = Landscape.read(reader, name)
        shown = [data.study, *(search.study for search in data.searches)]
        now, interval = parts.signature(shown, theme), parts.refresh_interval(shown)
        if now == seen:
            return *[no_update] * 4, interval, no_update
        return "", _headline(data), _points(data), data.figure(theme=theme), interval, now

    return page.app


def _content() -> list[Any]:
    return [
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
    ]


def _headline(data: Landscape) -> str:
    """The result of the plane, in one line."""
    name, lowest, finished, total = data.study.study, data.lowest, len(data.study.finished), data.total
    done = "" if finished >= total else f", after {finished:,} of {total:,} points"
    if lowest is None:
        return f"{name} has no value yet{done}. Continue it: lcsc resume {name}"
    place = f"({lowest.x:.3g}, {lowest.y:.3g})"
    return f"{name}: lowest {data.study.metric} on the plane {lowest.loss:.4g} at {place}{done}"


def _points(data: Landscape) -> Any:
    rows = [[point.name, f"{point.x:.3g}", f"{point.y:.3g}", number(point.loss), point.trial] for point in data.points]
    return parts.table(("", "x", "y", data.study.metric, "trial"), rows)
