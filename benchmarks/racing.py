"""Racing: the loss that a search without a gradient reaches with the same images, with and without it.

    python benchmarks/racing.py [--seeds 20] [--model-seeds 3] [--evaluations 100] [--only WORD]

``prompts`` is a toy whose exact loss is known. 60 checkpoints walk through 200 dimensions; the loss of image i is a
quadratic around a target that its prompt (one of 300) and the image itself move. An evaluation has 900 images, and the
search sees their mean; the table has the mean over all prompts. ``digits`` is the consistency model of ``refine.py``,
by FID of 1,000 images, with three times as many evaluations; the table has FID of 10,000 images of held-out noise to
half A, which is what the search compares with.

A row is what the search would have answered after a part of its images: the best of the candidates that were evaluated
on all images so far. Settings of racing were chosen on other seeds of the toy. Results that are already in
``results/racing.csv`` are not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from common import measure_missing, parse
from fidelity import objective_of
from refine import TRAINING

from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients, window_ema_rates
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import attach_evaluation, build_optimizer, candidate_of

PARTS = (0.2, 1 / 3, 0.5, 1.0)  # of the images
STEPS = tuple(range(100, 6_100, 100))
DIMENSIONS = 200
PROMPTS = 300
IMAGES = 900
SPREADS = {"prompts alike": 0.3, "prompts that differ": 1.0, "prompts that differ more": 3.0}
RACES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "3 rungs": {"racing": {}},
    "4 rungs": {"racing": {"rungs": 4}},
    "3 rungs, eta 2": {"racing": {"eta": 2}},
}
DIGITS_RACES = ("none", "3 rungs")
OPTIMIZERS = ("LCSC", "CMA")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is searched: the loss of some images, and the one that is reported."""

    steps: tuple[int, ...]
    images: int
    searched: Callable[[Coefficients, int], float]
    reported: Callable[[Coefficients], float]


class Prompts:
    """The toy of one seed."""

    def __init__(self, spread: float, seed: int) -> None:
        random = np.random.default_rng([seed, 7])
        self._weights = random.standard_normal((len(STEPS), DIMENSIONS)).cumsum(axis=0) / math.sqrt(len(STEPS))
        self._curvatures = 1 / np.sqrt(np.arange(1, DIMENSIONS + 1))
        signed = 0.02 * random.standard_normal(len(STEPS))
        beside = 0.1 * random.standard_normal(DIMENSIONS)
        self._target = self._weights[-15:].mean(axis=0) + signed @ self._weights + beside
        prompts = random.standard_normal((PROMPTS, DIMENSIONS))
        images = random.standard_normal((IMAGES, DIMENSIONS))
        shifts = spread / math.sqrt(2) * (prompts[np.arange(IMAGES) % PROMPTS] + images)
        self._shifts = shifts.cumsum(axis=0)
        self._squares = (self._curvatures * shifts**2).sum(axis=1).cumsum()

    def problem(self) -> Problem:
        """The toy as a problem."""
        return Problem(STEPS, IMAGES, self.searched, self.reported)

    def searched(self, coefficients: Coefficients, images: int) -> float:
        """The mean over the first images."""
        away = coefficients @ self._weights - self._target
        mixed = (self._curvatures * away * self._shifts[images - 1]).sum() / images
        return float(self.reported(coefficients) - mixed + self._squares[images - 1] / images / 2)

    def reported(self, coefficients: Coefficients) -> float:
        """The mean over all prompts and images, less what no model can avoid."""
        away = coefficients @ self._weights - self._target
        return float((self._curvatures * away**2).sum() / 2)


@functools.cache
def digits() -> Problem:
    """FID of the consistency model of digits."""
    objective = objective_of(**TRAINING)

    def searched(coefficients: Coefficients, images: int) -> float:
        return objective.evaluate(Candidate(coefficients, images=images)).loss

    def reported(coefficients: Coefficients) -> float:
        return objective.evaluate(Candidate(coefficients, images=10_000, noise=HELD_OUT)).loss

    return Problem(objective.steps, objective.images_per_evaluation, searched, reported)


def main() -> None:
    """Measure what is missing, and print the table."""
    arguments = parse(
        __doc__,
        seeds=20,
        model_seeds=3,
        evaluations=100,
        only={"default": "", "help": "only objectives whose name contains this"},
    )
    keys: list[tuple[Any, ...]] = []
    for objective in (*SPREADS, "digits"):
        if arguments.only not in objective:
            continue
        of_model = objective == "digits"
        races = DIGITS_RACES if of_model else tuple(RACES)
        evaluations = arguments.evaluations * (3 if of_model else 1)
        seeds = range(arguments.model_seeds if of_model else arguments.seeds)
        keys += [(objective, "EMA*", "none", seed, 0) for seed in (range(1) if of_model else seeds)]
        keys += [
            (objective, optimizer, race, seed, evaluations)
            for seed in seeds
            for optimizer in OPTIMIZERS
            for race in races
        ]
    columns = tuple(f"after {part:.0%}" for part in PARTS)
    named = ("objective", "search", "race", "seed", "evaluations")
    measure_missing("racing", keys, measured, named=named, metrics=columns)


def measured(objective: str, optimizer: str, race: str, seed: int, evaluations: int) -> tuple[float, ...]:
    """The reported loss after each part of the images."""
    problem = digits() if objective == "digits" else Prompts(SPREADS[objective], seed).problem()
    if not evaluations:
        averages = [ema_coefficients(problem.steps, rate) for rate in window_ema_rates(problem.steps)]
        best = min(averages, key=lambda average: problem.searched(average, problem.images))
        return (problem.reported(best),) * len(PARTS)
    spec = OptimizerSpec(name=optimizer, options=dict(RACES[race]))
    answers = search(problem, spec, seed, evaluations * problem.images)
    return tuple(problem.reported(answer) for answer in answers)


def search(problem: Problem, spec: OptimizerSpec, seed: int, images: int) -> list[Coefficients]:
    """The best candidate of all images after each part of the images."""
    space = AffineSpace(problem.steps, default_origin(problem.steps))
    asking = build_optimizer(spec, space, budget=images // problem.images, workers=1, seed=seed)
    if hasattr(asking, "plan_budget"):
        asking.plan_budget(evaluations=None, images=images, images_per_evaluation=problem.images)
    answers: list[Coefficients] = []
    best = space.origin
    best_loss = math.inf
    spent = 0
    while len(answers) < len(PARTS):
        parameter = asking.ask()
        candidate = candidate_of(parameter)
        count = candidate.images or problem.images
        spent += count
        while len(answers) < len(PARTS) and spent > PARTS[len(answers)] * images:
            answers.append(best)
        loss = problem.searched(candidate.coefficients, count)
        if candidate.images is None and loss < best_loss:
            best = candidate.coefficients
            best_loss = loss
        attach_evaluation(parameter, Evaluation(loss))
        asking.tell(parameter, loss)
    return answers


if __name__ == "__main__":
    main()
