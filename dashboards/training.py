"""Learning curves of ``lcsc train``, and samples of the model, from the same noise at every step."""

from __future__ import annotations

from typing import Any

import dash
from dash import Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.views.artifacts import artifact_directory
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import empty_figure
from lcsc_opt.views.trainings import TrainingHistory

SHOWN = 12  # sheets, the newest ones
NOTE = "Images at the same place come from the same noise, of the weights at that step, which are no average."


def build(storage: RDBStorage) -> dash.Dash:
    """The page over the trainings in the folder of the database, else of the working directory."""
    folder = artifact_directory(str(storage.url)).parent.absolute()
    nothing = f"No training in {folder}: start one with lcsc train"
    page = parts.Page(__name__, "Training", storage, _content())

    def newest() -> str | None:
        return next(reversed(list(TrainingHistory.find(folder))), None)

    page.choose(
        ["training"], lambda asked: (asked.get("training") or newest(),), lambda: list(TrainingHistory.find(folder))
    )

    def sheet() -> Response:
        """Serve the samples of a step of a shown training, and no other file."""
        found, step = TrainingHistory.find(folder).get(request.args.get("training", "")), request.args.get("step", "")
        content = None if found is None or not step.isdecimal() or len(step) > 12 else found.sheet(int(step))
        return parts.image_response(content)

    page.app.server.add_url_rule("/sheet", view_func=sheet)

    @page.refreshes(page.drawn("curve"), Output("sheets", "children"), controls=["training"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", nothing, empty_figure(nothing, theme), "", parts.RUNNING_MS, ""
        training = TrainingHistory.find(folder).get(name)
        if training is None:
            gone = f"{name}: no such training; choose another one"
            return gone, "", empty_figure(gone, theme), "", parts.IDLE_MS, ""
        interval = parts.RUNNING_MS if training.running else parts.IDLE_MS
        now = repr((training, theme))
        if now == seen:
            return *[no_update] * 4, interval, no_update
        return "", training.headline, training.figure(theme), _sheets(training), interval, now

    return page.app


def _content() -> list[Any]:
    return [
        html.H1("Training"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div([parts.field("Training", dcc.Dropdown(id="training", clearable=False))], className="controls"),
        parts.graph("curve", label="Loss against the training step"),
        parts.section("Samples", html.Div(id="sheets")),
    ]


def _sheets(training: TrainingHistory) -> Any:
    if not training.sheets:
        return html.P("No samples yet: lcsc train --samples-every says how often they are written.")
    newest = reversed(training.sheets[-SHOWN:])
    images = [("training/sheet", {"training": training.name, "step": step}, f"step {step:,}") for step in newest]
    return parts.panes(images, NOTE)
