"""How long searches and reports take, by the pace of a rehearsal; and what fits into a time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.study_spec import BudgetSpec, SpaceSpec
from lcsc_opt.experiment.choice import FEWEST_IMAGES, SHARE_OF_SEARCH
from lcsc_opt.objective.contract import Objective
from lcsc_opt.optimizers import attach_evaluation, candidate_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.planning import Plan

_SECONDS_TO_STORE = 0.02  # of a trial, next to its evaluation
_SIMULATED = 1000  # candidates; more of them cost like the mean of these
_FEWEST = 2  # evaluations: a step, and a check of it
_POINTS_BETWEEN = 3  # EMA* and the best that was found


def evaluations_in(plan: Plan, pace: Pace) -> int:
    """About how many plain evaluations fit into a search's time: what its optimizer plans with; the clock ends it."""
    seconds = (plan.spec.budget.seconds or 0.0) * plan.parallelism["workers"]
    of_one = pace.plain.of(plan.objective.samples.per_evaluation) + _SECONDS_TO_STORE
    return max(int(seconds / of_one), _FEWEST)


def _candidates(optimizer: Driver) -> Iterator[Candidate]:
    """What an optimizer asks for while its steps lead nowhere: numbers of images do not depend on losses."""
    while True:
        nevergrad_candidate = optimizer.ask()
        yield candidate_of(nevergrad_candidate)
        no_gradient = np.zeros_like(nevergrad_candidate.value)
        attach_evaluation(nevergrad_candidate, Evaluation(1.0, gradient=no_gradient))
        optimizer.tell(nevergrad_candidate, 1.0)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """How long an evaluation takes.

    Attributes:
        fixed: with any number of images: merging, and metrics of features.
        of_image: of each image.
    """

    fixed: float = 0.0
    of_image: float = 0.0

    def of(self, images: float) -> float:
        """With so many images."""
        return self.fixed + self.of_image * images

    def __bool__(self) -> bool:
        """Whether it was timed."""
        return bool(self.fixed or self.of_image)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long evaluations take; zero where it was not timed.

    Attributes:
        gradient: with its gradient.
        search: without.
        selection: on the noise of the choice.
        held_out: on that of the report, with its metrics.
        also: in the second sampler.
    """

    gradient: Seconds = Seconds()
    search: Seconds = Seconds()
    selection: Seconds = Seconds()
    held_out: Seconds = Seconds()
    also: Seconds = Seconds()

    @property
    def plain(self) -> Seconds:
        """Of an evaluation of a search without a gradient, as far as it is known."""
        return self.search or self.selection or self.gradient


def searches_seconds(plans: Sequence[Plan], pace: Pace) -> float:
    """How long searches take at most: some optimizers end by themselves."""
    return sum(_seconds_at_most(plan, pace) for plan in plans)


def _seconds_at_most(plan: Plan, pace: Pace) -> float:
    """How long one search takes: as long as its budget says; a grid may be through before.

    Where workers share the images of a candidate, its time was measured so.
    """
    seconds = plan.budget.seconds
    if seconds is None:
        return _search_seconds(plan, pace) / int(plan.parallelism["workers"])
    if plan.grid_size is None:
        return seconds
    of_grid = plan.grid_size * (pace.plain.of(plan.objective.samples.per_evaluation) + _SECONDS_TO_STORE)
    return min(seconds, of_grid / int(plan.parallelism["workers"]))


def evaluations_within(seconds: float, plan: Plan, pace: Pace) -> int:
    """How many evaluations a search makes in a time, steps with a gradient among them; a grid has no more than all."""
    timed = Plan(plan.spec.model_copy(update={"budget": BudgetSpec(seconds=seconds)}), plan.objective)
    if plan.grid_size is not None:
        return min(evaluations_in(timed, pace), plan.grid_size)
    if not plan.optimizer.needs_gradient:
        return evaluations_in(timed, pace)
    images = plan.objective.samples.per_evaluation
    driver = _in_one_row(plan).new_driver(BudgetSpec(evaluations=_SIMULATED))
    spent = 0.0
    for number, candidate in enumerate(itertools.islice(_candidates(driver), _SIMULATED)):
        of_one = pace.gradient if candidate.gradient else pace.plain
        spent += (_SECONDS_TO_STORE + of_one.of(candidate.images or images)) / plan.parallelism["workers"]
        if spent > seconds:
            return number
    return int(_SIMULATED * seconds / spent)


def _in_one_row(plan: Plan) -> Plan:
    """The same search in one row, in which optimizers ask for the same images as in many."""
    return Plan(plan.spec.model_copy(update={"space": SpaceSpec()}), plan.objective)


def _search_seconds(plan: Plan, pace: Pace) -> float:
    """How long one search takes with one worker, for a budget in evaluations or images; plain ones have all images."""
    budget = plan.budget
    images = plan.objective.samples.per_evaluation
    if not plan.optimizer.needs_gradient:
        evaluations = budget.evaluations or budget.total / images
        return evaluations * (pace.plain.of(images) + _SECONDS_TO_STORE)
    seconds = 0.0
    spent = 0.0
    driver = _in_one_row(plan).new_driver(budget)
    for candidate in itertools.islice(_candidates(driver), _SIMULATED):
        count = candidate.images or images
        of_one = pace.gradient if candidate.gradient else pace.plain
        seconds += _SECONDS_TO_STORE + of_one.of(count)
        spent += 1 if budget.images is None else count
        if spent >= budget.total:
            break
    return seconds * max(budget.total / spent, 1.0)


def report_seconds(plans: Sequence[Plan], pace: Pace) -> float:
    """How long the report of these searches takes: the noise of the choice, held-out noise, and a second sampler."""
    held_out = next((plan.spec.held_out for plan in plans if plan.spec.held_out is not None), None)
    if held_out is None:
        return 0.0
    objective = plans[0].objective
    per_evaluation = objective.samples.per_evaluation
    images = 0  # of each model
    if per_evaluation:
        images = held_out.images_with(objective.samples.per_report)
    has_yardstick = objective.fixed_average is not None
    trained = 1 + _count_averages(objective)  # models: the last checkpoint is always one
    models = len(plans) + trained  # the best of each search, EMA* among them
    if objective.sampler is None:
        finalists = math.ceil(held_out.top / len(plans)) * len(plans)
        choosing = (finalists + trained + has_yardstick + _POINTS_BETWEEN) * pace.selection.of(images)
    else:  # a race, with as many images as a share of the searches allows
        # an image of the choice may take longer, for metrics that the search does not compute
        relative = pace.selection.of(per_evaluation) / pace.plain.of(per_evaluation)
        affordable = SHARE_OF_SEARCH * searches_seconds(plans, pace) * relative
        choosing = max(affordable, models * pace.selection.of(FEWEST_IMAGES))
    seconds = choosing + (models + has_yardstick) * pace.held_out.of(images)
    return seconds + models * pace.also.of(min(images, per_evaluation))


def _count_averages(objective: Objective) -> int:
    """How many averages of the trainer's own the report will have."""
    if objective.trajectory is None:
        return 0
    with contextlib.suppress(LcscError):  # of one that was named and is not there, which the run says
        return len(objective.trajectory.averages_sha256)
    return 0
