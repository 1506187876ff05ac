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
from lcsc_opt.base.jackknife import LEVEL
from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views import count, short_metric, unbroken
from lcsc_opt.views.answer import first_line
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.curves import AXES, default_axis
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.study import coefficients_figure
from lcsc_opt.views.figures.theme import CONFIG, template
from lcsc_opt.views.pictures import FARTHEST_NOTE, why_no_images
from lcsc_opt.views.ranking import ranking
from lcsc_opt.views.tables import (
    comparison_tables,
    failures_table,
    grid_table,
    ranking_table,
    report_tables,
    studies_table,
    tables_of_study,
)

_Drawn = dict[str, Any]
"""A figure for the page: what plotly draws, and its height."""
_NARROW = Path(__file__).parent / "dashboard" / "static" / "narrow.js"


def write_report(storage: RDBStorage, experiment: str, path: Path) -> Path:
    """Write the report of an experiment, with the images that ``lcsc run`` stored. The storage is only read.

    Raises:
        StudyStoreError: there is no such experiment.
        LcscError: the file cannot be written, or has another suffix.
    """
    if path.suffix != ".html":
        raise LcscError(f"{path}: expected a file that ends in .html")
    reader = HistoryReader(storage)
    studies = reader.read(experiment)
    rows = ranking(studies)
    held_out = studies[0].report
    images = StoredImage.of_experiment(storage, experiment, held_out, artifact_directory(storage.url))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("lcsc_opt", "views"), autoescape=True)
    environment.filters |= {"short_metric": short_metric, "unbroken": unbroken}
    environment.policies["json.dumps_kwargs"] = {}  # jinja sorts the keys, else
    page = environment.get_template("report.html.jinja").render(
        experiment=experiment,
        opening=[image for image in images if image.kind == "samples"],
        why_no_images=why_no_images(studies[0], artifact_directory(storage.url)),
        answer=[] if held_out is None else report_tables(held_out, held_out.answer),
        warnings=() if held_out is None else held_out.warnings,
        cross_check=None if held_out is None else held_out.metrics.cross_check_text,
        headline=first_line(studies),
        now=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        unfinished=[study.study for study in studies if not study.ended],
        ranking=ranking_table(rows),
        metrics=comparison_tables(rows),
        confidence=f"{LEVEL:.0%}",
        axis=AXES[default_axis(studies)],
        curves=_drawn(comparison_figure(studies)),
        summaries=studies_table(studies),
        endings=[f"{study.study}: {study.how}." for study in studies if study.how],
        selected=[image for image in images if image.kind == "farthest"],
        studies=[_study(reader, study, studies) for study in studies],
        version=VERSION,
        templates={name: template(name).to_plotly_json() for name in ("light", "dark")},
        config=CONFIG,
        plotly=get_plotlyjs(),
        farthest_note=FARTHEST_NOTE,
        narrow=_NARROW.read_text(encoding="utf-8"),
    )
    write_atomically(path, page, error=LcscError)
    return path


def _study(reader: HistoryReader, study: Standing, studies: Sequence[Standing]) -> dict[str, Any]:
    """Of one study: its state, what was measured of its answer, its figures and failures."""
    state = f"{study.state}: {count(study.budget_spent, study.budget_total)} {study.budget_unit}"
    if study.summary.failed:
        state += f", {study.summary.failed} trials failed"
    coefficients = coefficients_figure(reader, study, ema_grid(studies))
    return {
        "name": study.study,
        "state": f"{state}.",
        "metrics": tables_of_study(study),
        "grid": grid_table(reader, study),
        "coefficients": _drawn(coefficients) if coefficients.data else None,
        "failures": failures_table(reader.failures(study)),
    }


def _drawn(figure: go.Figure) -> _Drawn:
    """A figure as JSON for the page's script, which draws it."""
    content = json.loads(str(figure.to_json()))
    content["layout"].pop("template")  # the page sets its own
    return {"content": content, "height": content["layout"]["height"]}
