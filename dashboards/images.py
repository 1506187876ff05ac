"""Samples of the answer and of the best that was there before, from the same noise; then pairs that differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import Input, Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import Report
from lcsc_opt.views.answer import answer_line
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.dashboard import parts

NOTHING = "No experiment in this database yet. Start one: lcsc run STUDY_FILE"
ZOOM = (100, 600)  # percent of the pane's width


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Images", storage, _content())
    reader = page.reader
    folder = artifact_directory(storage.url)
    page.in_browser("zoom", Output("zoomed", "children"), Input("zoom", "value"))
    page.choose(["experiment", "zoom"], lambda query: (_experiment(reader, query), _zoom(query)), reader.experiments)
    page.app.server.add_url_rule("/file", view_func=lambda: _file(reader, folder))

    @page.refreshes(Output("images", "children"), controls=["experiment"])
    def draw(_: int, _theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, "", parts.RUNNING_MS, ""
        if name not in reader.experiments():
            return f"{name}: no such experiment; choose another one", "", "", parts.IDLE_MS, ""
        studies = reader.read(name)
        report = studies[0].report
        images = StoredImage.of_experiment(storage, name, report, folder)
        signature = repr((name, report, [image.version for image in images]))
        interval = parts.refresh_interval(studies)
        if signature == seen:
            return "", *[no_update] * 2, interval, no_update
        headline = f"{name} has no report yet" if report is None else answer_line(report)
        if not images:
            return "", headline, html.P(_why_no_images(report, folder)), interval, signature
        return "", headline, _panes(name, images), interval, signature

    return page.app


def _experiment(reader: HistoryReader, query: Mapping[str, str]) -> str | None:
    """The experiment that the query of an address asks for, by its own name or a study's; else the newest one."""
    experiments = reader.experiments()
    asked = query.get("experiment") or query.get("study", "").split("/")[0]
    return asked or next(reversed(experiments), None)


def _zoom(query: Mapping[str, str]) -> int:
    """Percent, within its limits."""
    smallest, largest = ZOOM
    text = query.get("zoom", "")
    if not text.isdecimal():
        return smallest
    return min(max(int(text), smallest), largest)


def _file(reader: HistoryReader, folder: Path) -> Response:
    """Serve an image that the database names for this experiment, and no other file of the folder."""
    name = request.args.get("experiment", "")
    if name not in reader.experiments():
        return parts.image_response(None)
    asked_id = request.args.get("artifact", "")
    report = reader.read(name)[0].report
    for image in StoredImage.of_experiment(reader.storage, name, report, folder):
        if image.artifact_id == asked_id:
            return parts.image_response(image.content)
    return parts.image_response(None)


def _content() -> list[Any]:
    slider = dcc.Input(id="zoom", type="range", min=ZOOM[0], max=ZOOM[1], step=25)
    return [
        html.H1("Images from the same noise"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div(
            [
                parts.field("Experiment", dcc.Dropdown(id="experiment", clearable=False)),
                html.Div([html.Label(["Zoom ", html.Output(id="zoomed")], htmlFor="zoom"), slider], className="field"),
            ],
            className="controls",
        ),
        html.Div(id="images"),
    ]


def _panes(name: str, images: Sequence[StoredImage]) -> Any:
    """The images, samples as they come first."""
    shown: list[Any] = []
    unselected = [image for image in images if not image.selected]
    if unselected:
        shown += parts.panes(
            _served(name, unselected),
            "The first samples of each, not selected; those at the same place come from the same noise. "
            "Open one to see it in full.",
        )
        compared = [image for image in unselected if image.shows in ("before", "answer")]
        if len(compared) == 2:
            shown += parts.before_and_after(*_served(name, compared))
    selected = [image for image in images if image.selected]
    if selected:
        shown.append(html.H2("Pairs that differ most"))
        shown += parts.panes(
            _served(name, selected),
            "Of 1,000 samples of both from the same noise, those whose features differ most: they show how two models "
            "differ, not how good one of them is.",
        )
    return shown


def _served(name: str, images: Sequence[StoredImage]) -> list[parts.ServedImage]:
    """The addresses of images; each has a version, since a browser keeps an image whose address stays the same."""
    served: list[parts.ServedImage] = []
    for image in images:
        query = {"experiment": name, "artifact": image.artifact_id, "version": image.version}
        served.append(("images/file", query, image.caption))
    return served


def _why_no_images(report: Report | None, folder: Path) -> str:
    """Why there are none in the folder, and which command makes them."""
    if report is None:
        return "No report yet. Images are stored with it, when all searches have ended, or by lcsc evaluate EXPERIMENT."
    if not report.is_found:
        return "Nothing certainly better was found, so there is nothing to compare."
    return f"No images are in {folder}: the objective samples none, or the folder was left where the searches ran."
