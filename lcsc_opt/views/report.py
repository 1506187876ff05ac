"""A report of an experiment as one HTML file that needs nothing else: figures, tables and images are inside.

It loads nothing from elsewhere, and its policy forbids it. Names from the database are text wherever they stand.
"""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from optuna.storages import RDBStorage
from plotly.offline import get_plotlyjs

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import FigureError
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.summary import summaries_of
from lcsc_opt.views.artifacts import artifact_directory, stored_images
from lcsc_opt.views.curves import AXES, comparison, default_axis
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.landscape import landscape_figure
from lcsc_opt.views.figures.look import CONFIG, template
from lcsc_opt.views.figures.of_study import own_figures
from lcsc_opt.views.figures.study import distances_figure
from lcsc_opt.views.figures.writing import write_file
from lcsc_opt.views.landscape import LandscapeReader
from lcsc_opt.views.patterns import distances_of
from lcsc_opt.views.progress import failures_of, progress_of
from lcsc_opt.views.ranking import CONFIDENCE, Ranked, headline, ranking

SUFFIX = ".html"
SECTION_TITLES = {
    "coefficients": "Coefficients",
    "movement": "How the best coefficients moved",
    "shape": "Shape of the best coefficients over the search",
    "times": "Time per trial",
    "failures": "Failures",
}
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --best: #dafbe1; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --text: #e6eaee; --soft: #9198a1; --line: #2c3238; --best: #12361f; }
}
body { background: var(--paper); color: var(--text); font: 15px/1.5 system-ui, 'Liberation Sans', Arial, sans-serif;
  max-width: 1100px; margin: 0 auto; padding: 1.5rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; }
p.note, footer { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child, td.text { text-align: left; }
td.reason { white-space: normal; text-align: left; overflow-wrap: anywhere; } tr.best td { background: var(--best); }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
img { max-width: 100%; image-rendering: pixelated; background: #fff; }
a { color: inherit; } :focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
"""
SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
const read = id => JSON.parse(document.getElementById(id).textContent);
const templates = read('templates'), config = read('config');
const template = () => templates[dark.matches ? 'dark' : 'light'];
function draw(place) {
  const figure = JSON.parse(place.previousElementSibling.textContent);
  Plotly.newPlot(place, figure.data, {...figure.layout, template: template()}, config);
  place.dataset.drawn = '';
}
const visible = place => !place.closest('details:not([open])');
const drawVisible = () => document.querySelectorAll('.figure:not([data-drawn])').forEach(place => {
  if (visible(place)) draw(place);
});
document.querySelectorAll('details').forEach(part => part.addEventListener('toggle', drawVisible));
dark.addEventListener('change', () => document.querySelectorAll('.figure[data-drawn]').forEach(place =>
  Plotly.relayout(place, {template: template()})));
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
drawVisible();
"""


def write_report(storage: RDBStorage, experiment: str, path: Path, *, artifacts: Path | None = None) -> Path:
    """Write the report of an experiment.

    Args:
        storage: only read.
        experiment: the name of a study file, such as ``digits``.
        path: ends in .html.
        artifacts: the folder of the image pairs; by default where ``lcsc run`` stores them.

    Raises:
        StudyStoreError: when there is no such experiment.
        FigureError: when the file cannot be written, or is to have another suffix.
    """
    if path.suffix != SUFFIX:
        raise FigureError(f"{path}: expected a file that ends in {SUFFIX}")
    folder = artifact_directory(storage.url) if artifacts is None else artifacts
    write_file(path, report(HistoryReader(storage), experiment, folder).encode())
    return path


def report(reader: HistoryReader, experiment: str, artifacts: Path) -> str:
    """The page as text."""
    studies = reader.read(experiment)
    ranked = ranking(studies)
    parts = [
        _heading(experiment, studies, ranked),
        *_comparison(studies, ranked),
        *_studies(reader, studies),
        *_landscapes(LandscapeReader(reader), experiment),
        *_images(reader, _by_rank(studies, ranked), artifacts),
        *_each_study(reader, studies),
    ]
    templates = {name: template(name).to_plotly_json() for name in ("light", "dark")}
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(experiment)}</title><style>{STYLE}</style></head><body>",
            *parts,
            f"<footer>Made by lcsc_opt {_text(VERSION)}.</footer>",
            _data("templates", templates),
            _data("config", CONFIG),
            f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script></body></html>",
        ]
    )


def _heading(experiment: str, studies: Sequence[StudyHistory], ranked: Sequence[Ranked]) -> str:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    unfinished = [study.study for study in studies if not study.ended]
    note = f" Unfinished: {_text(', '.join(unfinished))}." if unfinished else ""
    return (
        f"<h1>{_text(experiment)}</h1><p><strong>{_text(headline(ranked, studies[0].metric))}</strong></p>"
        f'<p class="note">{len(studies)} studies, read {_text(now)}.{note}</p>'
    )


def _comparison(studies: Sequence[StudyHistory], ranked: Sequence[Ranked]) -> Iterator[str]:
    yield "<h2>Comparison</h2>"
    yield _ranking_table(ranked)
    yield (
        f'<p class="note">Mean ± standard deviation over seeds; lower is better. The difference is from the best '
        f"held-out loss, with a {CONFIDENCE:.0%} bootstrap interval over seeds. The cost is that of being as good as "
        "EMA* on the search's noise, the median over seeds.</p>"
    )
    first = default_axis(studies)
    for axis in sorted(AXES, key=lambda axis: axis != first):
        summary = f"Best so far against {_text(AXES[axis])}"
        drawn = _figure(comparison_figure(comparison(studies, axis)))
        yield f"<details{' open' if axis == first else ''}><summary>{summary}</summary>{drawn}</details>"


