"""Images of a found model beside those of EMA* from the same noise; pairs that differ most come first (App. E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import dash
from dash import Input, Output, State, dcc, html, no_update
from flask import Response, abort, request
from optuna.storages import RDBStorage

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.artifacts import artifact_directory, caption, mimetype, read_artifact
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.dashboard.pages import HOME
from lcsc_opt.views.figures.look import number

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
PREFIX = "images"
CONTROLS = ("study", "zoom")
ZOOM = (100, 600)  # percent of the pane's width


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    reader, folder = parts.shared_reader(storage), artifact_directory(storage.url)
    app = parts.new_page(__name__, "Images")
    app.layout = _layout
    parts.remember(app, CONTROLS)
    parts.in_browser(app, "zoom", Output("zoomed", "children"), Input("zoom", "value"))
    parts.choose(app, CONTROLS, lambda asked: (parts.chosen_study(reader, asked), _zoom(asked)), reader.searches)
    app.server.add_url_rule("/file", view_func=lambda: _file(reader, folder))

    @app.callback(
        *(Output(name, "children") for name in ("problem", "headline", "links", "images")),
        Output("tick", "interval"),
        Output("seen", "data"),
        Input("tick", "n_intervals"),
        Input("study", "value"),
        State("seen", "data"),
    )
    def draw(_: int, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, "", "", parts.RUNNING_MS, ""
        studies = reader.read_studies([name])
        if not studies:
            return f"{name}: no such study; choose another one", "", "", "", parts.IDLE_MS, ""
        shown = images_of(reader, studies[0], folder)
        now = repr((name, studies[0].study_id, studies[0].chosen, shown))
        if now == seen:
            return *[no_update] * 4, parts.rhythm(studies), no_update
        return "", _headline(studies[0]), _links(studies[0]), _panes(studies[0], shown), parts.rhythm(studies), now

    return app


def _zoom(asked: Mapping[str, str]) -> int:
    zoom = int(asked["zoom"]) if asked.get("zoom", "").isdecimal() else ZOOM[0]
    return min(max(zoom, ZOOM[0]), ZOOM[1])


def images_of(reader: HistoryReader, study: StudyHistory, folder: Path) -> list[tuple[str, str]]:
    """(artifact, file name) of each image beside a study's answer, if its file exists."""
    if study.chosen is None:
        return []
    named = (
        (str(meta.get("artifact_id")), str(meta.get("filename"))) for meta in reader.artifacts(study, study.chosen)
    )
    return [
        (artifact, name) for artifact, name in named if name.startswith(PREFIX) and _image(folder, artifact) is not None
    ]


def _file(reader: HistoryReader, folder: Path) -> Response:
    """Serve an image that the database names for this study's answer, and no other file of the folder."""
    name, artifact = request.args.get("study", ""), request.args.get("artifact", "")
    studies = reader.read_studies([name]) if name in reader.names() else ()
    known = {
        str(meta.get("artifact_id"))
        for study in studies
        if study.chosen is not None
        for meta in reader.artifacts(study, study.chosen)
    }
    found = _image(folder, artifact) if artifact in known else None
    if found is None:
        abort(404)
    content, kind = found
    headers = {"Cache-Control": "private, max-age=86400", "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(content, mimetype=kind, headers=headers)


def _image(folder: Path, artifact: str) -> tuple[bytes, str] | None:
    content = read_artifact(folder, artifact)
    kind = None if content is None else mimetype(content)
    return None if content is None or kind is None else (content, kind)


def _layout() -> html.Main:
    slider = dcc.Input(id="zoom", type="range", min=ZOOM[0], max=ZOOM[1], step=25)
    return parts.page_layout(
        html.H1("Images from the same noise"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div(
            [
                parts.field("Study", dcc.Dropdown(id="study", clearable=False)),
                html.Div([html.Label(["Zoom ", html.Output(id="zoomed")], htmlFor="zoom"), slider], className="field"),
                html.Div(id="links", className="row"),
            ],
            className="controls",
        ),
        html.Div(id="images"),
    )


def _headline(study: StudyHistory) -> str:
    if study.chosen is None:
        return f"{study.study} has no complete trial yet"
    if study.held_out is not None and study.held_out.loss is not None:
        return f"{study.study}, trial {study.chosen}: held-out {study.metric} {study.held_out.loss:.4g}"
    return f"{study.study}, trial {study.chosen}: searched {study.metric} {number(study.searched)}"


def _links(study: StudyHistory) -> list[Any]:
    return [parts.study_link(study, text="This study"), parts.optuna_link(study, "Its trials in optuna-dashboard")]


def _panes(study: StudyHistory, shown: Sequence[tuple[str, str]]) -> Any:
    if not shown:
        return html.P(_missing(study))
    return [
        html.Div([_pane(study, artifact, name) for artifact, name in shown], className="panes"),
        html.P(
            "Images at the same place come from the same noise; those whose features differ most come first. "
            "Open one to see it in full.",
            className="note",
        ),
    ]


def _missing(study: StudyHistory) -> str:
    """Why there are no images, and which command makes them."""
    if study.chosen is None:
        return "No complete trial yet. Images are stored when the search ends."
    if study.label != study.optimizer:
        return "A baseline has no images of its own: they stand beside those of the searches. Choose another study."
    return (
        "No images are stored beside the answer of this study. An objective that samples images stores them "
        "when the search ends and an EMAGrid study of the same experiment is finished: lcsc run STUDY_FILE"
    )


def _pane(study: StudyHistory, artifact: str, name: str) -> Any:
    address = f"{HOME}images/file?{urlencode({'study': study.study, 'artifact': artifact})}"
    described = caption(study, name)
    picture = html.Div(
        html.Img(src=address, alt=described),
        className="pane",
        tabIndex=0,
        role="group",
        **parts.labelled(f"{described}; scrolls"),
    )
    return html.Figure([picture, html.Figcaption(html.A(described, href=address, target="_blank"))])
