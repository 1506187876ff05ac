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
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.artifacts import StoredImage, artifact_directory, caption, stored_images
from lcsc_opt.views.curves import AXES, comparison_figure, default_axis
from lcsc_opt.views.figures.look import CONFIG, number, template
from lcsc_opt.views.figures.study import distances_figure, own_figures
from lcsc_opt.views.figures.trade_off import siblings, trade_off_figure
from lcsc_opt.views.figures.writing import write_file
from lcsc_opt.views.landscape import landscape_figure, landscape_names, read_landscape
from lcsc_opt.views.progress import failures_of, progress_of
from lcsc_opt.views.ranking import CONFIDENCE, Ranked, comparison_table, headline, ranking, report_table

_SUFFIX = ".html"
_Table = tuple[tuple[str, ...], list[list[object]], int | None]
"""Header, rows, and the index of the best row."""
_SECTION_TITLES = {
    "coefficients": "Coefficients",
    "movement": "How the best coefficients moved",
    "shape": "Shape of the best coefficients over the search",
    "times": "Time per trial",
    "failures": "Failures",
}


def write_report(storage: RDBStorage, experiment: str, path: Path, *, artifacts: Path | None = None) -> Path:
    """Write the report of an experiment.

    Args:
        storage: only read.
        experiment: the name of a study file, such as ``digits``.
        path: ends in .html.
        artifacts: the folder of the image pairs; ``None`` is the folder where ``lcsc run`` stores them.

    Raises:
        StudyStoreError: there is no such experiment.
        LcscError: the file cannot be written, or has another suffix.
    """
    if path.suffix != _SUFFIX:
        raise LcscError(f"{path}: expected a file that ends in {_SUFFIX}")
    folder = artifact_directory(storage.url) if artifacts is None else artifacts
    write_file(path, report(HistoryReader(storage), experiment, folder).encode())
    return path


def report(reader: HistoryReader, experiment: str, artifacts: Path) -> str:
    """The page as text."""
    studies = reader.read(experiment)
    ranked = ranking(studies)
    first = default_axis(studies)
    answered = sum(study.chosen is not None for study in studies) > 1
    traded = trade_off_figure(siblings(reader, experiment))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("lcsc_opt", "views"), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of the figure's keys
    return environment.get_template("report.html.jinja").render(
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
        summaries=_summaries(studies),
        trade_off=None if traded is None else _figure(traded),
        distances=_figure(distances_figure(reader, studies)) if answered else None,
        landscapes=[
            (name, _figure(landscape_figure(read_landscape(reader, name))))
            for name in landscape_names(reader, experiment)
        ],
        images=_images(reader, _by_rank(studies, ranked), artifacts),
        studies=[_study(reader, study, studies) for study in studies],
        version=VERSION,
        templates={name: template(name).to_plotly_json() for name in ("light", "dark")},
        config=CONFIG,
        plotly=get_plotlyjs(),
    )


def _ranking_table(ranked: Sequence[Ranked], *, sampled: bool) -> _Table:
    header = ("optimizer", "seeds", "held out", "searched", "against EMA*", "difference", "verdict")
    axes = ("images", "evaluations") if sampled else ("evaluations",)
    rows = []
    for row in ranked:
        reach = [row.to_ema[axis].text if axis in row.to_ema else "" for axis in axes]
        cells = [
            row.label,
            row.seeds,
            number(*(row.held_out or (None,))),
            number(*(row.searched or (None,))),
            _percent(row.below_ema),
        ]
        rows.append([*cells, _difference(row), row.verdict, *reach])
    best = 0 if ranked and ranked[0].verdict == "best" else None
    return (*header, *(f"{axis} to EMA*" for axis in axes)), rows, best


def _summaries(studies: Sequence[StudyHistory]) -> _Table:
    header = ("study", "state", "evaluations", "failed", "searched", "held out", "images", "seconds of evaluation")
    rows = [
        [
            *(study.study, study.state, study.evaluations, len(study.failed)),
            *(number(study.searched), number(study.held_out_loss), f"{study.images:,}", f"{study.seconds:,.0f}"),
        ]
        for study in studies
    ]
    return header, rows, None


def _images(
    reader: HistoryReader, studies: Sequence[StudyHistory], folder: Path
) -> list[tuple[str, list[tuple[str, StoredImage]]]]:
    """(study, its images with their captions) for the studies that have images."""
    found = [(study, stored_images(reader, study, folder, prefix="images")) for study in studies]
    return [(study.study, [(caption(study, one.filename), one) for one in images]) for study, images in found if images]


def _by_rank(studies: Sequence[StudyHistory], ranked: Sequence[Ranked]) -> list[StudyHistory]:
    order = [row.optimizer for row in ranked]
    return sorted(studies, key=lambda study: order.index(study.optimizer))


def _study(reader: HistoryReader, study: StudyHistory, studies: Sequence[StudyHistory]) -> dict[str, Any]:
    figures = own_figures(reader, study, studies).items()
    return {
        "name": study.study,
        "state": _state(study),
        "warning": study.warning,
        "metrics": report_table(study.held_out.rows) if study.held_out is not None and study.held_out.rows else None,
        "figures": [(_SECTION_TITLES[name], _figure(figure)) for name, figure in figures],
        "failures": [[f.reason, f.attempts, f.lost] for f in failures_of(study)],
    }


def _state(study: StudyHistory) -> str:
    progress = progress_of(study)
    done = f"{progress.done:,}" + ("" if progress.total is None else f" of {progress.total:,}")
    rate = "" if progress.per_hour is None else f", {progress.per_hour:,.0f} an hour"
    failed = f", {progress.failed} trials failed" if progress.failed else ""
    return f"{progress.state}: {done} {progress.unit}{rate}{failed}."


def _figure(figure: go.Figure) -> dict[str, Any]:
    content = json.loads(str(figure.to_json()))
    content["layout"].pop("template")  # the page sets its own
    return {"content": content, "height": int(figure.layout.height or 420)}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"


def _difference(row: Ranked) -> str:
    found = row.difference
    if found is None:
        return "–"
    interval = "" if found.low is None else f" [{number(found.low)}, {number(found.high)}]"
    return f"{found.mean:+.3g}{interval}"
