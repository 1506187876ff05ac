"""What the shipped pages have in common, for a user's own page as well: one app, one layout, one refresh interval.

A page keeps what it shows in its address: the values of its controls, by their ids. It refreshes while something runs,
and sends a figure only when what it is drawn from has changed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, urlencode

import dash
from dash import ClientsideFunction, Input, Output, State, ctx, dcc, html, no_update
from flask import Response, abort
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import notice
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import Table, short_metric, unbroken
from lcsc_opt.views.dashboard.pages import HOME
from lcsc_opt.views.figures.theme import CONFIG
from lcsc_opt.views.ranking import ranking

RUNNING_MS = 2000  # between refreshes while something runs
IDLE_MS = 15_000
NO_EXPERIMENT = "No experiment in this database yet. Start one: lcsc run STUDY_FILE"
_BLANK = {  # invisible, and as high as the figure that will be drawn there
    "data": [],
    "layout": {
        "xaxis": {"visible": False},
        "yaxis": {"visible": False},
        "height": 420,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    },
}

Content = Any  # of Dash: a component, a text, or a list of them
ServedImage = tuple[str, Mapping[str, object], str]
"""An image that a page serves: the path below the pages, the query, the caption."""
_Callback = Callable[..., tuple[Any, ...]]
_Decorator = Callable[[_Callback], _Callback]


class Page:
    """A Dash app that loads nothing from elsewhere and shows its problems in a line of the page.

    Args:
        name: ``__name__`` of the file.
        title: of the browser's tab.
        heading: of the page; below it stands the headline, which :meth:`refreshes` writes.
        storage: of the studies.
        controls: what a reader chooses.
        content: of the page, below the controls.

    Attributes:
        app: what a page's ``build`` returns.
        reader: of the studies.
    """

    def __init__(
        self,
        name: str,
        title: str,
        heading: str,
        storage: RDBStorage,
        controls: Sequence[Content],
        content: Sequence[Content],
    ) -> None:
        self.app = dash.Dash(
            name, title=title, update_title="", add_log_handler=False, serve_locally=True, on_error=_show_problem
        )
        self.reader = shared_reader(storage)
        self.app.layout = html.Main(
            [
                dcc.Location(id="url", refresh=False),
                # the look, the number of the refresh, and the signature of what is shown; the last one is empty: a
                # callback must have an output
                *(dcc.Store(id=name) for name in ("theme", "refresh", "seen", "remembered")),
                dcc.Interval(id="tick", interval=IDLE_MS),
                html.P(id="problem", className="problem", role="alert"),
                html.H1(heading),
                html.Div(id="headline", className="headline", role="status"),
                html.Div(controls, className="controls"),
                *content,
            ],
            id="page",
        )
        self.in_browser("theme", Output("theme", "data"), Input("url", "pathname"))
        self.in_browser("refresh", Output("refresh", "data"), Input("tick", "n_intervals"))

    def in_browser(self, function: str, *arguments: Any) -> None:
        """A callback that is one of the functions of ``lcsc.js``."""
        untyped: Any = self.app
        untyped.clientside_callback(ClientsideFunction("lcsc", function), *arguments)

    def choose(
        self,
        controls: Sequence[str],
        values_of: Callable[[Mapping[str, str]], tuple[Any, ...]],
        options_now: Callable[[], list[str]],
    ) -> None:
        """Keep the values of the controls in the address, and fill them from it when the page opens.

        Where there was nothing to choose then, they are filled later, as soon as there is. Until then, the page is
        its headline, which says what to run.

        Args:
            controls: the first one is a dropdown.
            values_of: the query of the address, name → value → a value for each control.
            options_now: the options of the dropdown at the moment.
        """
        self.in_browser("remember", Output("remembered", "data"), *(Input(control, "value") for control in controls))
        first = controls[0]

        @self.app.callback(
            *(Output(control, "value") for control in controls),
            Output(first, "options"),
            Output("page", "className"),
            Input("url", "search"),
            Input("refresh", "data"),
            State(first, "value"),
            State(first, "options"),
        )
        def fill(search: str | None, _: int, chosen: str | None, shown: list[str] | None) -> tuple[Any, ...]:
            options = options_now()
            page_class = "" if options else "nothing"
            is_opened = ctx.triggered_id != "refresh"
            is_first_choice = options and not chosen
            if is_opened or is_first_choice:
                # a list that a reader has emptied is blank
                query = parse_qs((search or "").lstrip("?"), keep_blank_values=True)
                values = values_of({name: texts[0] for name, texts in query.items()})
                return *values, options, page_class
            same_values = [no_update] * len(controls)
            if options == shown:
                return *same_values, no_update, no_update
            return *same_values, options, page_class

    def chosen_study(self, query: Mapping[str, str]) -> str | None:
        """The study that the query of an address asks for; else one of its experiment, or of the newest one.

        It is one that runs, else the first seed of the best optimizer; a search comes before a baseline.
        """
        if query.get("study"):
            return query["study"]
        experiments = self.reader.experiments()
        if not experiments:
            return None
        experiment = query.get("experiment", "")
        if experiment not in experiments:
            experiment = experiments[-1]
        studies = self.reader.read(experiment)
        for study in studies:
            if study.running and not study.ended:
                return study.study
        searches = [study for study in studies if study.optimizer not in BASELINES] or studies
        place = {row.optimizer: index for index, row in enumerate(ranking(searches))}
        return min(searches, key=lambda study: place[study.optimizer]).study

    def refreshes(self, *outputs: Output, controls: Sequence[str], states: Sequence[State] = ()) -> _Decorator:
        """Decorates the one callback that draws a page: when it opens, at each refresh, and when a control changes.

        The callback takes the number of the refresh, the theme, the controls' values, the signature of what is shown,
        and the ``states``. It returns the problem, the headline, the outputs, the milliseconds until the next refresh,
        and the signature of what is shown then.
        """
        decorator: _Decorator = self.app.callback(
            *(Output(name, "children") for name in ("problem", "headline")),
            *outputs,
            Output("tick", "interval"),
            Output("seen", "data"),
            Input("refresh", "data"),
            Input("theme", "data"),
            *(Input(control, "value") for control in controls),
            State("seen", "data"),
            *states,
        )
        return decorator

    def drawn(self, name: str) -> Output:
        """Where a callback puts the figure of a :func:`graph`, so that a refresh leaves a reader's zoom as it is."""
        self.in_browser("redraw", Output(name, "figure"), Input(f"{name}-new", "data"), State(name, "figure"))
        return Output(f"{name}-new", "data")


