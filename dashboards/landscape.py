"""The loss on the plane through three models, and where the candidates of searches lie near it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import Output, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.views import number
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.theme import empty_figure
from lcsc_opt.views.landscape import CAPTION, Landscape


def is_empty(storage: RDBStorage) -> bool:
    """Whether no landscape is in the database."""
    return not Landscape.names(parts.shared_reader(storage))


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Landscape", storage, _content())
    reader = page.reader

    def chosen(query: Mapping[str, str]) -> tuple[str | None]:
        """The landscape that the address asks for, else the newest one of its experiment, if it names one."""
        names = Landscape.names(reader, query.get("experiment"))
        newest = next(reversed(names), None)
        return (query.get("landscape", newest),)

    page.choose(["landscape"], chosen, lambda: Landscape.names(reader))

    @page.refreshes(Output("points", "children"), page.drawn("plane"), controls=["landscape"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            study = page.chosen_study({}) or "FILE"
            nothing = f"No landscape in this database yet. Compute one: lcsc run {study} --optimizer Landscape"
            if Landscape.names(reader):
                nothing = "Choose a landscape."
            return "", nothing, "", empty_figure(nothing, theme), parts.IDLE_MS, ""
        landscape = Landscape.read(reader, name)
        studies = [landscape.study, *(search.study for search in landscape.searches)]
        signature = parts.signature(studies, theme)
        interval = parts.refresh_interval(studies)
        if signature == seen:
            return *[no_update] * 4, interval, no_update
        figure = landscape.figure(theme=theme)
        return "", _headline(landscape), _points(landscape), figure, interval, signature

    return page.app


def _content() -> list[Any]:
    return [
        html.H1("Landscape"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Landscape", dcc.Dropdown(id="landscape", clearable=False))], className="controls"),
        parts.graph("plane", label="The loss on the plane through three models, with candidates"),
        parts.section("Named points", html.Div(id="points")),
        html.P(CAPTION, className="note"),
        html.P(
            "The plane and the searches are evaluated on the same noise, so the lowest values are optimistically "
            "biased: compare models by the report, which is on held-out noise.",
            className="note",
        ),
    ]


def _headline(landscape: Landscape) -> str:
    """The result of the plane, in one line."""
    name = landscape.study.study
    evaluated = landscape.study.evaluations
    progress = ""
    if evaluated < landscape.total:
        progress = f", after {evaluated:,} of {landscape.total:,} points"
    best = landscape.best
    if best is None:
        return f"{name} has no value yet{progress}. Continue it: lcsc run {name}"
    extreme = best.name.removesuffix(" on the plane")
    place = f"({best.x:.3g}, {best.y:.3g})"
    return f"{name}: {extreme} {landscape.study.metric} on the plane {best.loss:.4g} at {place}{progress}"


def _points(landscape: Landscape) -> Any:
    rows = [
        [point.name, f"{point.x:.3g}", f"{point.y:.3g}", number(point.loss), point.trial]
        for point in landscape.named_points
    ]
    return parts.table(("", "x", "y", landscape.study.metric, "trial"), rows)
