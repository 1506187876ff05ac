"""What a report warns of: the answer's costs, another sampler, and searches that found nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lcsc_opt.base.records import Yardstick
from lcsc_opt.database.measurement import Model
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.report import Report
from lcsc_opt.experiment.choice import Choice
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.views import in_words
from lcsc_opt.views.answer import change, named
from lcsc_opt.views.pictures import why_not_the_answer

_COMPARE_IMAGES = "Compare images of both models before you use it"
_SINGLE_OUTCOMES = (
    "The score returned one number, whose error shows only in how it scatters: return single outcomes, and the gain is "
    "compared item by item"
)
_MORE_IMAGES = "With at least 100 images in held_out the error would be known"
_GUARDED_BY = {"precision": "precision", "near": "precision", "hinge": "precision", "reward": "reward"}
"""A metric that got worse → what ``keep`` has to name, so that it does not."""


def warnings_of(
    experiment: str, report: Report, choice: Choice, searches: Sequence[Searched], yardstick: Yardstick | None
) -> list[str]:
    """Sentences about what was refused, about the answer, then about searches.

    Args:
        experiment: its name.
        report: without its warnings.
        choice: of its answer.
        searches: those of the report.
        yardstick: what the losses are relative to, on the noise of the report.
    """
    refused = _about_refused(experiment, report, choice)
    lines = [*refused, *_about_answer(report, yardstick)]
    if not report.is_found and not refused:
        more = "With more data the error would be smaller, and the search better"
        if not choice.knows_errors:
            more = _MORE_IMAGES if report.parts[0].sampler is not None else _SINGLE_OUTCOMES
        beyond = None if yardstick is None else _about_bound_of_found(report, yardstick)
        lines += [beyond] if beyond else _why_nothing_found(choice, searches, more)
    if report.is_found and choice.equals:
        lines.append(_about_equals(choice))
    if report.is_found and not refused:
        lines += _about_lower(report, choice)
    if any(not row.tells for row in report.rows(report.answer)):
        lines.append(
            f"{report.metrics.real_count} real images are held out, which are too few to tell models apart by: a "
            "distance to them prefers samples that vary less. Hold out at least 100, or none"
        )
    return lines


def _about_refused(experiment: str, report: Report, choice: Choice) -> list[str]:
    """What was found with a lower loss than the answer's, and refused, if anything was: people may decide otherwise."""
    found = report.best_found
    if found is None or found.model.name == report.answer:
        return []
    loss, *others = report.rows(found.model.name, report.answer)
    worse = [row for row in others if row.lost]
    if report.is_found:
        is_vetoed = any(row.metric in report.metrics.judges for row in worse)
        is_refused = is_vetoed and loss.gain_interval is not None and loss.gain_interval[0] > 0
    else:  # the choice has measured it on more images
        is_refused = choice.gain is not None and choice.gain.is_certain
    if not is_refused:
        return []
    reason = ""  # on the noise of the choice there was one, which need not show on this noise
    if worse:
        reason = f" {why_not_the_answer(report, found)}."
    if any(row.cross_check for row in worse) and report.metrics.cross_check_text is not None:
        reason += f" The cross-check is {report.metrics.cross_check_text}."
    return [
        f"{found.model.title} has a lower loss on other noise, too, but was refused: a metric that can refuse an "
        f"answer is certainly worse.{reason} {_COMPARE_IMAGES}: lcsc report "
        f"{experiment} shows them, lcsc export {found.model.study} writes it"
    ]


def _about_lower(report: Report, choice: Choice) -> Iterator[str]:
    """What else was found and is ahead of the answer in the report, where it was behind on the noise of the choice."""
    decisive = "loss" if report.sign > 0 else "score"
    for name in report.found.values():
        found = report.measured(name)
        if found is None or name == report.answer or not {name, report.answer} <= choice.measured.keys():
            continue
        loss = report.rows(name, report.answer)[0]
        is_ahead = loss.gain is not None and loss.gain > 0
        if not is_ahead or choice.measured[name].loss <= choice.measured[report.answer].loss:
            continue
        chance = ""
        if loss.gain_may_be_chance:
            chance = ", which may be chance"
        where_chosen = [f"{report.sign * choice.measured[one].loss:.4g}" for one in (name, report.answer)]
        yield (
            f"{found.model.title} has a better {decisive} than the answer here ({loss.value:.4g}, the answer "
            f"{loss.baseline:.4g}{chance}), and had a worse one on the noise of the choice, where the answer was "
            f"chosen ({where_chosen[0]}, the answer {where_chosen[1]})"
        )


def _about_equals(choice: Choice) -> str:
    """Which models are as good as the answer, as far as can be told, and why it was taken and none of them."""
    if choice.knows_errors:
        difference = "twice their error"
        error = "one error"
    else:
        difference = "their scatter between repetitions, and between the search's data and those of the choice"
        error = "half of that scatter"
    line = f"{choice.answer.name} cannot be told from {in_words(choice.equals)}: they differ by less than {difference}"
    if choice.is_on_path:
        line += (
            f". Within one search, the latest model that is no more than {error} behind its best is taken; what came "
            "after the earliest of them is no certain gain over it"
        )
    return line