def refresh_interval(studies: Iterable[Standing]) -> int:
    """Milliseconds until the next refresh."""
    if any(study.running for study in studies):
        return RUNNING_MS
    return IDLE_MS


def signature(studies: Iterable[Standing], *more: object) -> str:
    """Changes when anything that is drawn from these studies does."""
    shown = repr((list(studies), more))
    return hashlib.sha256(shown.encode()).hexdigest()


def field(label: str, control: Any, *, group: bool = False) -> Content:
    """A control with its label; several controls that belong together are a group with a legend."""
    if group:
        return html.Fieldset([html.Legend(label), control], className="field")
    return html.Div([html.Label(label, htmlFor=control.id), control], className="field")


def graph(name: str, *, label: str) -> html.Div:
    """A place for a figure; ``label`` tells those who cannot see it what it shows."""
    place: Any = dcc.Graph(id=name, config=cast("Any", CONFIG), figure=_BLANK)
    attributes: Any = {"aria-label": label}
    return html.Div([place, dcc.Store(id=f"{name}-new")], role="figure", **attributes)


def section(title: str, *content: Content) -> html.Section:
    """A heading and what belongs to it."""
    return html.Section([html.H2(title), *content])


def table(drawn: Table) -> html.Div:
    """A plain table, whose cells may be components, too."""
    classes = ["text"] * drawn.text + [""] * (len(drawn.header) - drawn.text)
    head = []
    for name, css_class in zip(drawn.header, classes, strict=True):
        # spaces without a width, at which a long name of a metric may break
        breakable = unbroken(short_metric(name)).replace("@", "\u200b@").replace(".", ".\u200b")
        head.append(html.Th(breakable, title=name, scope="col", className=css_class))
    body = []
    for row in drawn.rows:
        texts: list[Content] = [unbroken(cell) if isinstance(cell, str) else cell for cell in row]
        cells = [html.Td(cell, className=css_class) for cell, css_class in zip(texts, classes, strict=True)]
        body.append(html.Tr(cells))
    return html.Div(html.Table([html.Thead(html.Tr(head)), html.Tbody(body)]), className="wide")


