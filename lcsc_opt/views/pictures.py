"""What stands beside the pictures of a report: a number of each model, and what is worse in what was found."""

from __future__ import annotations

from pathlib import Path

from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.report import Report
from lcsc_opt.views import in_words, number, signed
from lcsc_opt.views.answer import value_of
from lcsc_opt.views.artifacts import Shows


def picture_line(report: Report, role: Shows, measured: Measurement) -> str:
    """``held-out fid 12.3``; of the best that was found and is not the answer, also why it is not."""
    metric = report.headline_metric
    line = f"held-out {metric} {number(value_of(report, measured, metric))}"
    if role != "found":
        return line
    return f"{line}. {why_not_the_answer(report, measured)}"


def why_not_the_answer(report: Report, found: Measurement) -> str:
    """What is worse in a model than in the answer: each metric with both numbers and the error of their difference."""
    loss, *others = report.rows(found.model.name, report.answer)
    worse = [row for row in others if row.lost]
    if worse:
        return f"Worse than the answer: {in_words([with_error(row) for row in worse])}"
    return f"Not certainly better than the answer: {with_error(loss)}"


def with_error(row: MetricRow) -> str:
    """``precision 0.62 → 0.51 (difference −0.11 ± 0.02)``: the baseline's value, the model's, and a standard error."""
    if row.gain is None or row.gain_interval is None:
        return row.change
    low, high = row.gain_interval
    # half of a 95 % interval is about two standard errors
    return f"{row.change} ({signed(abs(row.gain), '.3g')} ± {signed((high - low) / 4, '.2g')})"


def why_no_images(report: Report | None, folder: Path) -> str:
    """Why an experiment has no pictures, and which command makes them."""
    if report is None:
        return "No report yet. Images are stored with it, when all searches have ended, or by lcsc evaluate EXPERIMENT."
    if report.parts[0].sampler is None:
        return "There are no images: the objective scores models without sampling any."
    return f"No images are in {folder}, which was left where the searches ran: copy it, too."
