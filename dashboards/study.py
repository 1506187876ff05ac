"""One study during and after its run: progress, workers, failures, where its time went, and its results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import dash
from dash import Output, dcc, html, no_update
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.database.reader import FailureReason
from lcsc_opt.views import UNKNOWN, count, duration, loss_title, number
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.study import coefficients_figure
from lcsc_opt.views.figures.theme import Theme, empty_figure
from lcsc_opt.views.study_status import rate, rate_text, seconds_left
from lcsc_opt.views.tables import failures_table, tables_of_study

NOTHING = "No study in this database yet. Start one: lcsc run STUDY_FILE"
FIGURES = {
    "best_so_far": "Best so far",
    "coefficients": "Coefficients over training steps",
}
TEXTS = ("metrics", "progress", "failures", "links")
MOST_REASONS = 10
MOST_WAITING = 8  # trials that are listed


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Study", "Study", storage, _controls(), _content())
    reader = page.reader
    page.choose(["study"], lambda query: (page.chosen_study(query),), reader.names)
    outputs = [Output(name, "children") for name in TEXTS]
    outputs += [page.drawn(name) for name in FIGURES]

    @page.refreshes(*outputs, controls=["study"])
    def draw(_: int, theme: Any, name: str | None, seen: Any) -> tuple[Any, ...]:
        if not name:
            return "", NOTHING, *_blank(NOTHING, theme), parts.RUNNING_MS, None
        study = next(iter(reader.read_studies([name])), None)
        if study is None:
            problem = f"{name}: no such study; choose another one"
            return problem, "", *_blank(problem, theme), parts.IDLE_MS, None
        studies = reader.read(study.experiment)
        trials = reader.trials(study)
        per_second = rate(study, trials)
        ema = ema_grid(studies)
        signatures = _signatures(study, ema, theme)
        changed = {key for key in signatures if signatures[key] != (seen or {}).get(key)}
        figures: dict[str, Any] = {}
        if "best_so_far" in changed:
            figures["best_so_far"] = comparison_figure(_compared(study, ema), theme=theme)
        if "coefficients" in changed:
            figures["coefficients"] = coefficients_figure(reader, study, ema, theme=theme)
        return (
            "",
            _headline(study, per_second),
            _metrics(study),
            _progress(study, trials, per_second),
            _failures(reader.failures(study)),
            parts.study_link(study, "images", "Images of its experiment"),
            *(figures.get(key, no_update) for key in FIGURES),
            parts.refresh_interval([study]),
            signatures,
        )

    return page.app


def _blank(message: str, theme: Theme) -> list[Any]:
    """The texts and figures where there is no study to show."""
    texts: list[Any] = [""] * len(TEXTS)
    return texts + [empty_figure(message, theme)] * len(FIGURES)


def _controls() -> list[Any]:
    return [parts.field("Study", dcc.Dropdown(id="study", clearable=False)), html.Div(id="links", className="row")]


def _content() -> list[Any]:
    figures = [parts.section(title, parts.graph(name, label=title)) for name, title in FIGURES.items()]
    return [
        html.Div(id="progress"),
        html.Div(id="metrics"),
        html.Div(id="failures"),
        html.Div(figures, className="figures"),
    ]


def _headline(study: Standing, per_second: float | None) -> str:
    """The state of a study, in one line."""
    state = f"{study.study} is {study.state}"
    left = seconds_left(study, per_second)
    if left is not None:
        state += f", {duration(left)} left"
    return f"{state}: {_best(study)}"


def _best(study: Standing) -> str:
    """The study's best loss, on held-out noise where it was measured there."""
    loss = loss_title(study.metric)
    if study.reported is not None:
        return f"{loss} {number(study.reported)} held out, {number(study.searched_of_shown)} searched"
    if study.searched is None:
        return "no result yet"
    return f"best {loss} {number(study.searched)} searched"