def study_link(study: Standing, page: str = "study", text: str | None = None) -> html.A:
    """To a page of ours about a study."""
    return html.A(text or study.study, href=f"{HOME}{page}?{urlencode({'study': study.study})}")


def panes(images: Iterable[ServedImage], note: str) -> Content:
    """Images that scroll, each with a link to it in full, and a note; an image is a :data:`ServedImage`."""
    figures = []
    for path, query, caption in images:
        address = _address(path, query)
        label: Any = {"aria-label": f"{caption}; scrolls"}
        picture = html.Div(html.Img(src=address, alt=caption), className="pane", tabIndex=0, role="group", **label)
        figures.append(html.Figure([picture, html.Figcaption(html.A(caption, href=address, target="_blank"))]))
    return [html.Div(figures, className="panes"), html.P(note, className="note")]


def one_over_another(name: str, images: Sequence[ServedImage]) -> Content:
    """Two of several images of one size at the same place: lists choose them, a slider moves the edge between them.

    ``name`` tells the ids of the page's several such places apart. At first, they are the first image and the last.
    """
    addresses = [(_address(path, query), caption) for path, query, caption in images]
    pair = [addresses[0], addresses[-1]]
    chosen: list[Content] = []
    pictures = []
    for side, (shown, caption) in zip(("left", "right"), pair, strict=True):
        options = [html.Option(text, value=address, selected=address == shown) for address, text in addresses]
        place: Any = {"data-shows": f"{name}-{side}"}
        choice = html.Select(options, id=f"{name}-{side}-choice", **place)
        chosen.append(field(f"{side.capitalize()} of the edge", choice))
        pictures.append(html.Img(src=shown, alt=caption, id=f"{name}-{side}"))
    slider = dcc.Input(id=f"{name}-edge", type="range", min=0, max=100, value=50)
    controls = html.Div([*chosen, field("Edge", slider)], className="controls")
    return [html.H2("One over the other"), html.Div([controls, html.Div(pictures, className="over")], className="slid")]


def _address(path: str, query: Mapping[str, object]) -> str:
    return f"{HOME}{path}?{urlencode(query)}"


def image_response(content: bytes | None) -> Response:
    """A PNG that a page serves itself, and that cannot run anything; 404 if there is none."""
    if content is None:
        abort(404)
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(content, mimetype="image/png", headers=headers)


def _show_problem(error: Exception) -> None:
    """Where a callback failed: our own errors say what to do; of others the browser is told nothing."""
    if isinstance(error, LcscError):
        message = str(error)
    else:
        notice(f"dashboard: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        message = "This could not be drawn; the terminal of lcsc dashboard says why."
    dash.set_props("problem", {"children": message})


@functools.lru_cache(maxsize=4)  # few, since it keeps the storages open
def shared_reader(storage: RDBStorage) -> HistoryReader:
    """The one reader of a storage, so that pages and their refreshes read what is new only once."""
    return HistoryReader(storage)
