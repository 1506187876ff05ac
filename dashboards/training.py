"""Learning curves of ``lcsc train``, and samples of the model, from the same noise at every step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dash
from dash import Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.views.artifacts import artifact_directory
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.theme import empty_figure
from lcsc_opt.views.trainings import TrainingHistory

MOST_SHEETS = 12  # the newest ones
LONGEST_STEP = 12  # digits
NOTE = "Images at the same place come from the same noise. They are of the weights at that step, not of an average."


def is_empty(storage: RDBStorage) -> bool:
    """Whether no training is in the folder."""
    return not TrainingHistory.find(_folder(storage))


def _folder(storage: RDBStorage) -> Path:
    """That of the database, else the working directory."""
    return artifact_directory(str(storage.url)).parent.absolute()


def build(storage: RDBStorage) -> dash.Dash:
    """The page over the trainings in the folder of the database, else of the working directory."""
    folder = _folder(storage)
    nothing = f"No training in {folder}: start one with lcsc train"
    page = parts.Page(__name__, "Training", storage, _content())

    def names() -> list[str]:
        return list(TrainingHistory.find(folder))

    def chosen(query: Mapping[str, str]) -> tuple[str | None]:
        """The training that the address asks for, else the newest one."""
        newest = next(reversed(names()), None)
        return (query.get("training") or newest,)

    page.choose(["training"], chosen, names)

    def sheet() -> Response:
        """Serve the samples of a step of a shown training, and no other file."""
        training = TrainingHistory.find(folder).get(request.args.get("training", ""))
        step = request.args.get("step", "")
        if training is None or not step.isdecimal() or len(step) > LONGEST_STEP:
            return parts.image_response(None)
        return parts.image_response(training.sheet(int(step)))

    page.app.server.add_url_rule("/sheet", view_func=sheet)

    @page.refreshes(page.drawn("curve"), Output("sheets", "children"), controls=["training"])
    def draw(_: int, theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", nothing, empty_figure(nothing, theme), "", parts.RUNNING_MS, ""
        training = TrainingHistory.find(folder).get(name)
        if training is None:
            problem = f"{name}: no such training; choose another one"
            return problem, "", empty_figure(problem, theme), "", parts.IDLE_MS, ""
        interval = parts.RUNNING_MS if training.running else parts.IDLE_MS
        signature = repr((training, theme))
        if signature == seen:
            return *[no_update] * 4, interval, no_update
        return "", training.headline, training.figure(theme), _sheets(training), interval, signature

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
    images: list[parts.ServedImage] = [
        ("training/sheet", {"training": training.name, "step": step}, f"step {step:,}")
        for step in reversed(training.sheets[-MOST_SHEETS:])
    ]
    return parts.panes(images, NOTE)
