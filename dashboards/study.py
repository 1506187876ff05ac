"""One study during and after its run: progress, workers, failures, where its time went, and its results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dash
from dash import Input, Output, State, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.base.records import NodeWork
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import comparison_figure
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import Theme, empty_figure, number
from lcsc_opt.views.figures.study import distances_figure, own_figures
from lcsc_opt.views.progress import FailureReason, Progress, failures_of, nodes_of, progress_of, waiting_of
from lcsc_opt.views.ranking import report_table

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
FIGURES = {
    "best_so_far": "Best so far",
    "coefficients": "Coefficients over training steps",
    "movement": "How the best coefficients moved",
    "shape": "Shape of the best coefficients over the search",
    "times": "Time per trial",
    "distances": "Distance between answers",
}
TEXTS = ("problem", "headline", "metrics", "progress", "nodes", "failures", "links")
MOST_REASONS = 10
OLD_SECONDS = 30.0  # the age of the workers' state is shown if it is older than this


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    reader = parts.shared_reader(storage)
    app = parts.new_page(__name__, "Study")
    app.layout = _layout
    parts.remember(app, ["study"])
    parts.choose(app, ["study"], lambda asked: (parts.chosen_study(reader, asked),), reader.searches)

    @app.callback(
        *(
            Output(name, "children")
            for name in ("problem", "headline", "metrics", "progress", "nodes", "failures", "links")
        ),
        *(parts.drawn(app, name) for name in FIGURES),
        Output("tick", "interval"),
        Output("seen", "data"),
        Input("tick", "n_intervals"),
        Input("theme", "data"),
        Input("study", "value"),
        State("seen", "data"),
    )
    def draw(_: int, theme: Any, name: str | None, seen: Any) -> tuple[Any, ...]:
        if not name:
            return (
                "",
                NOTHING,
                *[""] * (len(TEXTS) - 2),
                *[empty_figure(NOTHING, theme)] * len(FIGURES),
                parts.RUNNING_MS,
                None,
            )
        studies = reader.read(split_name(name)[0])
        study = next((study for study in studies if study.study == name), None)
        if study is None:
            gone = f"{name}: no such study; choose another one"
            return gone, *[""] * (len(TEXTS) - 1), *[empty_figure(gone, theme)] * len(FIGURES), parts.IDLE_MS, None
        state = progress_of(study)
        now = _seen(study, studies, theme)
        figures = _figures(reader, study, studies, theme, {key for key in now if now[key] != (seen or {}).get(key)})
        about = (_metrics(study), _progress(study, state), _nodes(study), _failures(study), _links(study))
        texts = ("", headline(study, state), *about)
        return *texts, *(figures.get(key, no_update) for key in FIGURES), parts.rhythm([study]), now

    return app


def _layout() -> html.Main:
    figures = [parts.section(title, parts.graph(name, label=title)) for name, title in FIGURES.items()]
    return parts.page_layout(
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
    )


def headline(study: StudyHistory, state: Progress) -> str:
    """The state of a study, in one line."""
    best = "no result yet" if study.searched is None else f"best {study.metric} {study.searched:.4g} searched"
    if study.held_out is not None and study.held_out.loss is not None:
        best = f"{study.metric} {study.held_out.loss:.4g} held out, {number(study.searched)} searched"
        if study.held_out.warning is not None:
            best += f". Warning: {study.held_out.warning}"
    left = "" if state.seconds_left is None else f", {parts.duration(state.seconds_left)} left"
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
        "shape": found,
        "times": new,
        "distances": repr((answers, theme)),
    }


def _figures(
    reader: HistoryReader, study: StudyHistory, studies: Sequence[StudyHistory], theme: Theme, wanted: set[str]
) -> dict[str, Any]:
    """Name → figure, for the wanted figures."""
    found: dict[str, Any] = {}
    if "best_so_far" in wanted:
        ema = best_ema(studies)
        both = [study] if ema is None or ema.study == study.study else [study, ema]
        found["best_so_far"] = comparison_figure(both, theme=theme)
    if "distances" in wanted:
        found["distances"] = distances_figure(reader, studies, theme=theme)
    if wanted & {"coefficients", "movement", "shape", "times"}:
        found.update(own_figures(reader, study, studies, theme=theme))
    return {name: figure for name, figure in found.items() if name in wanted}


def _progress(study: StudyHistory, state: Progress) -> list[Any]:
    total = "" if state.total is None else f" of {state.total:,}"
    rate = "–" if state.per_hour is None else f"{state.per_hour:,.0f} an hour"
    tiles = {
        "State": state.state,
        state.unit.capitalize(): f"{state.done:,}{total}",
        "Rate": rate,
        "Time left": "–" if state.seconds_left is None else parts.duration(state.seconds_left),
        "Workers": _workers(study),
        "Failed trials": f"{state.failed:,}" + (f", {state.retried} tried again" if state.retried else ""),
    }
    shown = [html.Div([html.Dt(name), html.Dd(value)], className="tile") for name, value in tiles.items()]
    bar = [] if state.share is None else [html.Progress(value=str(state.share), max="1", **parts.labelled("progress"))]
    return [*bar, html.Dl(shown, className="tiles"), *_evaluating(study)]


def _workers(study: StudyHistory) -> str:
    return f"{study.workers}, " + ("not running" if study.holder is None else f"run from {study.holder.host}")


def _evaluating(study: StudyHistory) -> list[Any]:
    waiting = waiting_of(study)
    if not waiting:
        return []
    if not study.running:
        listed = ", ".join(str(trial) for trial, _ in waiting[:8])
        again = f"No result of trial {listed} yet; lcsc resume evaluates it again."
        return [html.P(again, className="note")]
    listed = ", ".join(f"trial {trial} for {parts.duration(seconds)}" for trial, seconds in waiting[:8])
    return [html.P(f"Evaluating {listed}.", className="note")]


def _nodes(study: StudyHistory) -> Any:
    """A row for each machine, while the study runs."""
    kept = nodes_of(study)
    if kept is None:
        return ""
    rows = [[node.name or "before they began", node.alive, _busy(node), node.deaths] for node in kept.nodes]
    seconds = time.time() - kept.kept_at
    old = f", {parts.duration(seconds)} ago" if seconds > OLD_SECONDS else ""
    alive = sum(node.alive for node in kept.nodes)
    said = html.P(f"{alive} of {study.workers} workers answer{old}.", className="note")
    return parts.section("Workers", said, parts.table(("machine", "alive", "busy", "died"), rows))


def _busy(node: NodeWork) -> str:
    return "–" if node.busy is None or not node.alive else f"{node.busy:.0%}"


def _failures(study: StudyHistory) -> Any:
    found = failures_of(study)
    if not found:
        return ""
    rows = [[failure.reason, failure.attempts, failure.lost] for failure in found[:MOST_REASONS]]
    more = [html.P(f"and {len(found) - MOST_REASONS} more reasons", className="note")] * (len(found) > MOST_REASONS)
    where = [_traceback(failure) for failure in found[:MOST_REASONS] if failure.traceback]
    return parts.section("Failures", parts.table(("reason", "attempts", "trials lost"), rows), *more, *where)


def _traceback(failure: FailureReason) -> Any:
    return html.Details([html.Summary(failure.reason), html.Pre(failure.traceback)])


def _links(study: StudyHistory) -> list[Any]:
    return [parts.optuna_link(study, "This study in optuna-dashboard"), parts.study_link(study, "images", "Its images")]
