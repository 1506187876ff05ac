"""Images of a found model and of EMA* from the same noise; pairs that differ most come first (App. E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import Input, Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import number
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.dashboard import parts

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
ZOOM = (100, 600)  # percent of the pane's width


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page, folder = parts.Page(__name__, "Images", storage, _content()), artifact_directory(storage.url)
    reader = page.reader
    page.in_browser("zoom", Output("zoomed", "children"), Input("zoom", "value"))
    page.choose(["study", "zoom"], lambda asked: (page.chosen_study(asked), _zoom(asked)), reader.searches)
    page.app.server.add_url_rule("/file", view_func=lambda: _file(reader, folder))

    @page.refreshes(Output("links", "children"), Output("images", "children"), controls=["study"])
    def draw(_: int, _theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, "", "", parts.RUNNING_MS, ""
        studies = reader.read_studies([name])
        if not studies:
            return f"{name}: no such study; choose another one", "", "", "", parts.IDLE_MS, ""
        (study,) = studies
        shown = StoredImage.of_answer(reader, study, folder)
        now = repr((name, study.study_id, study.chosen, [image.artifact_id for image in shown]))
        if now == seen:
            return *[no_update] * 4, parts.refresh_interval(studies), no_update
        links = [parts.study_link(study, text="This study"), parts.optuna_link(study, "Its trials in optuna-dashboard")]
        return "", _headline(study), links, _panes(study, shown), parts.refresh_interval(studies), now

    return page.app


def _zoom(asked: Mapping[str, str]) -> int:
    zoom = int(asked["zoom"]) if asked.get("zoom", "").isdecimal() else ZOOM[0]
    return min(max(zoom, ZOOM[0]), ZOOM[1])


def _file(reader: HistoryReader, folder: Path) -> Response:
    """Serve an image that the database names for this study's answer, and no other file of the folder."""
    name = request.args.get("study", "")
    studies = reader.read_studies([name]) if name in reader.names() else ()
    images = {image.artifact_id: image for study in studies for image in StoredImage.of_answer(reader, study, folder)}
    found = images.get(request.args.get("artifact", ""))
    return parts.image_response(None if found is None else found.content)


def _content() -> list[Any]:
    slider = dcc.Input(id="zoom", type="range", min=ZOOM[0], max=ZOOM[1], step=25)
    return [
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
    ]


def _headline(study: StudyHistory) -> str:
    if study.chosen is None:
        return f"{study.study} has no complete trial yet"
    if study.held_out is not None and study.held_out.loss is not None:
        return f"{study.study}, trial {study.chosen}: held-out {study.metric} {study.held_out.loss:.4g}"
    return f"{study.study}, trial {study.chosen}: searched {study.metric} {number(study.searched)}"


def _panes(study: StudyHistory, shown: Sequence[StoredImage]) -> Any:
    """The images; if there are none, why, and which command makes them."""
    if shown:
        listed = [("images/file", {"study": study.study, "artifact": one.artifact_id}, one.caption) for one in shown]
        panes = parts.panes(
            listed,
            "Images at the same place come from the same noise; those whose features differ most come first. "
            "Open one to see it in full.",
        )
        return [*panes, *parts.before_and_after(*listed)] if len(listed) == 2 else panes
    if study.chosen is None:
        return html.P("No complete trial yet. Images are stored when the search ends.")
    if study.label != study.optimizer:
        return html.P("A baseline has no images of its own: those of each search show it, too. Choose another study.")
    return html.P(
        "No images are stored with the answer of this study. An objective that samples images stores them "
        "when the search ends and an EMAGrid study of the same experiment is finished: lcsc run STUDY_FILE"
    )
