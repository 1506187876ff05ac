"""Samples of a study's answer and of EMA* from the same noise; after them the pairs that differ most (App. E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import Input, Output, dcc, html, no_update
from flask import Response, request
from optuna.storages import RDBStorage

from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import number
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.dashboard import parts

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
ZOOM = (100, 600)  # percent of the pane's width


def is_empty(storage: RDBStorage) -> bool:
    """Whether no study has images."""
    folder = artifact_directory(storage.url)
    return not folder.is_dir() or not any(folder.iterdir())


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Images", storage, _content())
    reader = page.reader
    folder = artifact_directory(storage.url)
    page.in_browser("zoom", Output("zoomed", "children"), Input("zoom", "value"))
    page.choose(["study", "zoom"], lambda query: (page.chosen_study(query), _zoom(query)), reader.searches)
    page.app.server.add_url_rule("/file", view_func=lambda: _file(reader, folder))

    @page.refreshes(Output("links", "children"), Output("images", "children"), controls=["study"])
    def draw(_: int, _theme: Any, name: str | None, seen: str | None) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, "", "", parts.RUNNING_MS, ""
        studies = reader.read_studies([name])
        if not studies:
            return f"{name}: no such study; choose another one", "", "", "", parts.IDLE_MS, ""
        [study] = studies
        images = StoredImage.of_answer(reader, study, folder)
        signature = repr((name, study.study_id, study.chosen, [image.artifact_id for image in images]))
        interval = parts.refresh_interval(studies)
        if signature == seen:
            return *[no_update] * 4, interval, no_update
        return (
            "",
            _headline(study),
            parts.study_link(study, text="This study"),
            _panes(study, images),
            interval,
            signature,
        )

    return page.app


def _zoom(query: Mapping[str, str]) -> int:
    """Percent, within its limits."""
    smallest, largest = ZOOM
    text = query.get("zoom", "")
    if not text.isdecimal():
        return smallest
    return min(max(int(text), smallest), largest)


def _file(reader: HistoryReader, folder: Path) -> Response:
    """Serve an image that the database names for this study's answer, and no other file of the folder."""
    name = request.args.get("study", "")
    if name not in reader.names():
        return parts.image_response(None)
    asked_id = request.args.get("artifact", "")
    for study in reader.read_studies([name]):
        for image in StoredImage.of_answer(reader, study, folder):
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
                parts.field("Study", dcc.Dropdown(id="study", clearable=False)),
                html.Div([html.Label(["Zoom ", html.Output(id="zoomed")], htmlFor="zoom"), slider], className="field"),
                html.Div(id="links", className="row"),
            ],
            className="controls",
        ),
        html.Div(id="images"),
    ]


def _headline(study: Standing) -> str:
    if study.chosen is None:
        return f"{study.study} has no complete trial yet"
    answer = f"{study.study}, trial {study.chosen}"
    if study.held_out is not None:
        return f"{answer}: held-out {study.metric} {number(study.reported)}"
    return f"{answer}: searched {study.metric} {number(study.searched)}"


def _panes(study: Standing, images: Sequence[StoredImage]) -> Any:
    """The images; if there are none, why, and which command makes them."""
    if not images:
        return html.P(_why_no_images(study))
    shown: list[Any] = []
    unselected = [image for image in images if not image.selected]
    if unselected:
        shown += parts.panes(
            _served(study, unselected),
            "The first samples of each, not selected; those at the same place come from the same noise. "
            "Open one to see it in full.",
        )
        compared = [image for image in unselected if image.shows in ("baseline", "answer")]
        if len(compared) == 2:
            shown += parts.before_and_after(*_served(study, compared))
    selected = [image for image in images if image.selected]
    if selected:
        shown.append(html.H2("Pairs that differ most"))
        shown += parts.panes(
            _served(study, selected),
            "Of 1,000 samples of both from the same noise, those whose features differ most: they show how two models "
            "differ, not how good one of them is.",
        )
    return shown


def _served(study: Standing, images: Sequence[StoredImage]) -> list[parts.ServedImage]:
    return [("images/file", {"study": study.study, "artifact": image.artifact_id}, image.caption) for image in images]


def _why_no_images(study: Standing) -> str:
    if study.chosen is None:
        return "No complete trial yet. Images are stored when the search ends."
    if study.optimizer in BASELINES:
        return "A baseline has no images of its own: those of each search show it, too. Choose another study."
    return (
        "No images are stored with the answer of this study. An objective that samples images stores them "
        "when the search ends and an EMAGrid study of the same experiment is finished: lcsc run STUDY_FILE"
    )
