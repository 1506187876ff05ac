"""Learning curves of ``lcsc train``, and samples of the model, from the same noise at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import dash
from dash import Input, Output, State, dcc, html, no_update
from flask import Response, abort, request
from optuna.storages import RDBStorage

from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.dashboard.pages import HOME
from lcsc_opt.views.figures.look import empty_figure
from lcsc_opt.views.trainings import (
    TrainingHistory,
    find_trainings,
    looked_in,
    read_sheet,
    read_training,
    training_figure,
)

CONTROLS = ("training",)
SHOWN = 12  # sheets, the newest ones
Found = Callable[[], dict[str, Path]]


def build(storage: RDBStorage) -> dash.Dash:
    """The page over the trainings in the folder of ``storage``."""
    folder = looked_in(str(storage.url))
    nothing = f"No training in {folder}: start one with lcsc train"

    def found() -> dict[str, Path]:
        return find_trainings(folder)

    app = parts.new_page(__name__, "Training")
    app.layout = _layout
    parts.remember(app, CONTROLS)
    parts.choose(app, CONTROLS, lambda asked: (_chosen(asked, found()),), lambda: list(found()))
    app.server.add_url_rule("/sheet", view_func=lambda: _sheet(found))

    @app.callback(
        Output("problem", "children"),
        Output("headline", "children"),
        parts.drawn(app, "curve"),
        Output("sheets", "children"),
        Output("tick", "interval"),
        Output("seen", "data"),
        Input("tick", "n_intervals"),
        Input("theme", "data"),
        Input("training", "value"),
        State("seen", "data"),
    )
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", nothing, empty_figure(nothing, theme), "", parts.RUNNING_MS, ""
        place = found().get(name)
        training = None if place is None else read_training(name, place)
        if training is None:
            gone = f"{name}: no such training; choose another one"
            return gone, "", empty_figure(gone, theme), "", parts.IDLE_MS, ""
        rhythm = parts.RUNNING_MS if training.running else parts.IDLE_MS
        now = repr((training, theme))
        if now == seen:
            return *[no_update] * 4, rhythm, no_update
        return "", training.headline, training_figure(training, theme), _sheets(training), rhythm, now

    return app


def _chosen(asked: Mapping[str, str], known: Mapping[str, Path]) -> str | None:
    """The training that the address asks for, else the newest."""
    return asked.get("training") or next(reversed(list(known)), None)


def _sheet(found: Found) -> Response:
    """Serve the samples of a step of a shown training, and no other file."""
    place, step = found().get(request.args.get("training", "")), request.args.get("step", "")
    content = read_sheet(place, int(step)) if place is not None and step.isdecimal() and len(step) <= 12 else None
    if content is None:
        abort(404)
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(content, mimetype="image/png", headers=headers)


def _layout() -> html.Main:
    return parts.page_layout(
        html.H1("Training"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Training", dcc.Dropdown(id="training", clearable=False))], className="controls"),
        parts.graph("curve", label="Loss against the training step"),
        parts.section("Samples", html.Div(id="sheets")),
    )


def _sheets(training: TrainingHistory) -> Any:
    if not training.sheets:
        return html.P("No samples yet: lcsc train --samples-every says how often they are written.")
    newest = [_pane(training.name, step) for step in reversed(training.sheets[-SHOWN:])]
    note = "Images at the same place come from the same noise, of the weights at that step, which are no average."
    return [html.Div(newest, className="panes"), html.P(note, className="note")]


def _pane(name: str, step: int) -> Any:
    address = f"{HOME}training/sheet?{urlencode({'training': name, 'step': step})}"
    described = f"step {step:,}"
    label = parts.labelled(f"samples of {described}; scrolls")
    picture = html.Div(html.Img(src=address, alt=described), className="pane", tabIndex=0, role="group", **label)
    return html.Figure([picture, html.Figcaption(html.A(described, href=address, target="_blank"))])