def _metrics(study: Standing) -> Any:
    """What the report of the experiment has of its best trial, if there is one."""
    return [parts.section(table.title, parts.table(table)) for table in tables_of_study(study)]


def _compared(study: Standing, ema: Standing | None) -> list[Standing]:
    """The study, and the one whose best is EMA*, if that is another."""
    if ema is None or ema.study == study.study:
        return [study]
    return [study, ema]


def _signatures(study: Standing, ema: Standing | None, theme: Theme) -> dict[str, str]:
    """Figure → a text that changes when its data change. Coefficients are read again only after a better trial."""
    compared = _compared(study, ema)
    answers = [(drawn.study, drawn.study_id, drawn.chosen, drawn.summary.best) for drawn in compared]
    return {
        "best_so_far": parts.signature(compared, theme),
        "coefficients": repr((answers, study.report, theme)),
    }


def _progress(study: Standing, trials: Sequence[FrozenTrial], per_second: float | None) -> list[Any]:
    """The state of a study in numbers, and what it is evaluating."""
    left = seconds_left(study, per_second)
    tiles = {
        "State": study.state,
        study.budget_unit.capitalize(): count(study.budget_spent, study.budget_total),
        "Rate": rate_text(study, per_second) or UNKNOWN,
        "Time left": UNKNOWN if left is None else duration(left),
        "Workers": f"{study.workers}, {_coordinator(study)}",
        "Failed trials": _failed_trials(study),
    }
    shown = [html.Div([html.Dt(name), html.Dd(value)], className="tile") for name, value in tiles.items()]
    content: list[Any] = []
    if study.budget_total:
        label: Any = {"aria-label": "progress"}
        share = min(study.budget_spent / study.budget_total, 1.0)
        content.append(html.Progress(value=str(share), max="1", **label))
    return [*content, html.Dl(shown, className="tiles"), *_evaluating(study, trials)]


def _coordinator(study: Standing) -> str:
    """Which machine's process hands out the trials."""
    if study.holder is None:
        return "not running"
    return f"run from {study.holder}"


def _failed_trials(study: Standing) -> str:
    """How many have failed for good, and how many succeeded after another attempt."""
    failed = f"{study.summary.failed:,}"
    if study.summary.retried:
        return f"{failed}, {study.summary.retried} tried again"
    return failed


def _evaluating(study: Standing, trials: Sequence[FrozenTrial]) -> list[Any]:
    """Which trials have no result yet, the one that was asked first in front."""
    waiting = [trial for trial in trials if not trial.state.is_finished()][:MOST_WAITING]
    if not waiting:
        return []
    if not study.running:
        numbers = ", ".join(str(trial.number) for trial in waiting)
        return [html.P(f"No result of trial {numbers} yet; lcsc run evaluates it again.", className="note")]
    ages = [f"trial {trial.number} for {duration(_age(trial))}" for trial in waiting]
    return [html.P(f"Evaluating {', '.join(ages)}.", className="note")]


def _age(trial: FrozenTrial) -> float:
    """For how many seconds a trial has been evaluated."""
    if trial.datetime_start is None:
        return 0.0
    return max(time.time() - trial.datetime_start.timestamp(), 0.0)


def _failures(failures: Sequence[FailureReason]) -> Any:
    """The most frequent reasons of failures, with their tracebacks."""
    if not failures:
        return ""
    shown = failures[:MOST_REASONS]
    table = failures_table(shown)
    rows = [(html.Span(str(reason), className="reason"), *numbers) for reason, *numbers in table.rows]
    content: list[Any] = [parts.table(dataclasses.replace(table, rows=rows))]
    if len(failures) > MOST_REASONS:
        content.append(html.P(f"and {len(failures) - MOST_REASONS} more reasons", className="note"))
    content += [
        html.Details([html.Summary(failure.reason), html.Pre(failure.traceback)])
        for failure in shown
        if failure.traceback
    ]
    return parts.section("Failures", *content)
