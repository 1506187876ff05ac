"""What the shipped pages have in common, for a user's own page as well: one app, one layout, one rhythm of refreshing.

A page keeps what it shows in its address: the values of its controls, by their ids (:func:`remember`). It refreshes
while something runs (:func:`rhythm`), and sends a figure only when what it is drawn from has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, quote

import dash
import sqlalchemy as sa
from dash import ClientsideFunction, Input, Output, State, ctx, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import notice
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.dashboard.pages import HOME, ROOT_PATH
from lcsc_opt.views.figures.look import CONFIG
from lcsc_opt.views.ranking import ranking

RUNNING_MS, IDLE_MS = 2000, 15_000  # between refreshes, while something runs and while nothing does
BLANK = {  # until the first figure is there: as high as one, and nothing to see
    "data": [],
    "layout": {
        **{"xaxis": {"visible": False}, "yaxis": {"visible": False}, "height": 420},
        **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"},
    },
}

Content = Any  # of Dash: a component, a text, or a list of them


def new_page(name: str, title: str) -> dash.Dash:
    """A Dash app that loads nothing from elsewhere and shows its problems in a line of the page.

    Args:
        name: ``__name__`` of the file.
        title: of the browser's tab.
    """
    app = dash.Dash(
        name, title=title, update_title="", add_log_handler=False, serve_locally=True, on_error=_show_problem
    )
    in_browser(app, "theme", Output("theme", "data"), Input("url", "pathname"))
    return app


def in_browser(app: dash.Dash, function: str, *arguments: Any) -> None:
    """A callback that is one of the functions of ``lcsc.js``."""
    untyped: Any = app
    untyped.clientside_callback(ClientsideFunction("lcsc", function), *arguments)


def page_layout(*content: Content) -> html.Main:
    """The content of a page, and what every page has: its address, its theme, its clock, a line for problems."""
    return html.Main(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Store(id="theme"),
            dcc.Store(id="seen"),
            dcc.Store(id="remembered"),
            dcc.Interval(id="tick", interval=IDLE_MS),
            html.P(id="problem", className="problem", role="alert"),
            *content,
        ]
    )


def remember(app: dash.Dash, controls: Sequence[str]) -> None:
    """Keep the values of these controls in the address."""
    in_browser(app, "remember", Output("remembered", "data"), *(Input(control, "value") for control in controls))


def choose(
    app: dash.Dash,
    controls: Sequence[str],
    asked: Callable[[Mapping[str, str]], tuple[Any, ...]],
    known: Callable[[], list[str]],
) -> None:
    """Fill the controls when the page opens, and later, where there was nothing to choose, as soon as there is.

    Args:
        app: the page.
        controls: the first one is a dropdown of ``known``.
        asked: what the address asks for (:func:`asked_for`) → a value for each control.
        known: what there is to choose from now.
    """
    first = controls[0]

    @app.callback(
        *(Output(control, "value") for control in controls),
        Output(first, "options"),
        Input("url", "search"),
        Input("tick", "n_intervals"),
        State(first, "value"),
        State(first, "options"),
    )
    def fill(search: str | None, _: int, chosen: str | None, offered: list[str] | None) -> tuple[Any, ...]:
        now = known()
        if ctx.triggered_id != "tick" or (now and not chosen):
            return *asked(asked_for(search)), now
        return *[no_update] * len(controls), no_update if now == offered else now


def asked_for(search: str | None) -> dict[str, str]:
    """The address's query: name → value, the first one of each name."""
    return {name: values[0] for name, values in parse_qs((search or "").lstrip("?"), keep_blank_values=True).items()}


def chosen_study(reader: HistoryReader, asked: Mapping[str, str]) -> str | None:
    """The study that an address asks for; else, of its experiment or of the newest one, the best search.

    One that runs comes before the best one; a search before a baseline.
    """
    if asked.get("study"):
        return asked["study"]
    known = reader.experiments()
    if not known:
        return None
    studies = reader.read(asked["experiment"] if asked.get("experiment") in known else known[-1])
    running = [study for study in studies if study.running and not study.ended]
    searches = [study for study in studies if study.optimizer not in BASELINES]
    best = ranking(searches or studies)[0].optimizer
    return next(study.study for study in [*running, *searches, *studies] if study in running or study.optimizer == best)


