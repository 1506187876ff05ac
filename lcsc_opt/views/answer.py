"""The answer of an experiment in words: which model, its FID, and that of the best model that the user had before."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc_opt.database.history import Standing, best_searched
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.names import EMA, is_trained
from lcsc_opt.database.report import Report
from lcsc_opt.views import in_words, loss_title

REWARDS = ("reward", "held_out_reward")
"""Metrics of single images that the user has written, and looks for first."""


def first_line(studies: Sequence[Standing]) -> str:
    """What people read first of an experiment: the answer, where a report has chosen one; else who is ahead."""
    report = studies[0].report
    if report is None:
        return headline(studies)
    return answer_line(report)


def headline(studies: Sequence[Standing]) -> str:
    """One line while there is no report: the lowest searched loss, which is the answer until then."""
    best = best_searched(studies)
    if best is None:
        return "No result yet."
    seed = f" (seed {best.seed})" if best.seed else ""
    has_ended = all(study.ended for study in studies)
    so_far = "" if has_ended else " so far"
    again = f"lcsc evaluate {best.experiment}"
    if not best.holds_out:
        reason = "this objective holds nothing out, so it may look better than it is"
    elif best.settings.get("objective") is None:
        reason = f"the Optuna study {best.experiment}, which had its report, was deleted: run the same command again"
    elif best.settings.get("held_out") is None:
        reason = f"nothing was held out: add held_out to the study file for a report, or use {again}"
    elif not has_ended:
        reason = f"held-out values come when all searches have ended, or with {again}"
    else:
        reason = "its report is not made yet: run the same command again"
    return f"Best searched {loss_title(best.metric)}{so_far}: {best.label}{seed} with {best.searched:.4g}; {reason}"


def answer_line(report: Report) -> str:
    """The model, a number that does not depend on the experiment, and the same of the best that the user had.

    That is the best by this number. Of FID, the same gain against real images that no search saw is said, which no
    search can have fitted, and where the loss or a judge of it has another best, that. Where the answer is worse than
    what the user had, the same sentence says why it was chosen. Rewards of both are said in any case.
    """
    metric = report.headline_metric
    answer = report.of_answer
    value = value_of(report, answer, metric)
    line = f"The answer is {named(answer.model)}, with {metric} {value:.4g}"
    if report.metrics.few_real_images:
        seen = ""
        if not any(name.startswith("fid_held_out") for name in answer.values):
            seen = ", which the search saw, too"
        line += f" (against {report.metrics.few_real_images:,} real images{seen})"
    loss = report.rows(answer.model.name)[0]
    if not report.is_found:
        # by this number, else by what the searches lowered: the choice had other noise and may differ from both
        better = _better_alone(report, metric) or _better_alone(report, loss.metric)
        return f"{line}: nothing certainly better was found{better}."
    best = report.best_had(metric)
    if best is None:
        return f"{line}."
    compared = _compared(value, value_of(report, best, metric), report.direction(metric))
    others = _better_otherwise(report, best)
    by_it = " by this number" if others else ""
    line += f": {compared} {_best_in_words(report, best, metric, by_it)}"
    line += f"{_why_although_worse(report, best, metric)}.{_unseen(report, best, metric)}"
    of_both = report.rows(answer.model.name, best.model.name)
    # what is certainly worse is said already
    rewards = [_changed_reward(row) for row in of_both if row.metric in REWARDS and not row.lost]
    if rewards:
        line += f" From that model to the answer: {in_words(rewards)}."
    return line + others


def _best_in_words(report: Report, best: Measurement, metric: str, by_it: str) -> str:
    """What the user had, with its number; of EMA*, an average that nobody has as a file, also the next best."""
    text = f"{named(best.model)}, with {value_of(report, best, metric):.4g}"
    if best.model.name != EMA:
        return f"the best model you had{by_it}, {text}"
    others = [measured for measured in report.models if measured.model.name in report.had and measured is not best]
    sign = report.direction(metric)
    following = min(others, key=lambda measured: sign * value_of(report, measured, metric), default=None)
    if following is not None:
        text += f" (then comes {named(following.model)}, with {value_of(report, following, metric):.4g})"
    return f"the best average of your checkpoints{by_it}, {text}"


def _better_otherwise(report: Report, best: Measurement) -> str:
    """What the user had that is better than ``best`` by the loss or a judge of it, as sentences; empty if none is.

    That is by more than the error, as far as it is known.
    """
    answer = report.of_answer
    loss, *metrics = report.rows(answer.model.name)
    values_of: dict[str, list[str]] = {}  # another model that the user had → the metrics by which it was the best
    for row in (loss, *(row for row in metrics if row.is_judge)):
        other = report.best_had(row.metric)
        if other is None or other.model.name == best.model.name:
            continue
        of_best = report.row(row.metric, best.model.name, other.model.name)
        if of_best is not None and of_best.gain_interval is not None and not of_best.lost:
            continue
        other_value, best_value, own = (value_of(report, one, row.metric) for one in (other, best, answer))
        values = f"{other_value:.4g}, against {best_value:.4g}; the answer has {own:.4g}"
        values_of.setdefault(named(other.model), []).append(f"{row.metric} ({values})")
    text = ""
    for name, better_in in values_of.items():
        text += f" Of what you had, {name} was better than {named(best.model)} by {in_words(better_in)}."
    return text


def _why_although_worse(report: Report, best: Measurement, metric: str) -> str:
    """In which numbers the answer is worse, and why it was chosen; empty if it is worse in none.

    That is worse than ``best`` by more than the error, and in the loss and its judges than any model that the user had;
    in ``metric``, which the sentence names already, worse at all.
    """
    answer = report.of_answer
    difference = value_of(report, answer, metric) - value_of(report, best, metric)
    is_worse = report.direction(metric) * difference > 0
    others = []
    for row in report.rows(answer.model.name, best.model.name):
        other = best
        if row.is_judge or row.metric == "loss":
            other = report.best_had(row.metric) or best
        against = report.row(row.metric, answer.model.name, other.model.name)
        is_named = metric in (row.metric, answer.metric_of_loss if row.metric == "loss" else None)
        if against is not None and against.lost and not is_named:
            whose = "" if other is best else f" (against {named(other.model)})"
            others.append(f"{change(against)}{whose}")
    if not others and not is_worse:
        return ""
    worse_in = f", and worse in {in_words(others)}" if others else ""
    decisive = "loss" if report.sign > 0 else "score"
    return f"{worse_in}; it was chosen because its {decisive} was certainly better on the noise of the choice"


def _unseen(report: Report, best: Measurement, metric: str) -> str:
    """The gain over ``best`` against real images that no search saw, as a sentence; empty unless that was measured."""
    name = f"fid_held_out{metric.removeprefix('fid')}"
    row = report.row(name, report.answer, best.model.name)
    if row is None or row.baseline is None or not row.tells:
        return ""
    chance = ""
    compared = _compared(row.value, row.baseline, 1)
    if row.gain_may_be_chance and "%" in compared:
        chance = ", perhaps by chance"
    floor = ""
    if row.real_halves is not None:
        floor = f"; {report.metrics.real_count:,} other real images have {row.real_halves:.4g}"
    values = f"{row.baseline:.4g} → {row.value:.4g}{chance}{floor}"
    return f" Against real images that no search saw, it is {compared} that model ({values})."


def _better_alone(report: Report, metric: str) -> str:
    """What else the user had that is better than the answer in this metric, and by how much; empty if nothing is."""
    best = report.best_had(metric)
    if best is None:
        return ""
    value = f"{value_of(report, best, metric):.4g}"
    if value == f"{value_of(report, report.of_answer, metric):.4g}":  # no reader could see that it is better
        return ""
    # a metric that is the loss has no row of its own: the first one is the loss's
    row = report.row(metric, report.answer, best.model.name) or report.rows(report.answer, best.model.name)[0]
    is_certain = row.lost and row.gain_interval is not None
    chance = "" if is_certain else ", perhaps by chance"
    decisive = "loss" if report.sign > 0 else "score"
    reason = f"the answer had the better {decisive} on the noise of the choice"
    return f", though {named(best.model)} has a better {metric} ({value}){chance}; {reason}"


def _compared(value: float, had: float, direction: int) -> str:
    """``12 % below`` or ``above``, ``12 % worse than``; ``against`` where a share means nothing.

    ``direction`` is 1 if lower values are better, else −1.
    """
    if f"{value:.4g}" == f"{had:.4g}":
        return "as good as"
    if not had or had * value <= 0:
        return "against"
    change = 100 * (value - had) / abs(had)
    better = "below" if change < 0 else "above"
    form = ".0f" if abs(change) >= 10 else ".2g"
    return f"{abs(change):{form}} % {'worse than' if direction * change > 0 else better}"


def change(row: MetricRow) -> str:
    """``precision 0.621 → 0.517``: the baseline's value and the model's."""
    if row.baseline is None:
        return f"{row.metric} {row.value:.4g}"
    return f"{row.metric} {row.baseline:.4g} → {row.value:.4g}"


def _changed_reward(row: MetricRow) -> str:
    """As :func:`change`, and whether that is more than chance."""
    return f"{change(row)} (no certain change)" if row.gain_may_be_chance else change(row)


def value_of(report: Report, measured: Measurement, metric: str) -> float:
    """A metric of a model, or its loss, as a user knows it; the loss where this metric was not measured."""
    value = measured.value(metric)
    if value is None or metric == "loss":
        return report.shown(measured)
    return value


def named(model: Model) -> str:
    """A model in a sentence: ``LCSCGradient, trial 38``, ``the last checkpoint``, ``EMA* (last 10)``."""
    if is_trained(model.name):
        return f"the {model.name}"
    return model.title
