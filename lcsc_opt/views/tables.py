"""Tables of reports and comparisons: headers and rows as text, for the terminal, the report and the dashboard."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import Standing
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.metric_rows import Interval, MetricRow
from lcsc_opt.database.names import label, split_name
from lcsc_opt.database.report import Part, Report
from lcsc_opt.views import UNKNOWN, number, signed
from lcsc_opt.views.answer import named
from lcsc_opt.views.ranking import ANSWER, Spread, names_in, spread_text, title_in

TextTable = tuple[tuple[str, ...], list[list[str]]]
"""Header, and rows."""

_ARROWS = {1: " ↓", -1: " ↑", None: ""}  # lower is better, higher is better, unknown
WORSE = "(worse)"  # by more than the error
_SINGLE_IMAGES = ("precision", "recall", "reward", "held_out_reward")


def report_table(report: Report, name: str, *, part: int = 0) -> TextTable:
    """The metrics of a model, of what the user had, and of the answer: a row for each metric, with 95 % intervals.

    The gain is that over the best that the user had. The column of real images exists if some metric has them.

    Args:
        report: of the experiment.
        name: of the model.
        part: which sampler.
    """
    best = report.best_had(report.headline_metric)
    against = None if best is None or best.model.name == name else best.model.name
    rows = report.rows(name, against, part=part)
    others_shown = _others(report, part, but=[name, against])
    has_real_images = any(row.real_halves is not None for row in rows)
    level = ""
    if any(row.interval is not None for row in rows):
        level = " [95 %]"
    header = ["metric", f"{_column(report, name)}{level}"]
    if against is not None:
        header += [f"{_column(report, against)}{level}", f"gain{level}"]
    header += [_column(report, measured.model.name) for measured in others_shown]
    if has_real_images:
        header.append(_real_images(report))
    texts = []
    for row in rows:
        cells = [with_arrow(row.metric, row.sign), with_interval(row.value, row.interval)]
        if against is not None:
            gain = with_interval(row.gain, row.gain_interval, "+.3g")
            if row.lost:  # certainly worse
                gain = f"{gain} {WORSE}"
            cells += [with_interval(row.baseline, row.baseline_interval), gain]
        cells += [number(measured.value(row.metric)) for measured in others_shown]
        if has_real_images:
            cells.append(number(row.real_halves))
        texts.append(cells)
    return tuple(header), texts


def _column(report: Report, name: str) -> str:
    """All that a model is, above its column; the answer is marked."""
    measured = report.measured(name)
    if measured is None:
        return name
    names = names_in(report, measured.model)
    if measured.model.key == report.of_answer.model.key:
        return f"{ANSWER} · {names}"
    return names


def _others(report: Report, part: int, *, but: Sequence[str | None]) -> list[Measurement]:
    """What the user had, and the answer, each model once, without those of these names."""
    models = report.parts[part].models
    known = {measured.model.key for measured in models if measured.model.name in but}
    others = []
    for measured in models:
        if measured.model.name in (*report.had, report.answer) and measured.model.key not in known:
            known.add(measured.model.key)
            others.append(measured)
    return others


def _real_images(report: Report) -> str:
    """The title of their values, with how many they are: distances of fewer images are larger."""
    return f"real images ({report.metrics.real_count:,})"


def with_arrow(metric: str, sign: int | None) -> str:
    """``precision ↑``: the metric, and whether lower or higher values are better, as far as that is known."""
    return f"{metric}{_ARROWS[sign]}"


def with_interval(value: float | None, interval: Interval | None, form: str = ".4g") -> str:
    """A number with its 95 % interval, ``2.015 [1.93, 2.1]``, as far as that is known."""
    if value is None or interval is None:
        return number(value, form=form)
    low, high = interval
    return f"{signed(value, form)} [{signed(low, form)}, {signed(high, form)}]"


def comparison_tables(report: Report | None, metric: str, *, all_metrics: bool = False) -> list[tuple[str, TextTable]]:
    """For each sampler a title, and the loss and the metrics of all models of the report.

    The answer is the first row, real images that the loss does not see the last, if some are held out. What a search
    found is marked where it is worse than the best that the user had, by more than the error; of several seeds, if all
    are.

    Args:
        report: of the experiment; there are no tables without one.
        metric: what the loss is called.
        all_metrics: not only those that judge the answer, the one that sentences name, and those of single images.
    """
    if report is None:
        return []
    tables = []
    for number_of_part, part in enumerate(report.parts):
        rows = report.rows(report.answer, part=number_of_part)
        if len(rows) < 2:  # the loss alone, which the ranking has
            continue
        shown = rows[1:]
        wanted = {report.headline_metric} - {part.models[0].metric_of_loss}  # a metric that is the loss has its column
        wanted = wanted.union(report.metrics.terms)
        main = [row for row in shown if _is_main(row) or row.metric in wanted]
        if main and not all_metrics:
            shown = tuple(main)
        lines = []
        for title, models in _groups(report, part).items():
            losses = Spread.of(report.shown(measured) for measured in models)
            lost = _lost(report, models, number_of_part)
            lines.append([title, _marked(losses, lost=rows[0].metric in lost)])
            for row in shown:
                spread = Spread.of(measured.value(row.metric) for measured in models)
                lines[-1].append(_marked(spread, lost=row.metric in lost))
        if any(row.real_halves is not None for row in shown):
            lines.append([_real_images(report), UNKNOWN, *(number(row.real_halves) for row in shown)])
        headers = [with_arrow(row.metric, row.sign) for row in shown]
        title = "held out" if part.sampler is None else f"held out, {part.sampler}"
        best = report.best_had(report.headline_metric)
        if best is not None and any(WORSE in cell for line in lines for cell in line):
            title += f"; {WORSE}: than {named(best.model)}, by more than the error"
        tables.append((title, (("model", f"held-out {metric}", *headers), lines)))
    return tables


def _lost(report: Report, models: Sequence[Measurement], part: int) -> set[str]:
    """The metrics in which all of these models are worse than the best that the user had; none of what the user had."""
    best = report.best_had(report.headline_metric)
    if best is None or any(measured.model.name in report.had for measured in models):
        return set()
    of_each = [report.rows(measured.model.name, best.model.name, part=part) for measured in models]
    return set.intersection(*({row.metric for row in rows if row.lost} for rows in of_each))


def _marked(spread: Spread | None, *, lost: bool) -> str:
    """The text of a cell."""
    text = spread_text(spread)
    return f"{text} {WORSE}" if lost else text


def _groups(report: Report, part: Part) -> dict[str, list[Measurement]]:
    """Title → models: the answer, then what the user had and the best of each optimizer's seeds, by their loss.

    A model stands once, with all that it is.
    """
    titles: dict[str, list[Measurement]] = {}
    of_name = {measured.model.name: measured for measured in part.models}
    for name in report.had:
        if name in of_name:
            titles[title_in(report, of_name[name].model)] = [of_name[name]]
    known = {models[0].model.key for models in titles.values()}
    for study, name in report.found.items():
        optimizer = split_name(study)[1]
        if name in of_name and of_name[name].model.key not in known and optimizer != EMA_GRID:  # its best is EMA*
            titles.setdefault(label(optimizer), []).append(of_name[name])
    best_first = sorted(titles, key=lambda title: statistics.fmean(measured.loss for measured in titles[title]))
    groups = {title: titles[title] for title in best_first}
    answer = of_name.get(report.answer)
    if answer is None:
        return groups
    others = {
        title: models for title, models in groups.items() if [one.model.key for one in models] != [answer.model.key]
    }
    return {f"{ANSWER} · {title_in(report, answer.model)}": [answer], **others}


def _is_main(row: MetricRow) -> bool:
    """Whether a short comparison has it: what judges the answer, or tells of single images."""
    return row.is_judge or row.metric.partition("@")[0] in _SINGLE_IMAGES


def comparison_rows(studies: Sequence[Standing]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, and of the answer with the report's warnings."""
    rows = [study.as_row() for study in studies]
    report = studies[0].report
    if report is not None:
        rows.append(answer_row(studies[0].experiment, report))
    return rows


def answer_row(experiment: str, report: Report) -> dict[str, Any]:
    """The answer in the JSON of ``lcsc compare``, with the keys of a study."""
    answer = report.of_answer
    best = report.best_had(report.headline_metric)
    against = None if best is None else best.model.name
    return {
        "study": experiment,
        "optimizer": ANSWER,
        "seed": None,
        "state": "finished",
        "maximized": report.sign < 0,
        "searched": None,
        "held_out": report.shown(answer),
        "held_out_images": answer.images or None,
        "sampler": report.parts[0].sampler,
        "evaluations": 0,
        "images": 0,
        "seconds": 0.0,
        "held_out_rows": [dataclasses.asdict(row) for row in report.rows(report.answer, against)],
        "model": answer.model.title,
        "warnings": list(report.warnings),
    }
