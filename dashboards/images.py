"""Samples of the models of a report from the same noise; the grid of ``lcsc images``; then pairs that differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import Input, Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.base.labelled_grid import band, bands_of
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.answer import first_line
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.pictures import FARTHEST_NOTE, why_no_images

ZOOM = (100, 600)  # percent of the pane's width


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    content = [html.Div(id="images")]
    page = parts.Page(__name__, "Images", "Images from the same noise", storage, _controls(), content)
    reader = page.reader
    folder = artifact_directory(storage.url)
    page.in_browser("zoom", Output("zoomed", "children"), Input("zoom", "value"))
    page.choose(["experiment", "zoom"], lambda query: (_experiment(reader, query), _zoom(query)), reader.experiments)
    page.app.server.add_url_rule("/file", view_func=lambda: _file(reader, folder))

    @page.refreshes(Output("images", "children"), controls=["experiment"])
    def draw(_: int, _theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", parts.NO_EXPERIMENT, "", parts.RUNNING_MS, ""
        if name not in reader.experiments():
            return f"{name}: no such experiment; choose another one", "", "", parts.IDLE_MS, ""
        studies = reader.read(name)
        report = studies[0].report
        images = StoredImage.of_experiment(storage, name, report, folder)
        samples = [image for image in images if image.kind == "samples"]
        headline = first_line(studies)
        signature = repr((name, headline, report, [image.version for image in images]))
        interval = parts.refresh_interval(studies)
        if signature == seen:
            return "", *[no_update] * 2, interval, no_update
        shown: list[Any] = []
        if samples:
            shown += _panes(name, samples)
        else:
            shown.append(html.P(why_no_images(studies[0], folder)))
        shown += _grid(name, next((image for image in images if image.kind == "grid"), None))
        shown += _farthest(name, [image for image in images if image.kind == "farthest"])
        return "", headline, shown, interval, signature

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
    row = request.args.get("row", "")
    report = reader.read(name)[0].report
    for image in StoredImage.of_experiment(reader.storage, name, report, folder):
        if image.artifact_id == request.args.get("artifact"):
            return parts.image_response(band(image.content, int(row)) if row.isdecimal() else image.content)
    return parts.image_response(None)


def _controls() -> list[Any]:
    slider = dcc.Input(id="zoom", type="range", min=ZOOM[0], max=ZOOM[1], step=25)
    return [
        parts.field("Experiment", dcc.Dropdown(id="experiment", clearable=False)),
        html.Div([html.Label(["Zoom ", html.Output(id="zoomed")], htmlFor="zoom"), slider], className="field"),
    ]


def _panes(name: str, images: Sequence[StoredImage]) -> list[Any]:
    """Samples as they come, with a number of each model, and two of them one over the other."""
    lines = [f"{image.caption}: {image.measured}" for image in images if image.measured]
    served = _served(name, images)
    shown = [
        *parts.panes(
            served,
            "The first samples of each, not selected; those at the same place come from the same noise. "
            "Open one to see it in full.",
        ),
        html.Ul([html.Li(line) for line in lines]),
    ]
    of_models = _served(name, [image for image in images if image.shows != "real"])
    if len(of_models) > 1:
        shown += parts.one_over_another("samples", of_models)
    return shown


def _grid(name: str, grid: StoredImage | None) -> list[Any]:
    """The grid of ``lcsc images``, and two of its rows one over the other; without one, how to make it."""
    heading = html.H2("Side by side")
    if grid is None:
        command = html.Code(f"lcsc images {name}")
        return [heading, html.P(["For checkpoints, averages and what was found, a row each, run ", command])]
    [whole] = _served(name, [grid])
    path, query, _ = whole
    rows = [(path, {**query, "row": number}, row.title) for number, row in enumerate(bands_of(grid.content))]
    shown = [heading, *parts.panes([whole], "Images of one column come from the same noise.")]
    if len(rows) > 1:
        shown += parts.one_over_another("grid", rows)
    return shown


def _farthest(name: str, images: Sequence[StoredImage]) -> list[Any]:
    """The pairs that differ most; nothing without them."""
    if not images:
        return []
    return [html.H2("Pairs that differ most"), *parts.panes(_served(name, images), FARTHEST_NOTE)]


def _served(name: str, images: Sequence[StoredImage]) -> list[parts.ServedImage]:
    """The addresses of images; each has a version, since a browser keeps an image whose address stays the same."""
    served: list[parts.ServedImage] = []
    for image in images:
        query = {"experiment": name, "artifact": image.artifact_id, "version": image.version}
        served.append(("images/file", query, image.caption))
    return served
