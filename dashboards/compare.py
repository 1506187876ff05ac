"""Which optimizer is ahead, per evaluation, per image and per second, and whether the difference is real over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

import dash
import dash_ag_grid
from dash import Input, Output, State, dcc, html, no_update
from optuna.storages import RDBStorage

from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import EMA_GRID
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import number
from lcsc_opt.views.curves import AXES, comparison_figure, default_axis
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.figures.look import CONFIG, Theme, empty_figure, style
from lcsc_opt.views.figures.trade_off import metrics_of, parallel_figure, trade_off_figure
from lcsc_opt.views.ranking import CONFIDENCE, Ranked, headline, points_of, ranking, varied_keys
from lcsc_opt.views.study_status import Progress, duration
from lcsc_opt.views.tables import comparison_table, settings_table

NOTHING = "No experiment in this database yet. Start one: lcsc run STUDY_FILE"
CONTROLS = ("experiment", "axis", "only", "scale", "target", "across", "up")
ONE_METRIC = "No two held-out metrics to compare: see held_out_metrics in docs/studies.md"
SCALES = {"x": "logarithmic cost", "y": "logarithmic loss"}
COLUMN = {
    **{"sortable": True, "resizable": True, "filter": True, "floatingFilter": True, "minWidth": 110, "flex": 1},
    **{"wrapHeaderText": True, "autoHeaderHeight": True},
}
LOSS = {"minWidth": 150}  # fits "0.08138 ± 0.0023"
LINES = {"wrapText": True, "autoHeight": True}  # "1,234,000 (not reached 1 of 5)" takes two lines


def build(storage: RDBStorage) -> dash.Dash:
    """The page over ``storage``."""
    page = parts.Page(__name__, "Compare", storage, _content())
    reader = page.reader
    page.choose(CONTROLS, lambda asked: _chosen(reader, asked), reader.experiments)

    @page.refreshes(
        page.drawn("curves"),
        Output("ranking", "columnDefs"),
        Output("ranking", "rowData"),
        Output("metrics", "children"),
        page.drawn("trade-off"),
        Output("across", "options"),
        Output("up", "options"),
        Output("only", "options"),
        Output("sweep", "children"),
        Output("settings", "children"),
        Output("studies", "children"),
        controls=CONTROLS,
        states=[State("ranking", "columnDefs")],
    )
    def draw(
        _: int,
        theme: Any,
        experiment: str | None,
        axis: str,
        only: Sequence[str] | None,
        scale: Sequence[str],
        target: float | None,
        across: str | None,
        up: str | None,
        seen: str,
        columns: Any,
    ) -> tuple[Any, ...]:
        if not experiment:
            blank = empty_figure(NOTHING, theme)
            return "", NOTHING, blank, [], [], "", blank, [], [], [], "", "", "", parts.RUNNING_MS, ""
        everyone = reader.read(experiment)
        offered = list(dict.fromkeys(study.optimizer for study in everyone if study.optimizer != EMA_GRID))
        only = [name for name in only or () if name in offered]  # another experiment may not have them
        studies = _pinned(everyone, only)
        points = points_of(reader, experiment, siblings=True)
        points = {point: _pinned(group, only) for point, group in points.items()}
        sweep, traded = _sweep(points, experiment, theme), [study for point in points.values() for study in point]
        now = parts.signature([*studies, *traded], theme, axis, scale, target, across, up, offered)
        if now == seen:
            return *[no_update] * 13, parts.refresh_interval(studies), no_update
        ranked = ranking(studies, value=target)
        figure = comparison_figure(studies, axis, log_x="x" in scale, log_y="y" in scale, theme=theme)
        metric = next((study.metric for study in studies if study.metric != "loss"), "loss")
        listed = _columns(metric, axis, target)
        sent = no_update if listed == columns else listed  # a reader may have made them wider
        metrics = metrics_of(traded)
        chosen = (name if name in metrics else None for name in (across, up))
        drawn = trade_off_figure(traded, *chosen, theme=theme) or empty_figure(ONE_METRIC, theme)
        measured = comparison_table(studies)
        table = "" if measured is None else parts.section("Evaluation metrics, held out", parts.table(*measured))
        above = ("", headline(ranked, metric), figure, sent, [_row(row, axis) for row in ranked])
        below = (table, drawn, metrics, metrics, offered, sweep, _settings(studies), _studies(studies))
        return *above, *below, parts.refresh_interval(studies), now

    @page.app.callback(
        Output("download", "data"),
        Input("csv", "n_clicks"),
        State("ranking", "virtualRowData"),
        State("experiment", "value"),
        prevent_initial_call=True,
    )
    def download(_: int, rows: list[dict[str, Any]] | None, experiment: str) -> dict[str, Any]:
        """The ranking as a file, when its button is pressed."""
        name = experiment.replace("/", "-")
        return {"content": as_csv(rows or []), "filename": f"{name}.csv", "type": "text/csv"}

    return page.app


def _chosen(reader: HistoryReader, asked: Mapping[str, str]) -> tuple[Any, ...]:
    """The values of the controls that an address asks for."""
    known = reader.experiments()
    experiment = asked.get("experiment") or (known[-1] if known else None)
    studies = reader.read(experiment) if experiment in known else ()
    axis = asked["axis"] if asked.get("axis") in AXES else default_axis(studies)
    scale = [name for name in asked.get("scale", "y").split(",") if name in SCALES]
    traded = asked.get("across") or None, asked.get("up") or None
    only = [name for name in asked.get("only", "").split(",") if name]
    return experiment, axis, only, scale, _number(asked.get("target")), *traded


def _pinned(studies: Sequence[StudyHistory], only: Sequence[str]) -> tuple[StudyHistory, ...]:
    """Those of these optimizers, if any are named, and EMA*, with which everything is compared."""
    return tuple(study for study in studies if not only or study.optimizer in {*only, EMA_GRID})


def _content() -> list[Any]:
    axes = [{"label": title, "value": axis} for axis, title in AXES.items()]
    scales = [{"label": title, "value": name} for name, title in SCALES.items()]
    return [
        html.H1("Compare optimizers"),
        html.Div(id="headline", className="headline", role="status"),
        html.Div(
            [
                parts.field("Experiment", dcc.Dropdown(id="experiment", clearable=False)),
                parts.field(
                    "Only these and EMA*", dcc.Checklist(id="only", className="choices", inline=True), group=True
                ),
                parts.field("Best so far against", dcc.Dropdown(axes, id="axis", clearable=False)),
                parts.field("Scale", dcc.Checklist(scales, id="scale", className="choices", inline=True), group=True),
                parts.field(
                    "Cost to reach a loss of",
                    dcc.Input(id="target", type="number", debounce=True, placeholder="none", min=0, step="any"),
                ),
            ],
            className="controls",
        ),
        parts.graph("curves", label="Best loss so far of each optimizer"),
        html.Div([html.H2("Ranking"), html.Button("Download as CSV", id="csv", type="button")], className="row spread"),
        dash_ag_grid.AgGrid(
            id="ranking",
            columnDefs=[],
            rowData=[],
            getRowId="params.data.optimizer",
            defaultColDef=COLUMN,
            dashGridOptions={
                "domLayout": "autoHeight",
                "animateRows": False,
                "suppressMovableColumns": True,
                "suppressColumnVirtualisation": True,
            },
            style={"height": None},
        ),
        dcc.Download(id="download"),
        html.P(
            "Mean ± standard deviation over seeds; lower is better. The difference is from the best held-out loss, "
            f"with a {CONFIDENCE:.0%} confidence interval over seeds. "
            "Costs are medians over seeds, on the search's noise.",
            className="note",
        ),
        html.Div(id="metrics"),
        html.H2("Trade-off"),
        html.Div(
            [
                parts.field("Held-out metric across", dcc.Dropdown(id="across", placeholder="precision")),
                parts.field("Held-out metric upwards", dcc.Dropdown(id="up", placeholder="fid")),
            ],
            className="controls",
        ),
        parts.graph("trade-off", label="One held-out metric of the answers against another"),
        html.Div(id="sweep"),
        html.Div(id="settings"),
        parts.section("Studies", html.Div(id="studies")),
    ]


def _row(row: Ranked, axis: str) -> dict[str, Any]:
    """The numbers that the table sorts by and that are downloaded, and the texts that it shows for them."""
    found: dict[str, Any] = {"optimizer": row.label, "seeds": row.seeds, "unfinished": row.seeds - row.finished}
    for name in ("held_out", "searched"):
        mean, deviation = getattr(row, name) or (None, None)
        found |= {name: mean, f"{name}_sd": deviation, f"{name}_text": number(mean, deviation)}
    for name, costs in (("to_ema", row.to_ema), ("to_value", row.to_value)):
        reach = costs.get(axis)
        found |= {name: None if reach is None else reach.median, f"{name}_text": "" if reach is None else reach.text}
    below, apart = row.below_ema, row.difference
    ends = (None, None) if apart is None else (apart.low, apart.high)
    interval = "" if None in ends else f" [{ends[0]:+.3g}, {ends[1]:+.3g}]"
    return {
        **found,
        **{"doubtful": row.doubtful, "verdict": row.verdict},
        **{"difference": None if apart is None else apart.mean, "difference_low": ends[0], "difference_high": ends[1]},
        "difference_text": "–" if apart is None else f"{apart.mean:+.3g}{interval}",
        "below_ema_percent": None if below is None else 100 * below,
        "below_ema_text": "–" if below is None else f"{100 * below:+.1f} %",
        "colour": style(row.optimizer).colour,
    }


def _columns(metric: str, axis: str, target: float | None) -> list[dict[str, Any]]:
    swatch = {"function": "({borderLeft: '6px solid ' + params.data.colour, fontWeight: 600})"}
    costs = [{**_quantity("to_ema", f"{AXES[axis].capitalize()} to EMA*"), **LINES}]
    if target is not None:
        costs.append({**_quantity("to_value", f"{AXES[axis].capitalize()} to {target:g}"), **LINES})
    return [
        {"field": "optimizer", "headerName": "Optimizer", **LINES, "minWidth": 150, "cellStyle": swatch},
        {**_quantity("held_out", f"Held-out {metric}"), **LOSS},
        {"field": "verdict", "headerName": "Verdict", **LINES, "minWidth": 170},
        {**_quantity("below_ema_percent", "Against EMA*", text="below_ema_text"), "minWidth": 95},
        {**_quantity("difference", "Difference from the best"), **LINES, "minWidth": 185},
        *costs,
        {**_quantity("searched", f"Searched {metric}"), **LOSS},
        {"field": "seeds", "headerName": "Seeds", "type": "rightAligned", "minWidth": 70},
    ]


def _quantity(field: str, title: str, *, text: str | None = None) -> dict[str, Any]:
    """A column that sorts and filters by a number and shows a text."""
    return {
        "field": field,
        "headerName": title,
        "type": "rightAligned",
        "filter": "agNumberColumnFilter",
        "valueFormatter": {"function": f"params.data.{text or f'{field}_text'}"},
    }


def _sweep(points: Mapping[str, Sequence[StudyHistory]], experiment: str, theme: Theme) -> Any:
    """All points of the experiment's sweep: the values of their settings, and their results."""
    if not (keys := varied_keys(points)):
        return ""
    rows = []
    for point, studies in points.items():
        here = "shown" if point == experiment else html.A("show", href=f"?experiment={quote(point)}")
        varied = split_point(point)[1]
        for row in ranking(studies):
            below = "–" if row.below_ema is None else f"{100 * row.below_ema:+.1f} %"
            held_out, searched = (number(*(value or (None, None))) for value in (row.held_out, row.searched))
            values = [varied.get(key, "–") for key in keys]
            rows.append([*values, row.label, row.seeds, held_out, below, searched, here])
    header = (*keys, "optimizer", "seeds", "held out", "against EMA*", "searched", "")
    drawn: Any = dcc.Graph(figure=parallel_figure(points, theme), config=cast("Any", CONFIG))
    return parts.section("Sweep", drawn, parts.table(header, rows, text=len(keys) + 1))


