"""Which optimizer is ahead, per evaluation, per image and per second, and whether the difference is real over seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import dash
import dash_ag_grid
from dash import Input, Output, State, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.base.jackknife import LEVEL
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.answer import first_line
from lcsc_opt.views.curves import AXES, default_axis
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.theme import empty_figure, style
from lcsc_opt.views.ranking import ANSWER, Row, loss_name, ranking
from lcsc_opt.views.tables import RANKING, comparison_tables, studies_table

CONTROLS = ("experiment", "axis", "only")
COLUMN = {
    "sortable": True,
    "resizable": True,
    "filter": True,
    "floatingFilter": True,
    "minWidth": 110,
    "flex": 1,
    "wrapHeaderText": True,
    "autoHeaderHeight": True,
}
LOSS_WIDTH = 150  # fits "0.08138 ± 0.0023"
SEVERAL_LINES: dict[str, Any] = {"wrapText": True, "autoHeight": True}
TEXTS = {
    "seeds": "seeds",
    "held_out": "held-out",
    "searched": "searched",
    "difference": "difference",
    "below_ema_percent": "against EMA*",
}
"""A number of the ranking → the column that has its text."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Compare", "Compare optimizers", storage, _controls(), _content())
    reader = page.reader
    page.choose(CONTROLS, lambda query: _chosen(reader, query), reader.experiments)

    @page.refreshes(*_outputs(page), controls=CONTROLS, states=[State("ranking", "columnDefs")])
    def draw(
        _: int,
        theme: Any,
        experiment: str | None,
        axis: str,
        only: Sequence[str] | None,
        seen: str,
        columns: Any,
    ) -> tuple[Any, ...]:
        if not experiment:
            nothing = "Choose an experiment." if reader.experiments() else parts.NO_EXPERIMENT
            blank = empty_figure(nothing, theme)
            return "", nothing, blank, [], [], "", [], "", parts.RUNNING_MS, ""
        studies, optimizers = _shown(reader, experiment, only or ())
        interval = parts.refresh_interval(studies)
        controls = (axis, optimizers)
        signature = parts.signature(studies, theme, *controls)
        if signature == seen:
            return "", *[no_update] * 7, interval, no_update
        new_columns: Any = _columns(loss_name(studies))
        if new_columns == columns:
            new_columns = no_update  # a reader may have made them wider
        rows = ranking(studies)
        return (
            "",
            first_line(studies),
            comparison_figure(studies, axis, theme=theme),
            new_columns,
            [_row(row) for row in rows],
            _metrics(rows),
            optimizers,
            _studies(studies),
            interval,
            signature,
        )

    page.app.callback(
        Output("download", "data"),
        Input("csv", "n_clicks"),
        State("ranking", "virtualRowData"),
        State("experiment", "value"),
        prevent_initial_call=True,
    )(_download)
    return page.app


def _outputs(page: parts.Page) -> list[Output]:
    """What a refresh draws, behind the problem and the headline."""
    return [
        page.drawn("curves"),
        Output("ranking", "columnDefs"),
        Output("ranking", "rowData"),
        Output("metrics", "children"),
        Output("only", "options"),
        Output("studies", "children"),
    ]


def _shown(reader: HistoryReader, experiment: str, only: Sequence[str]) -> tuple[list[Standing], list[str]]:
    """The studies that the page shows, and all optimizers of the experiment but EMA*, which a reader may choose from.

    Args:
        reader: of the studies.
        experiment: of which.
        only: the optimizers that the reader chose; EMA*, with which all are compared, is always shown.
    """
    studies = list(reader.read(experiment))
    optimizers = list(dict.fromkeys(study.optimizer for study in studies if study.optimizer != EMA_GRID))
    chosen = [name for name in only if name in optimizers]  # another experiment may not have them
    if chosen:
        studies = [study for study in studies if study.optimizer in {*chosen, EMA_GRID}]
    return studies, optimizers


def _download(_: int, rows: list[dict[str, Any]] | None, experiment: str) -> dict[str, Any]:
    """The ranking as a file, when its button is pressed."""
    name = experiment.replace("/", "-")
    return {"content": as_csv(rows or []), "filename": f"{name}.csv", "type": "text/csv"}


def _chosen(reader: HistoryReader, query: Mapping[str, str]) -> tuple[Any, ...]:
    """The values of the controls that the query of an address asks for."""
    experiments = reader.experiments()
    experiment = query.get("experiment") or next(reversed(experiments), None)
    axis = query.get("axis")
    if axis not in AXES:
        studies = reader.read(experiment) if experiment in experiments else ()
        axis = default_axis(studies)
    only = [name for name in query.get("only", "").split(",") if name]
    return experiment, axis, only


