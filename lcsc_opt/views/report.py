"""A report of an experiment as one HTML file that needs nothing else: figures, tables and images are inside.

The page loads nothing from elsewhere, and its content policy forbids it. Names from the database are always text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from optuna.storages import RDBStorage
from plotly.offline import get_plotlyjs

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import short_metric
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import number
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.curves import AXES, comparison_figure, default_axis
from lcsc_opt.views.figures.look import CONFIG, template
from lcsc_opt.views.figures.study import distances_figure, own_figures
from lcsc_opt.views.figures.trade_off import trade_off_figure
from lcsc_opt.views.landscape import Landscape
from lcsc_opt.views.ranking import CONFIDENCE, Ranked, comparison_table, headline, points_of, ranking, report_table
from lcsc_opt.views.study_status import FailureReason, Progress, studies_table

_Table = tuple[tuple[str, ...], list[list[object]], int | None]
"""Header, rows, and the index of the best row."""
_SECTION_TITLES = {
    "coefficients": "Coefficients",
    "movement": "How the best coefficients moved",
    "times": "Time per trial",
}


def write_report(storage: RDBStorage, experiment: str, path: Path) -> Path:
    """Write the report of an experiment, with the images that ``lcsc run`` stored. The storage is only read.

    Raises:
        StudyStoreError: there is no such experiment.
        LcscError: the file cannot be written, or has another suffix.
    """
    if path.suffix != ".html":
        raise LcscError(f"{path}: expected a file that ends in .html")
    reader, folder = HistoryReader(storage), artifact_directory(storage.url)
    studies = reader.read(experiment)
    ranked = ranking(studies)
    order = [row.optimizer for row in ranked]
    images = [
        (study.study, StoredImage.of_answer(reader, study, folder))
        for study in sorted(studies, key=lambda study: order.index(study.optimizer))
    ]
    first = default_axis(studies)
    answered = sum(study.chosen is not None for study in studies) > 1
    traded = trade_off_figure(sum(points_of(reader, experiment, siblings=True).values(), ()))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("lcsc_opt", "views"), autoescape=True)
    environment.filters["short_metric"] = short_metric
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of the figure's keys
    page = environment.get_template("report.html.jinja").render(
        experiment=experiment,
        headline=headline(ranked, studies[0].metric),
        now=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        unfinished=[study.study for study in studies if not study.ended],
        ranking=_ranking_table(ranked, sampled=any(study.images for study in studies)),
        metrics=comparison_table(studies),
        confidence=f"{CONFIDENCE:.0%}",
        curves=[
            (AXES[axis], _figure(comparison_figure(studies, axis)))
            for axis in sorted(AXES, key=lambda axis: axis != first)
        ],
        summaries=studies_table(studies),
        trade_off=None if traded is None else _figure(traded),
        distances=_figure(distances_figure(reader, studies)) if answered else None,
        landscapes=[
            (name, _figure(Landscape.read(reader, name).figure())) for name in Landscape.names(reader, experiment)
        ],
        images=[(study, sheets) for study, sheets in images if sheets],
        studies=[_study(reader, study, studies) for study in studies],
        version=VERSION,
        templates={name: template(name).to_plotly_json() for name in ("light", "dark")},
        config=CONFIG,
        plotly=get_plotlyjs(),
    )
    write_atomically(path, page.encode(), error=LcscError)
    return path


def _ranking_table(ranked: Sequence[Ranked], *, sampled: bool) -> _Table:
    header = ("optimizer", "seeds", "held out", "searched", "against EMA*", "difference", "verdict")
    axes = ("images", "evaluations") if sampled else ("evaluations",)
    rows: list[list[object]] = []
    for row in ranked:
        measured = [number(*(value or (None,))) for value in (row.held_out, row.searched)]
        below = "–" if row.below_ema is None else f"{100 * row.below_ema:+.1f} %"
        reach = [row.to_ema[axis].text if axis in row.to_ema else "" for axis in axes]
        apart = row.difference
        interval = "" if apart is None or apart.low is None else f" [{number(apart.low)}, {number(apart.high)}]"
        difference = "–" if apart is None else f"{apart.mean:+.3g}{interval}"
        rows.append([row.label, row.seeds, *measured, below, difference, row.verdict, *reach])
    best = 0 if ranked and ranked[0].verdict == "best" else None
    return (*header, *(f"{axis} to EMA*" for axis in axes)), rows, best


def _study(reader: HistoryReader, study: StudyHistory, studies: Sequence[StudyHistory]) -> dict[str, Any]:
    """Of one study: its state, what was measured of its answer, its figures and failures."""
    progress, held_out = Progress.of(study), study.held_out
    total = "" if progress.total is None else f" of {progress.total:,}"
    rate = "" if progress.per_hour is None else f", {progress.per_hour:,.0f} an hour"
    failed = f", {progress.failed} trials failed" if progress.failed else ""
    return {
        "name": study.study,
        "state": f"{progress.state}: {progress.done:,}{total} {progress.unit}{rate}{failed}.",
        "warning": study.warning,
        "metrics": report_table(held_out.rows) if held_out is not None and held_out.rows else None,
        "figures": [
            (_SECTION_TITLES[name], _figure(figure))
            for name, figure in own_figures(reader, study, studies, _SECTION_TITLES).items()
        ],
        "failures": [[failure.reason, failure.attempts, failure.lost] for failure in FailureReason.of(study)],
    }


def _figure(figure: go.Figure) -> dict[str, Any]:
    content = json.loads(str(figure.to_json()))
    content["layout"].pop("template")  # the page sets its own
    return {"content": content, "height": int(figure.layout.height or 420)}