def _about_answer(report: Report, yardstick: Yardstick | None) -> Iterator[str]:
    """What the answer costs, compared with the best that the user had; nothing if it is that itself."""
    bounded = None if yardstick is None else yardstick.kept
    for row in report.rows(report.answer):
        if yardstick is not None and row.metric == bounded and row.misses(yardstick.bound):
            yield (
                f"keep: {row.metric} of the answer is {row.value:.4g}, by more than the error beyond its bound "
                f"({yardstick.bound_in_words()}); continue the search, or search with more images per evaluation"
            )
    if yardstick is not None:
        yield from _about_penalties(report, yardstick)
    best = report.best_had(report.headline_metric)
    if not report.is_found or best is None:
        return
    against = best.model.name
    best_had = named(best.model)
    loss, *others = report.rows(report.answer, against)
    if loss.gain is not None and loss.gain < 0:
        yield (
            f"the answer was better where it was chosen, and is worse here than {best_had}: {_changes([loss])}. "
            "Compare both models before you use it"
        )
    costs = report.costs(report.answer, against)
    if costs:
        line = f"the answer has a cost, compared with {best_had}: {_changes(costs)}. {_COMPARE_IMAGES}"
        guards = [_GUARDED_BY[formula] for row in costs if (formula := row.metric.partition("@")[0]) in _GUARDED_BY]
        if guards and bounded is None:
            line += f", or search with keep: {guards[0]}"
        elif "reward" in report.metrics.terms:  # which may rise at the cost of all else
            line += ", or search with keep: reward in place of the reward in the loss"
        yield line
    unconfirmed = [row for row in others if row.is_judge and not row.lost and row.gain is not None and row.gain <= 0]
    if unconfirmed:
        yield (
            f"the gain over {best_had} does not show in what the search did not see: {_changes(unconfirmed)}. "
            f"{_COMPARE_IMAGES}"
        )
    if len(report.parts) > 1:
        yield from _in_another_sampler(report, best.model)


def _about_penalties(report: Report, yardstick: Yardstick) -> Iterator[str]:
    """Which models that the user had have more than their distance in the loss, which nobody sees in its number."""
    kept = yardstick.kept
    if kept is None:
        return
    beyond: dict[str, str] = {}  # the key of a model, which may have several names → what is said of it
    for measured in report.models:
        value = measured.value(kept)
        if measured.model.name in report.had and value is not None and yardstick.excess(value) > 0:
            row = report.row(kept, measured.model.name)
            is_certain = row is not None and row.misses(yardstick.bound)
            chance = "" if is_certain else ", perhaps by chance"
            beyond.setdefault(measured.model.key, f"{named(measured.model)} ({kept} {value:.4g}{chance})")
    if beyond:
        yield (
            f"keep: {kept} is beyond its bound ({yardstick.bound_in_words()}) in {in_words([*beyond.values()])}, whose "
            "loss has a penalty for that: compare the other metrics"
        )


def _about_bound_of_found(report: Report, yardstick: Yardstick) -> str | None:
    """That the best that was found is no answer only because of a kept metric beyond its bound; else ``None``."""
    found, kept = report.best_found, yardstick.kept
    if found is None or kept is None:
        return None
    value, of_answer = found.value(kept), report.of_answer.value(kept)
    if value is None or of_answer is None or yardstick.excess(value) <= 0:
        return None
    plain = found.loss - yardstick.penalty(value)
    plain_of_answer = report.of_answer.loss - yardstick.penalty(of_answer)
    if plain >= plain_of_answer:
        return None
    return (
        f"{found.model.title} is not the answer because of keep: {kept} is {value:.4g} there, beyond its bound "
        f"({yardstick.bound_in_words()}), which adds a penalty to the loss; without it, the loss is {plain:.4g}, the "
        f"answer's {plain_of_answer:.4g}. A search weighs the bound more the longer it goes on: continue it, or begin "
        "a new one from a model within the bound"
    )


def _in_another_sampler(report: Report, best: Model) -> Iterator[str]:
    """The warning that the loss or a judge of it is worse than the best that the user had, in the second sampler."""
    here = {row.metric: row for row in report.rows(report.answer, best.name)}
    rows = report.rows(report.answer, best.name, part=1)
    decisive = [row for row in rows if row is rows[0] or row.is_judge]  # the first one is the loss
    turned = [row for row in decisive if row.lost and (here[row.metric].gain or 0.0) > 0]
    if turned:
        first, second = report.parts
        changes_here = _changes([here[row.metric] for row in turned])
        yield (
            f"in another sampler the answer is worse than {named(best)}: {_changes(turned)} with {second.sampler}; "
            f"with {first.sampler}, {changes_here}. Use it only with the sampler that it was searched with"
        )


def _why_nothing_found(choice: Choice, searches: Sequence[Searched], more: str) -> Iterator[str]:
    """What may help where no search found anything better: it overfitted, or it was too short.

    ``more`` is a sentence on what would tell better.
    """
    grids = [search.lowest_loss for search in searches if search.is_ema_grid]
    searched = [search.lowest_loss for search in searches if not search.is_baseline]
    if not grids or not searched:
        return
    if min(searched) < min(grids):
        line = "nothing certainly better was found: on their own noise the searches were better than EMA*"
        if choice.gain is not None and choice.gain.value != 0:
            direction = "better" if choice.gain.value > 0 else "worse"
            share, error = (f"{100 * number:.2g} %" for number in (abs(choice.gain.value), choice.gain.error))
            of_error = f"with an error of {error}" if math.isfinite(choice.gain.error) else "with an unknown error"
            line += f"; on other noise they are {share} {direction} than the best you had, {of_error}"
        yield f"{line}. {more}"
    elif min(searched) > min(grids):
        yield "no search was better than EMA*, not even on its own noise: search with more evaluations"
    else:
        yield "no search had another loss than EMA*"


def _changes(rows: Sequence[MetricRow]) -> str:
    """``precision 0.621 → 0.517 and recall 0.4 → 0.38``: each baseline's value, and the answer's."""
    return in_words([change(row) for row in rows])
