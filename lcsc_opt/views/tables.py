"""Tables of reports and comparisons: headers and rows as text, for the terminal, the report and the dashboard."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import label
from lcsc_opt.database.report import HeldOutReport, Interval, MetricRow
from lcsc_opt.views import UNKNOWN, number, signed
from lcsc_opt.views.ranking import Ranked, different_samples, ranking, reports_of, spread_text

TextTable = tuple[tuple[str, ...], list[list[str]]]
"""Header, and rows."""

_ARROWS = {1: " ↓", -1: " ↑", None: ""}  # lower is better, higher is better, unknown
_SINGLE_IMAGES = ("precision", "recall")


def report_table(report: HeldOutReport) -> TextTable:
    """The metric with its better direction, the best trial, EMA*, the gain, with 95 % intervals; other baselines.

    The columns for EMA* and for held-out real images exist if some metric has them.
    """
    rows = report.rows
    against = next((row.against for row in rows if row.against is not None), None)
    others = [baseline for baseline in report.baselines if baseline.model.name != against]
    has_real_images = any(row.real_halves is not None for row in rows)
    level = " [95 %]" if any(row.interval is not None for row in rows) else ""
    header = ["metric", f"found{level}"]
    if against is not None:
        header += [f"{against}{level}", f"gain{level}"]
    header += [baseline.model.name for baseline in others]
    if has_real_images:
        header.append("real images")
    texts = []
    for row in rows:
        cells = [with_arrow(row.metric, row.sign), with_interval(row.value, row.interval, row.spread)]
        if against is not None:
            cells += [with_interval(row.baseline, row.baseline_interval, row.baseline_spread), _gain(row)]
        cells += [number(baseline.value(row.metric)) for baseline in others]
        if has_real_images:
            cells.append(number(row.real_halves))
        texts.append(cells)
    return tuple(header), texts


def with_arrow(metric: str, sign: int | None) -> str:
    """``precision ↑``: the metric, and whether lower or higher values are better, as far as that is known."""
    return f"{metric}{_ARROWS[sign]}"


def _gain(row: MetricRow) -> str:
    gain = with_interval(row.gain, row.gain_interval, row.gain_spread, "+.3g")
    return f"{gain} (worse)" if row.lost else gain


def with_interval(
    value: float | None, interval: Interval | None, deviation: float | None = None, form: str = ".4g"
) -> str:
    """A number with its 95 % interval, ``2.015 [1.93, 2.1]``; without one, with its deviation over groups of noise."""
    if value is None or interval is None:
        return number(value, deviation, form)
    low, high = interval
    return f"{signed(value, form)} [{signed(low, form)}, {signed(high, form)}]"


def comparison_table(studies: Sequence[Standing], *, all_metrics: bool = False) -> TextTable | None:
    """Each optimizer's held-out loss and metrics, means over seeds; ``None`` without metrics.

    The last row is real images that the loss does not see, if some are held out.

    Args:
        studies: of one experiment.
        all_metrics: not only those that the verdict depends on, precision and recall.
    """
    ranked = ranking(studies)
    report_rows = {row.metric: row for report in reports_of(studies) for row in report.rows}
    names = [name for name in metric_names(ranked) if name in report_rows]
    main_names = [name for name in names if _is_main(report_rows[name])]
    if main_names and not all_metrics:
        names = main_names
    if not names:
        return None
    rows = []
    for row in ranked:
        metrics = [spread_text(row.metrics.get(name)) for name in names]
        rows.append([row.label, spread_text(row.held_out), *metrics])
    real_halves = [report_rows[name].real_halves for name in names]
    if any(value is not None for value in real_halves):
        rows.append(["real images", UNKNOWN, *map(number, real_halves)])
    headers = [with_arrow(name, report_rows[name].sign) for name in names]
    return ("optimizer", f"held-out {studies[0].metric}", *headers), rows


def by_sampler(studies: Sequence[Standing]) -> list[tuple[str, list[Standing]]]:
    """``held out, DDIMScheduler, 3 model calls an image`` → the studies with the reports of this sampler.

    The sampler of the search comes first, then the one that only reports have, if any.
    """
    elsewhere = [
        dataclasses.replace(study, held_out=study.held_out.also)
        for study in studies
        if study.held_out is not None and study.held_out.also is not None
    ]
    titled = []
    for group in (list(studies), elsewhere):
        sampler = next((report.sampler for report in reports_of(group) if report.sampler is not None), None)
        if group:
            titled.append(("held out" if sampler is None else f"held out, {sampler}", group))
    return titled


def _is_main(row: MetricRow) -> bool:
    return row.is_judge or row.metric.partition("@")[0] in _SINGLE_IMAGES


def metric_names(ranked: Sequence[Ranked]) -> list[str]:
    """All held-out metrics of these optimizers but the loss, precision and recall first."""
    longest_first = sorted(ranked, key=lambda row: len(row.metrics), reverse=True)
    return list(dict.fromkeys(name for row in longest_first for name in row.metrics))


def settings_table(studies: Sequence[Standing]) -> TextTable | None:
    """Only the settings in which studies differ; ``None`` if in none but optimizer and seed.

    A row is of all seeds with the same settings.
    """
    settings = [_by_path(study.settings) for study in studies]
    keys = [
        key
        for key in dict.fromkeys(key for by_path in settings for key in by_path)
        if key not in {"seed", "optimizer.name"} and len({by_path.get(key) for by_path in settings}) > 1
    ]
    if not keys:
        return None
    seeds: dict[tuple[str, ...], list[str]] = {}
    for study, by_path in zip(studies, settings, strict=True):
        row = (label(study.optimizer), *(by_path.get(key, UNKNOWN) for key in keys))
        seeds.setdefault(row, []).append(str(study.seed))
    return ("optimizer", *keys, "seeds"), [[*row, ", ".join(numbers)] for row, numbers in seeds.items()]


def _by_path(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Path with dots, as in ``vary``, → value as text."""
    by_path: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            by_path |= _by_path(value, f"{path}{key}.")
        elif isinstance(value, str):
            by_path[f"{path}{key}"] = value
        else:
            by_path[f"{path}{key}"] = json.dumps(value)
    return by_path


def comparison_rows(points: Mapping[str, Sequence[Standing]]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, with the warnings that concern it.

    Rows of a sweep's points have their values in ``varied``.
    """
    rows = []
    for experiment, studies in points.items():
        samples_warning = different_samples(studies)
        varied = split_point(experiment)[1]
        for study in studies:
            warnings = [study.warning]
            if study.held_out is not None:
                warnings.insert(0, samples_warning)
            row = study.as_row()
            row["warnings"] = [warning for warning in warnings if warning is not None]
            if varied:
                row["varied"] = varied
            rows.append(row)
    return rows