def _controls() -> list[Any]:
    axes = [{"label": title, "value": axis} for axis, title in AXES.items()]
    return [
        parts.field("Experiment", dcc.Dropdown(id="experiment", clearable=False)),
        parts.field("Only these and EMA*", dcc.Checklist(id="only", className="choices", inline=True), group=True),
        parts.field("Best so far against", dcc.Dropdown(axes, id="axis", clearable=False)),
    ]


def _content() -> list[Any]:
    return [
        parts.graph("curves", label="Best loss so far of each optimizer"),
        html.Div([html.H2("Ranking"), html.Button("Download as CSV", id="csv", type="button")], className="row spread"),
        dash_ag_grid.AgGrid(
            id="ranking",
            columnDefs=[],
            rowData=[],
            getRowId="params.data.optimizer",  # a refresh changes the row of an optimizer, and makes no new one
            defaultColDef=COLUMN,
            dashGridOptions={
                "domLayout": "autoHeight",
                "animateRows": False,
                "suppressMovableColumns": True,
                "suppressColumnVirtualisation": True,  # else the last columns have no header until somebody scrolls
            },
            style={"height": None},
        ),
        dcc.Download(id="download"),
        html.P(
            "Mean ± standard deviation over seeds; lower losses and higher scores are better. The difference is from "
            f"the best held-out value, with a {LEVEL:.0%} confidence interval over seeds, or, of one seed each, over "
            "images.",
            className="note",
        ),
        html.Div(id="metrics"),
        parts.section("Studies", html.Div(id="studies")),
    ]


def _metrics(rows: Sequence[Row]) -> Any:
    """The tables of the report, and its warnings; nothing before there is one."""
    report = rows[0].report
    sections: list[Any] = [parts.section(table.title, parts.table(table)) for table in comparison_tables(rows)]
    if report is not None:
        sections += [html.P(f"Warning: {warning}.") for warning in report.warnings]
    return sections


def _row(row: Row) -> dict[str, Any]:
    """The numbers that the table sorts by and that are downloaded, and the texts that it shows for them."""
    held_out, held_out_deviation = row.held_out or (None, None)
    searched, searched_deviation = row.searched or (None, None)
    difference = row.difference
    return {
        "optimizer": row.label,
        "seeds": row.seeds,
        "unfinished": row.unfinished,
        "held_out": held_out,
        "held_out_sd": held_out_deviation,
        "searched": searched,
        "searched_sd": searched_deviation,
        "verdict": row.verdict,
        "difference": None if difference is None else difference.mean,
        "difference_low": None if difference is None else difference.low,
        "difference_high": None if difference is None else difference.high,
        "below_ema_percent": None if row.below_ema is None else 100 * row.below_ema,
        "colour": "transparent" if row.optimizer == ANSWER else style(row.optimizer).colour,  # it is one of the others
        **{f"{field}_text": RANKING[column](row) for field, column in TEXTS.items()},
    }


def _columns(metric: str) -> list[dict[str, Any]]:
    """The columns of the ranking, as ag-grid describes them."""
    swatch = {"function": "({borderLeft: '6px solid ' + params.data.colour, fontWeight: 600})"}
    return [
        {
            "field": "optimizer",
            "headerName": "Optimizer",
            "minWidth": 190,
            "cellStyle": swatch,
            **SEVERAL_LINES,
        },
        _quantity("held_out", f"Held-out {metric}", minWidth=LOSS_WIDTH),
        {"field": "verdict", "headerName": "Verdict", "minWidth": 170, **SEVERAL_LINES},
        _quantity("below_ema_percent", "Against EMA*", minWidth=95),
        _quantity("difference", "Difference from the best", minWidth=185, **SEVERAL_LINES),
        _quantity("searched", f"Searched {metric}", minWidth=LOSS_WIDTH),
        _quantity("seeds", "Seeds", minWidth=70),
    ]


def _quantity(field: str, title: str, **options: Any) -> dict[str, Any]:
    """A column that sorts and filters by a number and shows a text; ``options`` are ag-grid's."""
    return {
        "field": field,
        "headerName": title,
        "type": "rightAligned",
        "filter": "agNumberColumnFilter",
        "valueFormatter": {"function": f"params.data.{field}_text"},
        **options,
    }


def _studies(studies: Sequence[Standing]) -> Any:
    """The table of studies, with a link to the page of each."""
    table = studies_table(studies)
    rows = [(parts.study_link(study), *cells[1:]) for study, cells in zip(studies, table.rows, strict=True)]
    return parts.table(dataclasses.replace(table, rows=rows))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as the table shows them now, numbers in full. Texts are escaped so that no spreadsheet computes them."""
    first = rows[0] if rows else {}
    names = [name for name in first if name != "colour" and not name.endswith("_text")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([[_harmless(row.get(name)) for name in names] for row in rows])
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """A text that begins like a formula gets an apostrophe, with which spreadsheets mark texts."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
