"""The answer of an experiment in words: which model, its FID, and that of the best model that the user had before."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc_opt.database.history import Standing, answer_of
from lcsc_opt.database.names import LAST_CHECKPOINT, TRAINER_EMA
from lcsc_opt.database.report import HeldOutReport, Measurement, Model
from lcsc_opt.views.ranking import Ranked, headline

_WITH_ARTICLE = (LAST_CHECKPOINT, TRAINER_EMA)


def first_line(studies: Sequence[Standing], ranked: Sequence[Ranked]) -> str:
    """What people read first: the answer, where a report has chosen one; then who is ahead.

    Args:
        studies: of one experiment.
        ranked: their ranking.
    """
    found = answer_of(studies)
    ahead = headline(ranked, studies[0].metric)
    if found is None:
        return ahead
    return f"{answer_line(*found)} {ahead}"


def answer_line(study: Standing, report: HeldOutReport, answer: Measurement) -> str:
    """One sentence: the model, a number that does not depend on the study, and the same of what the user had.

    Args:
        study: whose report has the answer.
        report: of the study.
        answer: of the report.
    """
    metric = _absolute_metric(answer) or study.metric
    value = _value(study, answer, metric)
    name = _name(study, report, answer.model)
    if report.had is None or not report.is_found:
        return f"The answer is {name}, with {metric} {value:.4g}: nothing certainly better was found."
    had = _value(study, report.had, metric)
    compared = "against"
    if had and had * value > 0:
        share = (value - had) / abs(had)
        direction = "below" if share < 0 else "above"
        compared = f"{abs(100 * share):.0f} % {direction}"
    had_name = _with_article(report.had.model)
    return (
        f"The answer is {name}, with {metric} {value:.4g}: "
        f"{compared} the best model you had, {had_name}, with {had:.4g}."
    )


def _absolute_metric(measured: Measurement) -> str | None:
    """FID in the first features that have it; of a score its own name; ``None`` if only a loss was measured."""
    fids = [name for name in measured.metrics if name.partition("@")[0] == "fid"]
    return next(iter(fids or measured.metrics), None)


def _value(study: Standing, measured: Measurement, metric: str) -> float:
    value = measured.value(metric)
    return study.sign * measured.loss if value is None else value


def _name(study: Standing, report: HeldOutReport, answer: Model) -> str:
    """``LCSCGradient, trial 38``; of what the user had, its name."""
    if report.is_found:
        return f"{study.label}, {answer.name}"
    if answer.study == study.study:  # the grid's own average
        return study.label
    return _with_article(answer)


def _with_article(model: Model) -> str:
    return f"the {model.name}" if model.name in _WITH_ARTICLE else model.label or model.name
