"""The loss on the plane through three models, and where the trials of searches lie near it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash
from dash import dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.database.names import split_name
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.theme import empty_figure
from lcsc_opt.views.landscape import landscape_figure, landscapes

NOTHING = "No landscape in this database yet: lcsc run FILE 'optimizers=[Landscape]' --budget 441"


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    controls = [parts.field("Landscape", dcc.Dropdown(id="landscape", clearable=False))]
    page = parts.Page(__name__, "Landscape", "Landscape", storage, controls, _content())
    reader = page.reader

    def chosen(query: Mapping[str, str]) -> tuple[str | None]:
        """The landscape that the address asks for, else the newest one, of its experiment if that has one."""
        known = landscapes(reader)
        of_experiment = [name for name in known if split_name(name)[0] == query.get("experiment")]
        newest = next(reversed(of_experiment or known), None)
        return (query.get("landscape", newest),)

    page.choose(["landscape"], chosen, lambda: landscapes(reader))

    @page.refreshes(page.drawn("plane"), controls=["landscape"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, empty_figure(NOTHING, theme), parts.IDLE_MS, ""
        known = landscapes(reader)
        if name not in known:
            problem = f"{name}: no such landscape; choose another one"
            return problem, "", empty_figure(problem, theme), parts.IDLE_MS, ""
        study = reader.read_study(name)
        searches = [search for search in reader.read(study.experiment) if search.study not in known]
        signature = parts.signature([study, *searches], theme)
        interval = parts.refresh_interval([study, *searches])
        if signature == seen:
            return "", *[no_update] * 2, interval, no_update
        headline = f"{name}: {study.summary.evaluations} points"
        return "", headline, landscape_figure(reader, study, searches, theme=theme), interval, signature

    return page.app


def _content() -> list[Any]:
    return [
        parts.graph("plane", label="The loss on the plane through three models, with trials of searches"),
        html.P(
            "A trial is drawn at the point of the plane whose coefficients are nearest to its own; the plane's loss "
            "there is another. The large marks are the searches' answers. The lowest values are optimistically biased: "
            "compare models by the report, which is on held-out noise.",
            className="note",
        ),
    ]
