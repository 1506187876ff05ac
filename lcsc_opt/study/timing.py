"""How long studies take; and a time as a budget: what is left of it for a search, and what fits into that.

The clock ends a search. The number of evaluations is what its optimizer plans with: it is estimated once, before the
first trial, and stored, so that a search that continues asks the same candidates whatever the clock says.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lcsc_opt.base.records import CONTIGUOUS, Candidate, Evaluation
from lcsc_opt.base.study_spec import BudgetSpec, SpaceSpec, StudySpec
from lcsc_opt.database.states import Attributes, is_searched
from lcsc_opt.objective.contract import Objective
from lcsc_opt.optimizers import attach_evaluation, candidate_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.planning import new_driver, parallelism, usable_budget

SEARCH_SECONDS = "search_seconds"
"""The attribute of a study that says how long its search has taken, in all runs."""

_SECONDS_TO_STORE = 0.02  # of a trial, next to its evaluation
_UNLIMITED = BudgetSpec(evaluations=10**9)
_SIMULATED = 1000  # candidates; more of them cost like the mean of these
_FEWEST = 2  # a step, and a check of it
_PLANNED = 0.9  # of the time: the last check that an optimizer plans should not come too late


def seconds_for(spec: StudySpec, specs: Sequence[StudySpec], studies: Mapping[str, Attributes]) -> float:
    """How long the search of a study may still take: what is left is divided by the searches still to come.

    Grids take what they need, and their time counts.

    Args:
        spec: whose budget is a time for all ``specs`` together.
        specs: those of the run, in their order.
        studies: name → attributes of the stored studies.
    """
    total = spec.budget.seconds or 0.0
    spent = sum(float(studies.get(other.name, {}).get(SEARCH_SECONDS, 0.0)) for other in specs)
    to_come = list(specs)[list(specs).index(spec) :]
    searches = [other for other in to_come if not other.is_grid and not is_searched(other, studies.get(other.name, {}))]
    return max(total - spent, 0.0) / max(len(searches), 1)


def evaluations_in(
    seconds: float,
    start: Candidate,
    new_optimizer: Callable[[BudgetSpec], Driver],
    evaluate: Callable[[Candidate], object],
) -> int:
    """About how many evaluations an optimizer asks for in so much time, by timing one of each kind.

    Args:
        seconds: of all workers together.
        start: a candidate of the search; with its gradient if the optimizer follows it, whose steps have other numbers
            of images, which grow.
        new_optimizer: builds the optimizer; it plans with the budget that it is given.
        evaluate: evaluates a candidate.
    """
    plain = _seconds_of(lambda: evaluate(dataclasses.replace(start, gradient=False))) + _SECONDS_TO_STORE
    seconds *= _PLANNED
    if not start.gradient:
        return max(int(seconds / plain), _FEWEST)
    first = candidate_of(new_optimizer(_UNLIMITED).ask())  # a step with the fewest images
    step = _seconds_of(lambda: evaluate(first))
    step_images = first.images or 1  # where no step names a number, all have the same

    def duration(candidate: Candidate) -> float:
        if not candidate.gradient:
            return plain
        return step * (candidate.images or 1) / step_images + _SECONDS_TO_STORE

    evaluations = 0
    for candidate in _candidates(new_optimizer(_UNLIMITED)):
        seconds -= duration(candidate)
        if seconds < 0:
            break
        evaluations += 1
    return max(evaluations, _FEWEST)


def _candidates(optimizer: Driver) -> Iterator[Candidate]:
    """What an optimizer asks for while its steps lead nowhere: numbers of images do not depend on losses."""
    while True:
        nevergrad_candidate = optimizer.ask()
        yield candidate_of(nevergrad_candidate)
        no_gradient = np.zeros_like(nevergrad_candidate.value)
        attach_evaluation(nevergrad_candidate, Evaluation(1.0, gradient=no_gradient))
        optimizer.tell(nevergrad_candidate, 1.0)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How many seconds an evaluation takes with as many images as a search's; 0 where it was not timed.

    Attributes:
        gradient: with its gradient.
        search: without.
        selection: on the noise of the choice.
        held_out: on that of the report, with its metrics.
        also: in the second sampler.
        layout: of the network's weights, in which trials take that long.
    """

    gradient: float = 0.0
    search: float = 0.0
    selection: float = 0.0
    held_out: float = 0.0
    also: float = 0.0
    layout: str = CONTIGUOUS

    @property
    def plain(self) -> float:
        """Of an evaluation of a search without a gradient, as far as it is known."""
        return self.search or self.selection or self.gradient


def searches_seconds(specs: Sequence[StudySpec], objective: Objective, pace: Pace) -> float:
    """How long searches take at most, but for those that a time ends: some optimizers end by themselves."""
    seconds = 0.0
    for spec in specs:
        if usable_budget(spec, objective).seconds is None:
            seconds += _search_seconds(spec, objective, pace) / _at_once(spec, objective)
    return seconds


def _at_once(spec: StudySpec, objective: Objective) -> int:
    """How many workers evaluate a candidate each. Where they share the images of one, its time was measured so."""
    return int(parallelism(spec, objective)["workers"])


def _search_seconds(spec: StudySpec, objective: Objective, pace: Pace) -> float:
    """How long one search takes with one worker; its budget is no time."""
    budget = usable_budget(spec, objective)
    images = objective.samples.per_evaluation
    if not configure(spec.optimizer).needs_gradient:
        evaluations = budget.evaluations or budget.total / images
        return evaluations * (pace.plain + _SECONDS_TO_STORE)
    seconds = 0.0
    spent = 0.0
    one_row = spec.model_copy(update={"space": SpaceSpec()})  # rows ask for the same
    driver = new_driver(one_row, objective, budget, defaults={})
    for candidate in itertools.islice(_candidates(driver), _SIMULATED):
        share = 1.0 if candidate.images is None else candidate.images / images
        seconds += _SECONDS_TO_STORE + share * (pace.gradient if candidate.gradient else pace.plain)
        spent += share * images if budget.unit == "images" else 1
        if spent >= budget.total:
            break
    return seconds * max(budget.total / spent, 1.0)


def report_seconds(specs: Sequence[StudySpec], objective: Objective, pace: Pace) -> float:
    """How long the reports take: the best trials on the noise of the choice, the answer and the baselines."""
    seconds = 0.0
    images = objective.samples.per_evaluation
    baselines = 2 if objective.fixed_average is None else 3  # EMA*, the last checkpoint, and the yardstick
    for spec in specs:
        held_out = spec.held_out
        if held_out is None:
            continue
        share = 1.0
        if images:
            share = held_out.images_with(objective.samples.per_report) / images
        models = 1 + baselines
        baselines = 0  # an experiment measures them once
        seconds += share * (held_out.top * pace.selection + models * pace.held_out)
        seconds += min(share, 1.0) * models * pace.also  # with no more images than an evaluation of the search
    return seconds


def _seconds_of(evaluate: Callable[[], object]) -> float:
    begin = time.perf_counter()
    evaluate()
    return time.perf_counter() - begin