def rhythm(studies: Iterable[StudyHistory]) -> int:
    """Milliseconds until the next refresh."""
    return RUNNING_MS if any(study.running for study in studies) else IDLE_MS


def signature(studies: Iterable[StudyHistory], *more: object) -> str:
    """Changes when anything that is drawn from these studies does."""
    return repr(([(study.study, study.study_id, study.revision) for study in studies], more))


def field(label: str, control: Any, *, group: bool = False) -> Content:
    """A control with its label; several controls that belong together are a group with a legend."""
    if group:
        return html.Fieldset([html.Legend(label), control], className="field")
    return html.Div([html.Label(label, htmlFor=control.id), control], className="field")


def graph(name: str, *, label: str) -> html.Div:
    """A place for a figure; ``label`` tells those who cannot see it what it shows."""
    place: Any = dcc.Graph(id=name, config=cast("Any", CONFIG), figure=BLANK)
    return html.Div([place, dcc.Store(id=f"{name}-new")], role="figure", **labelled(label))


def labelled(label: str) -> dict[str, Any]:
    """What tells those who cannot see a component what it is."""
    return {"aria-label": label}


def drawn(app: dash.Dash, name: str) -> Output:
    """Where a callback puts the figure of a :func:`graph`, so that a refresh leaves a reader's zoom as it is."""
    in_browser(app, "redraw", Output(name, "figure"), Input(f"{name}-new", "data"), State(name, "figure"))
    return Output(f"{name}-new", "data")


def section(title: str, *content: Content) -> html.Section:
    """A heading and what belongs to it."""
    return html.Section([html.H2(title), *content])


def table(header: Sequence[str], rows: Iterable[Sequence[Content]], *, text: int = 1) -> html.Div:
    """A plain table; the first ``text`` columns are text, the others numbers."""
    kinds = ["text" if i < text else "" for i in range(len(header))]
    head = [html.Th(name, scope="col", className=kind) for name, kind in zip(header, kinds, strict=True)]
    body = [html.Tr([html.Td(cell, className=kind) for cell, kind in zip(row, kinds, strict=True)]) for row in rows]
    return html.Div(html.Table([html.Thead(html.Tr(head)), html.Tbody(body)]), className="wide")


def study_link(study: StudyHistory, page: str = "study", text: str | None = None) -> html.A:
    """To a page of ours about a study."""
    return html.A(text or study.study, href=study_address(study.study, page))


def study_address(study: str, page: str = "study") -> str:
    """Of a page of ours about a study."""
    return f"{HOME}{page}?study={quote(study, safe='')}"


def optuna_link(study: StudyHistory, text: str = "optuna-dashboard") -> html.A:
    """To the same study in optuna-dashboard."""
    return html.A(text, href=f"{ROOT_PATH}studies/{study.study_id}")


def duration(seconds: float) -> str:
    """For people: two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _show_problem(error: Exception) -> None:
    """Where a callback failed: our own errors say what to do; of others the browser is told nothing."""
    if isinstance(error, LcscError):
        shown = str(error)
    else:
        notice(f"dashboard: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        shown = "This could not be drawn; the terminal of lcsc dashboard says why."
    dash.set_props("problem", {"children": shown})


READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}

_readers: weakref.WeakKeyDictionary[RDBStorage, HistoryReader] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forbid_writing(storage: RDBStorage) -> None:
    """Let the database refuse every write through this storage, whoever asks for it."""
    statement = READ_ONLY.get(storage.engine.dialect.name)
    if statement is None:
        return

    @sa.event.listens_for(storage.engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    storage.engine.dispose()  # connections made before the listener was there


def shared_reader(storage: RDBStorage) -> HistoryReader:
    """The one reader of a storage, so that pages and their refreshes read what is new only once."""
    with _lock:
        return _readers.setdefault(storage, HistoryReader(storage))
