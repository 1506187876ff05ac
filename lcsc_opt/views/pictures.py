"""Which models of a report have pictures, and what stands beside each: a number, and why it is not the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lcsc_opt.database.history import Standing
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.report import Report
from lcsc_opt.views import in_words, number, signed
from lcsc_opt.views.answer import REWARDS, change, value_of

Shows = Literal["before", "answer", "found", "real"]
"""Who made images: the best that the user had, the answer, the best that was found where that is not the answer; or
nobody, since they are real."""
ROLES: tuple[Shows, ...] = ("before", "answer", "found", "real")

PAIRS = 250
"""How many images are drawn from either model of a pair."""

FARTHEST_NOTE = (
    f"Of {PAIRS} samples of both from the same noise, those whose features differ most: they show how two models "
    "differ, not how good one of them is."
)

_TITLES: dict[Shows, str] = {
    "before": "The best you had",
    "answer": "The answer",
    "found": "The best that was found, not the answer",
}


def pictured(report: Report) -> dict[Shows, Measurement]:
    """The models of a report that have pictures, each once: the best that the user had, the answer, the best found."""
    models: dict[Shows, Measurement | None] = {
        "before": report.best_had(report.headline_metric),
        "answer": report.of_answer,
        "found": report.best_found,
    }
    return {
        role: measured
        for role, measured in models.items()
        if measured is not None and (role == "answer" or measured.model.name != report.answer)
    }


def pair_of(report: Report) -> tuple[Shows, ...]:
    """The two models whose images are compared one by one: before and after; after a veto, the answer and what was
    found; empty if the user had the only one.
    """
    models = pictured(report)
    if not report.is_found:
        return ("answer", "found") if "found" in models else ()
    return ("before", "answer") if "before" in models else ()


def captions_of(report: Report) -> dict[Shows, str]:
    """Who made images → which model that is, or that they are real."""
    captions = {role: f"{_TITLES[role]}: {measured.model.title}" for role, measured in pictured(report).items()}
    captions["real"] = "Real images"
    return captions


def picture_line(report: Report, role: Shows, measured: Measurement) -> str:
    """``held-out fid 12.3, reward 0.8``; of the best that was found and is not the answer, also why it is not."""
    metric = report.headline_metric
    line = f"held-out {metric} {number(value_of(report, measured, metric))}"
    for reward in REWARDS:
        if reward in measured.values:
            line += f", {reward} {number(measured.value(reward))}"
    if role != "found":
        return line
    return f"{line}. {why_not_the_answer(report, measured)}"


def why_not_the_answer(report: Report, found: Measurement) -> str:
    """What is worse in a model than in the answer: each metric with both numbers and the error of their difference."""
    rows = report.rows(found.model.name, report.answer)
    loss = rows[0]
    worse = [row for row in rows if row.lost]
    if worse:
        return f"Worse than the answer: {in_words([with_error(row) for row in worse])}"
    return f"Not certainly better than the answer: {with_error(loss)}"


def with_error(row: MetricRow) -> str:
    """``precision 0.62 → 0.51 (difference −0.11 ± 0.02)``: the baseline's value, the model's, and a standard error."""
    if row.gain is None or row.gain_interval is None:
        return change(row)
    low, high = row.gain_interval
    # half of a 95 % interval is about two standard errors
    return f"{change(row)} ({signed(abs(row.gain), '.3g')} ± {signed((high - low) / 4, '.2g')})"


def why_no_images(study: Standing, folder: Path) -> str:
    """Why the experiment of a study has no pictures, and which command makes them."""
    report = study.report
    if report is None and not study.holds_out:
        return "There are no images: they are stored with the report, and nothing is held out here to report on."
    if report is None:
        return "No report yet. Images are stored with it, when all searches have ended, or by lcsc evaluate EXPERIMENT."
    if report.parts[0].sampler is None:
        return "There are no images: the objective scores models without sampling any."
    return (
        f"No images are in {folder}, which was left where the searches ran: copy it, too, or run the same command "
        "again, which makes them anew."
    )
