"""How long searches and reports take, by the pace of a rehearsal; and what fits into a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

from lcsc_opt.base.errors import LcscError
from lcsc_opt.experiment.choice import FEWEST_IMAGES, SHARE_OF_SEARCH
from lcsc_opt.objective.contract import Objective
from lcsc_opt.study.planning import Plan

_SECONDS_TO_STORE = 0.02  # of a trial, next to its evaluation
_FEWEST = 2  # evaluations: a step, and a check of it
_POINTS_BETWEEN = 3  # EMA* and the best that was found


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
    """How long one search takes: what its budget buys, or as long as it says; a grid may be through before.

    Where workers share the images of a candidate, its time was measured so.
    """
    budget = plan.budget
    if budget.seconds is None:
        evaluations: float = budget.total
        if budget.images is not None:
            evaluations = budget.total / _Mean.of(plan, pace).images
    elif plan.grid_size is None:
        return budget.seconds
    else:
        evaluations = plan.grid_size
    seconds = evaluations * _Mean.of(plan, pace).seconds / int(plan.parallelism["workers"])
    return min(seconds, budget.seconds or seconds)


def evaluations_in(plan: Plan, pace: Pace) -> int:
    """About how many plain evaluations fit into a search's time: what its optimizer plans with; the clock ends it."""
    seconds = (plan.spec.budget.seconds or 0.0) * plan.parallelism["workers"]
    return max(int(seconds / _Mean.of_plain(plan, pace).seconds), _FEWEST)


def evaluations_within(seconds: float, plan: Plan, pace: Pace) -> int:
    """How many evaluations a search makes in a time, steps with a gradient among them; a grid has no more than all."""
    evaluations = max(int(seconds * plan.parallelism["workers"] / _Mean.of(plan, pace).seconds), _FEWEST)
    if plan.grid_size is not None:
        return min(evaluations, plan.grid_size)
    return evaluations


@dataclasses.dataclass(frozen=True)
class _Mean:
    """What an evaluation of a search costs in the mean."""

    images: float
    seconds: float

    @classmethod
    def of_plain(cls, plan: Plan, pace: Pace) -> _Mean:
        """Without a gradient, on all images."""
        images = plan.objective.samples.per_evaluation
        return cls(images, pace.plain.of(images) + _SECONDS_TO_STORE)

    @classmethod
    def of(cls, plan: Plan, pace: Pace) -> _Mean:
        """Of a search that follows the gradient: of its steps, and of a check after so many of them."""
        check = cls.of_plain(plan, pace)
        if not plan.optimizer.needs_gradient:
            return check
        steps, images = plan.optimizer.steps_of_check(plan.objective.samples.per_evaluation)
        of_step = pace.gradient.of(images) + _SECONDS_TO_STORE
        return cls(
            (steps * images + check.images) / (steps + 1),
            (steps * of_step + check.seconds) / (steps + 1),
        )


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


def about(seconds: float) -> str:
    """A duration for people, in its largest unit: ``about 0.12 s``, ``about 1.7 min``, ``about 14 h``."""
    if seconds >= 5400:
        return f"about {_two_digits(seconds / 3600)} h"
    if seconds >= 90:
        return f"about {_two_digits(seconds / 60)} min"
    return f"about {_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