def _settings(studies: Sequence[StudyHistory]) -> Any:
    """The settings in which these studies differ; those that a sweep varies are in its own table."""
    differ = settings_table(studies)
    return "" if differ is None else parts.section("Settings that differ", parts.table(*differ, text=len(differ[0])))


def _studies(studies: Sequence[StudyHistory]) -> Any:
    header = ("study", "state", "done", "failed", "held out", "searched", "images", "time evaluating", "")
    return parts.table(header, [_study(study) for study in studies], text=2)


def _study(study: StudyHistory) -> list[Any]:
    state = Progress.of(study)
    finished = study.finished
    done = f"{state.done:,}" + ("" if state.total is None else f" of {state.total:,}") + f" {state.unit}"
    return [
        parts.study_link(study),
        state.state,
        done,
        state.failed,
        number(None if study.held_out is None else study.held_out.loss),
        number(study.searched),
        f"{finished['images'].sum():,.0f}",
        duration(float(finished["seconds"].sum())),
        parts.optuna_link(study),
    ]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as the table shows them now, numbers in full. Texts are escaped so that no spreadsheet computes them."""
    names = [name for name in (rows[0] if rows else {}) if name != "colour" and not name.endswith("_text")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([[_harmless(row.get(name)) for name in names] for row in rows])
    return text.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