def _ranking_table(ranked: Sequence[Ranked]) -> str:
    header = ("optimizer", "seeds", "held out", "searched", "against EMA*", "difference", "verdict")
    costs = ("images to EMA*", "evaluations to EMA*")
    second = [row.second_metric for row in ranked if row.second_metric is not None][:1]
    rows = []
    for row in ranked:
        reach = [row.to_ema[axis].text if axis in row.to_ema else "" for axis in ("images", "evaluations")]
        cells = [row.label, row.seeds, _spread(row.held_out), _spread(row.searched), _percent(row.below_ema)]
        beside = [_spread(row.second)] * len(second)
        rows.append([*cells, *beside, _difference(row), row.verdict, *reach])
    return _table(
        (*header[:5], *second, *header[5:], *costs), rows, best=0 if ranked and ranked[0].verdict == "best" else None
    )


def _studies(reader: HistoryReader, studies: Sequence[StudyHistory]) -> Iterator[str]:
    header = ("study", "state", "evaluations", "failed", "searched", "held out", "images", "seconds of evaluation")
    rows = [
        [
            *(summary.study, summary.state, summary.evaluations, summary.failures),
            *(_number(summary.searched), _number(summary.held_out), f"{summary.images:,}", f"{summary.seconds:,.0f}"),
        ]
        for summary in summaries_of(reader, studies)
    ]
    yield "<h2>Studies</h2>"
    yield _table(header, rows)
    if sum(study.chosen is not None for study in studies) > 1:
        yield "<h3>Distance between answers</h3>"
        yield _figure(distances_figure(distances_of(reader, studies)))


def _landscapes(reader: LandscapeReader, experiment: str) -> Iterator[str]:
    names = reader.names(experiment)
    if names:
        yield "<h2>Landscape</h2>"
    for name in names:
        yield f"<h3>{_text(name)}</h3>{_figure(landscape_figure(reader.read(name)))}"


def _images(reader: HistoryReader, studies: Sequence[StudyHistory], folder: Path) -> Iterator[str]:
    found = [(study, image) for study in studies for image in stored_images(reader, study, folder, prefix="images")]
    if not found:
        return
    yield "<h2>Images</h2>"
    yield '<p class="note">Images at the same place come from the same noise; those that differ most come first.</p>'
    for i, (study, image) in enumerate(found):
        caption = f"{study.study}, trial {study.chosen}: {image.filename}"
        shown = f'<img src="{image.data_url}" alt="{_text(caption)}">'
        yield f"<details{' open' if i == 0 else ''}><summary>{_text(study.study)}</summary>{shown}</details>"


def _by_rank(studies: Sequence[StudyHistory], ranked: Sequence[Ranked]) -> list[StudyHistory]:
    order = [row.optimizer for row in ranked]
    return sorted(studies, key=lambda study: order.index(study.optimizer))


def _each_study(reader: HistoryReader, studies: Sequence[StudyHistory]) -> Iterator[str]:
    yield "<h2>Each study</h2>"
    for study in studies:
        yield f"<details><summary>{_text(study.study)}</summary>{_state(study)}"
        for name, figure in own_figures(reader, study, studies).items():
            yield f"<h3>{SECTION_TITLES[name]}</h3>{_figure(figure)}"
        if failures := failures_of(study):
            yield _table(("reason", "attempts", "trials lost"), [[f.reason, f.attempts, f.lost] for f in failures])
        yield "</details>"


def _state(study: StudyHistory) -> str:
    progress = progress_of(study)
    done = f"{progress.done:,}" + ("" if progress.total is None else f" of {progress.total:,}")
    rate = "" if progress.per_hour is None else f", {progress.per_hour:,.0f} an hour"
    failed = f", {progress.failed} trials failed" if progress.failed else ""
    return f"<p>{_text(progress.state)}: {done} {_text(progress.unit)}{rate}{failed}.</p>{_second(study)}"


def _second(study: StudyHistory) -> str:
    """What the answer's second metric says, where it was measured."""
    held_out = study.held_out
    if held_out is None or held_out.second is None:
        return ""
    gains = held_out.second.text
    line = f"Held-out {held_out.second.metric} {_number(held_out.second.value)}" + (f"; {gains}" if gains else "")
    warning = "" if held_out.warning is None else f"<p><strong>Warning: {_text(held_out.warning)}.</strong></p>"
    return f"<p>{_text(line)}.</p>{warning}"


def _figure(figure: go.Figure) -> str:
    content = json.loads(str(figure.to_json()))
    content["layout"].pop("template")  # the page chooses one
    height = figure.layout.height or 420
    return f'{_data(None, content)}<div class="figure" style="height:{int(height)}px"></div>'


def _data(name: str | None, content: Any) -> str:
    """JSON within a page: no character of it can end the element."""
    text = (
        json.dumps(content, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    named = f' id="{name}"' if name else ""
    return f'<script type="application/json"{named}>{text}</script>'


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], *, best: int | None = None) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _spread(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "–"
    return _number(value[0]) + ("" if value[1] is None else f" ± {value[1]:.2g}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"


def _difference(row: Ranked) -> str:
    found = row.difference
    if found is None:
        return "–"
    interval = "" if found.low is None else f" [{_number(found.low)}, {_number(found.high)}]"
    return f"{found.mean:+.3g}{interval}"
