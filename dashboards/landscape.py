"""The loss on the plane through three models, and where the trials of searches lie near it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.theme import empty_figure
from lcsc_opt.views.landscape import CAPTION, Landscape, landscapes


def is_empty(storage: RDBStorage) -> bool:
    """Whether no landscape is in the database."""
    return not landscapes(parts.shared_reader(storage))


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Landscape", storage, _content())
    reader = page.reader

    def chosen(query: Mapping[str, str]) -> tuple[str | None]:
        """The landscape that the address asks for, else the newest one of its experiment, if it names one."""
        newest = next(reversed(landscapes(reader, query.get("experiment"))), None)
        return (query.get("landscape", newest),)

    page.choose(["landscape"], chosen, lambda: landscapes(reader))

    @page.refreshes(page.drawn("plane"), controls=["landscape"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            study = page.chosen_study({}) or "FILE"
            nothing = f"No landscape in this database yet. Compute one: lcsc run {study} --optimizer Landscape"
            return "", nothing, empty_figure(nothing, theme), parts.IDLE_MS, ""
        landscape = Landscape.read(reader, name)
        studies = [landscape.study, *landscape.searches]
        signature = parts.signature(studies, theme)
        interval = parts.refresh_interval(studies)
        if signature == seen:
            return *[no_update] * 3, interval, no_update
        return "", landscape.headline, landscape.figure(reader, theme=theme), interval, signature

    return page.app


def _content() -> list[Any]:
    return [
        html.H1("Landscape"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Landscape", dcc.Dropdown(id="landscape", clearable=False))], className="controls"),
        parts.graph("plane", label="The loss on the plane through three models, with trials of searches"),
        html.P(CAPTION, className="note"),
        html.P(
            "The plane and the searches are evaluated on the same noise, so the lowest values are optimistically "
            "biased: compare models by the report, which is on held-out noise.",
            className="note",
        ),
    ]
