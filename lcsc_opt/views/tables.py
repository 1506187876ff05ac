"""The tables of an experiment, and its rows for programs. What draws them knows nothing of what stands in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.base.jackknife import GROUPS, half_width, standard_error
from lcsc_opt.base.records import STANDARD_ERROR, Evaluation, Yardstick
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.history import Standing, as_known
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.metric_rows import Interval, MetricRow, metric_rows
from lcsc_opt.database.names import BASELINES, EMA
from lcsc_opt.database.reader import FailureReason, HistoryReader
from lcsc_opt.database.report import Part, Report
from lcsc_opt.database.states import compared_trials
from lcsc_opt.database.store import evaluation_of
from lcsc_opt.views import UNKNOWN, Table, count, duration, number, percent, signed
from lcsc_opt.views.answer import named
from lcsc_opt.views.ranking import ANSWER, Row, Spread, loss_name, names_in, spread_text

_ARROWS = {1: " ↓", -1: " ↑", None: ""}  # lower is better, higher is better, unknown
_HELD_OUT = "Evaluation metrics, held out"  # a title
WORSE = "(worse)"  # by more than the error
BEYOND = "beyond its bound"
LOSS = "loss"
WITHOUT_PENALTY = "loss without penalty"
_SINGLE_IMAGES = ("precision", "recall", "reward", "held_out_reward")


# the searches


def studies_table(studies: Sequence[Standing]) -> Table:
    """The state, the results and the cost of each study."""
    header = ("study", "state", "done", "failed", "searched", "held-out", "images", "time")
    rows = [
        (
            study.study,
            study.state,
            f"{count(study.budget_spent, study.budget_total)} {study.budget_unit}",
            str(study.summary.failed),
            number(study.searched_of_shown),
            number(study.reported),
            f"{study.summary.cost.images:,}",
            duration(study.seconds),
        )
        for study in studies
    ]
    return Table(header, rows, text=2, optional=("done", "time", "images", "failed"))


def grid_table(reader: HistoryReader, study: Standing) -> Table | None:
    """Each checkpoint or average of a grid once, as it was searched, the best first; ``None`` of other searches.

    Beside each stands by how much its loss is behind the best one's, with a 95 % interval on the same noise. A kept
    metric beyond its bound is marked: then the loss has a penalty.
    """
    if study.optimizer not in BASELINES:
        return None
    compared = sorted(compared_trials(reader.trials(study)), key=lambda trial: (trial.value, trial.number))
    trials = list({coefficients_of(trial).tobytes(): trial for trial in reversed(compared)}.values())[::-1]
    if not trials:
        return None
    metrics = [name for name in trials[0].user_attrs["metrics"] if not name.endswith(STANDARD_ERROR)]
    best = evaluation_of(trials[0])
    yardstick = study.yardstick
    header = ["model", study.metric, "behind the best [95 %]"]
    if yardstick is not None and yardstick.kept is not None:
        header.append(WITHOUT_PENALTY)
    rows = []
    for trial in trials:
        evaluation = evaluation_of(trial)
        name = study.average_name(coefficients_of(trial)) or f"trial {trial.number}"
        behind = UNKNOWN if trial is trials[0] else _behind(evaluation, best)
        cells = [name, number(as_known(trial.value, study.sign)), behind]
        if yardstick is not None and yardstick.kept is not None:
            plain = evaluation.loss - yardstick.penalty(evaluation.metrics[yardstick.kept])
            cells.append(number(as_known(plain, study.sign)))
        texts = [number(evaluation.metrics.get(metric)) + _beyond(evaluation, metric, yardstick) for metric in metrics]
        rows.append([*cells, *texts])
    title = "As searched, the best first"
    if any(BEYOND in cell for row in rows for cell in row):
        title += "; beyond its bound, a kept metric adds a penalty to the loss"
    return Table((*header, *metrics), rows, title, optional=metrics)


def _behind(evaluation: Evaluation, best: Evaluation) -> str:
    """By how much a loss is above the best one, and the interval of this, on the same noise, if it is known."""
    difference = evaluation.loss - best.loss
    interval = None
    if LOSS in evaluation.without_groups and LOSS in best.without_groups:
        without = np.subtract(evaluation.without_groups[LOSS], best.without_groups[LOSS])
        width = half_width(standard_error(without.tolist()), GROUPS - 1)
        interval = (difference - width, difference + width)
    return _with_interval(difference, interval, "+.3g")


def _beyond(evaluation: Evaluation, metric: str, yardstick: Yardstick | None) -> str:
    """The mark of a kept metric that is beyond its bound, and whether that may be chance; empty of all others."""
    if yardstick is None or yardstick.kept != metric or metric not in evaluation.metrics:
        return ""
    if yardstick.excess(evaluation.metrics[metric]) <= 0:
        return ""
    may_be_chance = evaluation.violation is not None and evaluation.violation <= 2  # standard errors
    return f" ({BEYOND}, perhaps by chance)" if may_be_chance else f" ({BEYOND})"


def failures_table(failures: Sequence[FailureReason]) -> Table:
    """Why attempts failed, how often, and how many trials were lost."""
    rows = [(failure.reason, str(failure.attempts), str(failure.lost)) for failure in failures]
    return Table(("reason", "attempts", "trials lost"), rows)


# the comparison

RANKING: dict[str, Callable[[Row], str]] = {
    "optimizer": lambda row: row.label,
    "seeds": lambda row: str(row.seeds or UNKNOWN),
    "held-out": lambda row: spread_text(row.held_out),
    "on images": lambda row: ", ".join(f"{images:,}" for images in row.held_out_images) or UNKNOWN,
    "against EMA*": lambda row: percent(row.below_ema),
    "difference": lambda row: UNKNOWN if row.difference is None else row.difference.text,
    "verdict": lambda row: row.verdict,
    "evaluations": lambda row: f"{row.evaluations:.0f}",
    "images": lambda row: f"{row.images:,.0f}",
    "seconds": lambda row: f"{row.seconds:.1f}",
    "searched": lambda row: spread_text(row.searched),
}
"""Column → its text. What was searched, on other noise and fewer images, stands last."""
_OPTIONAL = ("evaluations", "searched", "seconds", "images", "on images", "seeds", "difference", "verdict")
"""Columns that a narrow terminal goes without, the last of these first."""


def ranking_table(rows: Sequence[Row], title: str = "") -> Table:
    """Who is ahead, and at what cost; the answer, where there is a report, is marked."""
    columns = dict(RANKING)
    if not any(row.held_out_images for row in rows):
        del columns["on images"]
    if all(row.below_ema is None for row in rows):  # of losses around zero, a share of one means nothing
        del columns["against EMA*"]
    texts = [[text_of(row) for text_of in columns.values()] for row in rows]
    marked = 0 if rows[0].verdict == ANSWER else None
    return Table(tuple(columns), texts, title, optional=_OPTIONAL, marked=marked)


def comparison_tables(rows: Sequence[Row], *, all_metrics: bool = False) -> list[Table]:
    """For each sampler, the loss and the metrics of all models of the report; without a report no table.

    The last row has real images that the loss does not see, if some are held out. What a search found is marked where
    it is worse than the best that the user had, by more than the error; of several seeds, if all are.

    Args:
        rows: of the ranking.
        all_metrics: not only those that judge the answer, the one that sentences name, and those of single images.
    """
    report = rows[0].report
    if report is None:
        return []
    tables = []
    for number_of_part in range(len(report.parts)):
        of_answer = report.rows(report.answer, part=number_of_part)
        if len(of_answer) < 2:  # the loss alone, which the ranking has
            continue
        loss, *metrics = of_answer
        if not all_metrics:
            metrics = _main_metrics(report, metrics)
        tables.append(_comparison_table(rows, report, number_of_part, loss, metrics))
    return tables


def _main_metrics(report: Report, metrics: Sequence[MetricRow]) -> list[MetricRow]:
    """Those of a short comparison: what judges the answer, sentences name, or the loss is made of; all if none is."""
    wanted = {report.headline_metric} - {report.of_answer.metric_of_loss}  # a metric that is the loss has its column
    wanted = wanted.union(report.metrics.terms)
    main = []
    for row in metrics:
        formula = row.metric.partition("@")[0]
        if row.is_judge or formula in _SINGLE_IMAGES or row.metric in wanted:
            main.append(row)
    return main or list(metrics)


def _comparison_table(
    rows: Sequence[Row], report: Report, number_of_part: int, loss: MetricRow, metrics: Sequence[MetricRow]
) -> Table:
    """A line for each model that was measured in a part of the report, with its loss and these metrics."""
    part = report.parts[number_of_part]
    lines = []
    for row in rows:
        measured = [found for model in row.models if (found := part.measured(model.model.name)) is not None]
        if not measured:
            continue
        lost = _lost(report, measured, number_of_part)
        cells = [row.label, _marked(Spread.of(map(report.shown, measured)), lost=loss.metric in lost)]
        for metric in metrics:
            spread = Spread.of(one.value(metric.metric) for one in measured)
            cells.append(_marked(spread, lost=metric.metric in lost))
        lines.append(cells)
    title = _HELD_OUT if part.sampler is None else f"{_HELD_OUT}, {part.sampler}"
    best = report.best_had(report.headline_metric)
    if best is not None and any(WORSE in cell for cells in lines for cell in cells):
        title += f"; {WORSE}: than {named(best.model)}, by more than the error"
    if any(metric.real_halves is not None for metric in metrics):
        lines.append([_real_images(report), UNKNOWN, *(number(metric.real_halves) for metric in metrics)])
    name_of_loss = loss_name([study for row in rows for study in row.studies])
    headers = [_with_arrow(metric.metric, metric.sign) for metric in metrics]
    return Table(("model", f"held-out {name_of_loss}", *headers), lines, title, optional=headers)


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


def answers_table(reports: Mapping[str, Report]) -> Table | None:
    """The answer of each experiment, and the best that its user had, in the metrics that all of them have.

    A loss that is no metric is left out where there are metrics, since experiments may have others. A model that
    several of them measured alike has one row. Where the first and another one have such a model, they have sampled the
    same noise, and the gain of that one's answer over the first's follows, with its paired interval.

    Args:
        reports: experiment → its report.

    Returns:
        ``None`` where no metric was measured of all of them, as of several scores.
    """
    measured_by: dict[tuple[str, ...], list[str]] = {}  # the cells of a model → the experiments that have it
    answers = [_by_metric(report, report.rows(report.answer)) for report in reports.values()]
    shared = [metric for metric in answers[0] if all(metric in rows for rows in answers)]
    metrics = [metric for metric in shared if metric != "loss"] or shared
    if not metrics:
        return None
    for experiment, report in reports.items():
        best = report.best_had(report.headline_metric)
        for name in dict.fromkeys((report.answer, report.answer if best is None else best.model.name)):
            rows = _by_metric(report, report.rows(name))
            texts = [_with_interval(rows[one].value, rows[one].interval) if one in rows else UNKNOWN for one in metrics]
            cells = (_column(report, name), _title(report.parts[0]), *texts)
            measured_by.setdefault(cells, []).append(experiment)
    titles = {title for _, title, *_ in measured_by}
    lines = [[", ".join(experiments), *cells] for cells, experiments in measured_by.items()]
    (first, base), *others = reports.items()
    for experiment, report in others:
        if any({first, experiment} <= set(experiments) for experiments in measured_by.values()):
            of_both = metric_rows(report.of_answer, base.of_answer, reported=report.metrics, sign=report.sign)
            gains = _by_metric(report, of_both)
            texts = [_gain(gains[metric]) for metric in metrics]
            lines.append([experiment, f"gain over {first}'s answer", _title(report.parts[0]), *texts])
    headers = [_with_arrow(metric, answers[0][metric].sign) for metric in metrics]
    if len(titles) > 1:
        return Table(("experiment", "model", "measured", *headers), lines, text=3, optional=headers)
    of_one_kind = [[experiments, model, *texts] for experiments, model, _, *texts in lines]
    return Table(("experiment", "model", *headers), of_one_kind, titles.pop(), text=2, optional=headers)


def _gain(row: MetricRow) -> str:
    """The gain over the baseline with its interval, and whether that is a loss by more than the error."""
    gain = _with_interval(row.gain, row.gain_interval, "+.3g")
    return f"{gain} {WORSE}" if row.lost else gain


def _by_metric(report: Report, rows: Sequence[MetricRow]) -> dict[str, MetricRow]:
    """Metric → its row, of one model; that of the loss first, under the name of the metric that it is."""
    loss, *others = rows
    of_loss = {report.of_answer.metric_of_loss or "loss": loss}
    return of_loss | {row.metric: row for row in others}


# one model


def tables_of_study(study: Standing) -> list[Table]:
    """:func:`report_tables` of the best model of a search; none without a report."""
    if study.report is None or study.found is None:
        return []
    return report_tables(study.report, study.found.model.name)


def report_tables(report: Report, name: str) -> list[Table]:
    """For each sampler in which a model was measured, its metrics beside those of what the user had and of the answer.

    A row for each metric, with 95 % intervals. The gain is that over the best that the user had. The column of real
    images exists if some metric has them.

    Args:
        report: of the experiment.
        name: of the model.
    """
    parts = enumerate(report.parts)
    return [_report_table(report, name, index) for index, part in parts if part.measured(name) is not None]


def _report_table(report: Report, name: str, part: int) -> Table:
    best = report.best_had(report.headline_metric)
    against = None if best is None or best.model.name == name else best.model.name
    rows = report.rows(name, against, part=part)
    others_shown = _others(report, part, but=[name, against])
    has_real_images = any(row.real_halves is not None for row in rows)
    level = ""
    if any(row.interval is not None for row in rows):
        level = " [95 %]"
    gain_column = f"gain{level}"
    header = ["metric", f"{_column(report, name)}{level}"]
    if against is not None:
        header += [f"{_column(report, against)}{level}", gain_column]
    header += [_column(report, measured.model.name) for measured in others_shown]
    if has_real_images:
        header.append(_real_images(report))
    texts = []
    for row in rows:
        cells = [_with_arrow(row.metric, row.sign), _with_interval(row.value, row.interval)]
        if against is not None:
            cells += [_with_interval(row.baseline, row.baseline_interval), _gain(row)]
        cells += [number(measured.value(row.metric)) for measured in others_shown]
        if has_real_images:
            cells.append(number(row.real_halves))
        texts.append(cells)
    optional = [column for column in header[2:] if column != gain_column]
    return Table(header, texts, _title(report.parts[part]), optional=optional)


def _title(part: Part) -> str:
    """On what the models of a part were measured."""
    first = part.models[0]
    title = _HELD_OUT
    if first.images:
        title += f", {first.images:,} {'items' if part.sampler is None else 'images'}"
    if len(first.seeds) > 1:
        title += f", noise groups {', '.join(map(str, first.seeds))}"
    return title if part.sampler is None else f"{title}, {part.sampler}"


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
    """The title of their values, with how many they are: distances of fewer images than the models have are larger."""
    count = report.metrics.real_count
    only = "only " if count < report.parts[0].models[0].images else ""
    return f"real images ({only}{count:,})"


def _with_arrow(metric: str, sign: int | None) -> str:
    """``precision ↑``: the metric, and whether lower or higher values are better, as far as that is known."""
    return f"{metric}{_ARROWS[sign]}"


def _with_interval(value: float | None, interval: Interval | None, form: str = ".4g") -> str:
    """A number with its 95 % interval, ``2.015 [1.93, 2.1]``, as far as that is known."""
    if value is None or interval is None:
        return number(value, form=form)
    low, high = interval
    return f"{signed(value, form)} [{signed(low, form)}, {signed(high, form)}]"


# for programs


def study_row(study: Standing) -> dict[str, Any]:
    """The study in the JSON of ``lcsc list``, ``compare`` and ``show``.

    ``searched`` and ``held_out`` are losses or scores of one model, as a user knows them: the one that was chosen.
    """
    return {
        "study": study.study,
        "optimizer": study.optimizer,
        "seed": study.seed,
        "state": study.state,
        "maximized": study.sign < 0,
        "searched": study.searched_of_shown,
        **_held_out(study.report, study.found, EMA),
        "evaluations": study.summary.evaluations,
        "images": study.summary.cost.images,
        "seconds": study.seconds,
    }


def comparison_rows(studies: Sequence[Standing]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, and of the answer with the report's warnings."""
    rows = [study_row(study) for study in studies]
    report = studies[0].report
    if report is None:
        return rows
    best = report.best_had(report.headline_metric)
    answer: dict[str, Any] = {
        "study": studies[0].experiment,
        "optimizer": ANSWER,
        "seed": None,
        "state": "finished",
        "maximized": report.sign < 0,
        "searched": None,
        **_held_out(report, report.of_answer, None if best is None else best.model.name),
        "evaluations": 0,
        "images": 0,
        "seconds": 0.0,
        "model": report.of_answer.model.title,
        "warnings": list(report.warnings),
    }
    return [*rows, answer]


def _held_out(report: Report | None, measured: Measurement | None, against: str | None) -> dict[str, Any]:
    """What the report has of a model, each metric compared with another one's."""
    if report is None or measured is None:
        return {"held_out": None, "held_out_images": None, "sampler": None, "held_out_rows": []}
    return {
        "held_out": report.shown(measured),
        "held_out_images": measured.images or None,  # 0 where the objective samples none
        "sampler": report.parts[0].sampler,
        "held_out_rows": [dataclasses.asdict(row) for row in report.rows(measured.model.name, against)],
    }
