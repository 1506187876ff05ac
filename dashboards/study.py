"""One study during and after its run: progress, workers, failures, where its time went, and its results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dash
import numpy as np
from dash import Output, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.base.records import NodeWork
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.names import split_name
from lcsc_opt.views import number
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import Theme, empty_figure
from lcsc_opt.views.figures.study import distances_figure, own_figures
from lcsc_opt.views.study_status import FailureReason, Progress, duration
from lcsc_opt.views.tables import report_table

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
FIGURES = {
    "best_so_far": "Best so far",
    "coefficients": "Coefficients over training steps",
    "movement": "How the best coefficients moved",
    "times": "Time per trial",
    "distances": "Distance between answers",
}
TEXTS = ("metrics", "progress", "nodes", "failures", "links")
MOST_REASONS = 10
OLD_SECONDS = 30.0  # the age of the workers' state is shown if it is older than this


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Study", storage, _content())
    reader = page.reader
    page.choose(["study"], lambda asked: (page.chosen_study(asked),), reader.searches)
    places = (*(Output(name, "children") for name in TEXTS), *(page.drawn(name) for name in FIGURES))

    @page.refreshes(*places, controls=["study"])
    def draw(_: int, theme: Any, name: str | None, seen: Any) -> tuple[Any, ...]:
        studies = reader.read(split_name(name)[0]) if name else ()
        study = next((study for study in studies if study.study == name), None)
        if study is None:
            said = f"{name}: no such study; choose another one" if name else NOTHING
            problem = (said, "") if name else ("", said)
            nothing = [*[""] * len(TEXTS), *[empty_figure(said, theme)] * len(FIGURES)]
            return *problem, *nothing, parts.IDLE_MS if name else parts.RUNNING_MS, None
        state = Progress.of(study)
        now = _seen(study, studies, theme)
        wanted = {key for key in now if now[key] != (seen or {}).get(key)}
        figures = own_figures(reader, study, studies, wanted, theme=theme)
        if "distances" in wanted:
            figures["distances"] = distances_figure(reader, studies, theme=theme)
        links = [
            parts.optuna_link(study, "This study in optuna-dashboard"),
            parts.study_link(study, "images", "Its images"),
        ]
        texts = (_metrics(study), _progress(study, state), _nodes(study), _failures(study), links)
        drawn = (figures.get(key, no_update) for key in FIGURES)
        return "", _headline(study, state), *texts, *drawn, parts.refresh_interval([study]), now

    return page.app


def _content() -> list[Any]:
    figures = [parts.section(title, parts.graph(name, label=title)) for name, title in FIGURES.items()]
    return [
        html.H1("Study"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div(
            [parts.field("Study", dcc.Dropdown(id="study", clearable=False)), html.Div(id="links", className="row")],
            className="controls",
        ),
        html.Div(id="progress"),
        html.Div(id="nodes"),
        html.Div(id="metrics"),
        html.Div(id="failures"),
        html.Div(figures, className="figures"),
    ]


def _headline(study: StudyHistory, state: Progress) -> str:
    """The state of a study, in one line."""
    best = "no result yet" if study.searched is None else f"best {study.metric} {study.searched:.4g} searched"
    if study.held_out is not None and study.held_out.loss is not None:
        best = f"{study.metric} {study.held_out.loss:.4g} held out, {number(study.searched)} searched"
        if study.held_out.warning is not None:
            best += f". Warning: {study.held_out.warning}"
    left = "" if state.seconds_left is None else f", {duration(state.seconds_left)} left"
    return f"{study.study} is {state.state}{left}: {best}"


def _metrics(study: StudyHistory) -> Any:
    """The report on held-out noise, if there is one."""
    if study.held_out is None or not study.held_out.rows:
        return ""
    return parts.section("Evaluation metrics, held out", parts.table(*report_table(study.held_out.rows), text=2))


def _seen(study: StudyHistory, studies: Sequence[StudyHistory], theme: Theme) -> dict[str, str]:
    """Figure → a text that changes when its data change. Coefficients are read again only after a better trial."""
    ema = best_ema(studies)
    answers = [(other.study, other.chosen) for other in studies]
    found = repr((study.study, study.study_id, study.chosen, study.best, theme, study.held_out))
    against = repr((None if ema is None else (ema.study, ema.chosen), found))
    new = parts.signature([study], theme)
    return {
        "best_so_far": parts.signature([study, *([] if ema is None else [ema])], theme),
        "coefficients": against,
        "movement": found,
        "times": new,
        "distances": repr((answers, theme)),
    }


def _progress(study: StudyHistory, state: Progress) -> list[Any]:
    total = "" if state.total is None else f" of {state.total:,}"
    rate = "–" if state.per_hour is None else f"{state.per_hour:,.0f} an hour"
    tiles = {
        "State": state.state,
        state.unit.capitalize(): f"{state.done:,}{total}",
        "Rate": rate,
        "Time left": "–" if state.seconds_left is None else duration(state.seconds_left),
        "Workers": f"{study.workers}, " + (f"run from {study.holder}" if study.holder else "not running"),
        "Failed trials": f"{state.failed:,}" + (f", {state.retried} tried again" if state.retried else ""),
    }
    shown = [html.Div([html.Dt(name), html.Dd(value)], className="tile") for name, value in tiles.items()]
    label: Any = {"aria-label": "progress"}
    bar = [] if state.share is None else [html.Progress(value=str(state.share), max="1", **label)]
    return [*bar, html.Dl(shown, className="tiles"), *_evaluating(study)]


def _evaluating(study: StudyHistory) -> list[Any]:
    """Which trials have no result yet, the one that was asked first in front."""
    rows = study.trials[~np.isin(study.trials["number"], study.finished["number"])]
    waiting = sorted((float(row["started"]), int(row["number"])) for row in rows)[:8]
    if not waiting:
        return []
    if not study.running:
        listed = ", ".join(str(trial) for _, trial in waiting)
        return [html.P(f"No result of trial {listed} yet; lcsc resume evaluates it again.", className="note")]
    now = time.time()
    listed = ", ".join(f"trial {trial} for {duration(max(now - asked, 0.0))}" for asked, trial in waiting)
    return [html.P(f"Evaluating {listed}.", className="note")]


def _nodes(study: StudyHistory) -> Any:
    """A row for each machine, while the study runs. The process that searches may be the worker itself."""
    if study.holder is None:
        return ""
    old = ""
    if study.nodes_seen_at >= study.held_since:  # not from an earlier run
        nodes, seconds = study.nodes, time.time() - study.nodes_seen_at
        old = f", {duration(seconds)} ago" if seconds > OLD_SECONDS else ""
    else:
        nodes = (NodeWork(study.holder, 1, 0),) if study.workers == 1 else ()
    rows = [[node.name or "before they began", node.alive, node.deaths] for node in nodes]
    said = f"{sum(node.alive for node in nodes)} of {study.workers} workers answer{old}."
    table = parts.table(("machine", "alive", "died"), rows)
    return parts.section("Workers", html.P(said, className="note"), table)


def _failures(study: StudyHistory) -> Any:
    found = FailureReason.of(study)
    if not found:
        return ""
    shown = found[:MOST_REASONS]
    rows = [[failure.reason, failure.attempts, failure.lost] for failure in shown]
    more = [html.P(f"and {len(found) - MOST_REASONS} more reasons", className="note")] * (len(found) > MOST_REASONS)
    where = [html.Details([html.Summary(one.reason), html.Pre(one.traceback)]) for one in shown if one.traceback]
    return parts.section("Failures", parts.table(("reason", "attempts", "trials lost"), rows), *more, *where)
