"""``LCSCGradient`` follows gradients to the minimum, through any space, whatever is delayed, noisy or failing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.fft import dct
from scipy.optimize import minimize

from lcsc_opt.base.jackknife import GROUPS, standard_error
from lcsc_opt.base.records import SEARCH, Coefficients, Evaluation
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace
from lcsc_opt.optimizers import LCSCGradient, candidate_of, coefficient_array
from lcsc_opt.optimizers.gradient import USUAL_CLOSENESS, cosine_directions
from tests.optimizers.asking import AFFINE, PLAIN_ASK, STEPS, how, run, spend, tell

COUNT = len(STEPS)
WALK = np.random.default_rng(0).standard_normal((COUNT, 60)).cumsum(axis=0)  # checkpoints lie like a random walk
MINIMUM = AFFINE.to_coefficients(0.1 * np.random.default_rng(1).standard_normal(COUNT - 1))  # some are negative
TARGET = MINIMUM @ WALK


class Quadratic:
    """|merged weights - target|², times ``scale``; every noise shifts the target by about ``noise``."""

    def __init__(self, *, noise: float = 0.0, scale: float = 1.0) -> None:
        self.noise, self.scale = noise, scale
        self.target = TARGET

    def __call__(self, coefficients: Coefficients, *, seed: int | None = None, gradient: bool = False) -> Evaluation:
        shift = 0.0 if seed is None else self.noise * np.random.default_rng(seed).standard_normal(WALK.shape[1])
        rest = coefficients @ WALK - self.target - shift
        slope = 2 * self.scale * WALK @ rest if gradient else None
        return Evaluation(self.scale * float(rest @ rest), gradient=slope)

    def answer(self, candidate: Any) -> Evaluation:
        """What the objective answers to a candidate, as the runner would ask it."""
        asked = candidate_of(candidate)
        seed = None if asked.noise == SEARCH else asked.noise.seed
        return self(asked.coefficients, seed=seed, gradient=asked.gradient)


def gradient_search(
    space: CoefficientSpace = AFFINE,
    *,
    length: float | None = 0.03,
    plan: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """With a first step of this ``length`` in coefficients, or one that it finds.

    With ``plan``, of so many images in all and in a check.
    """
    step_size = None if length is None else length / math.sqrt(USUAL_CLOSENESS)
    optimizer = LCSCGradient(step_size=step_size, **options)(coefficient_array(space, seed=0))
    if plan is not None:
        optimizer.plan_budget(evaluations=None, images=plan[0], images_per_evaluation=plan[1])
    return optimizer


def loss_of(optimizer: Any, objective: Quadratic | None = None) -> float:
    """The true loss of what it recommends."""
    return (objective or Quadratic())(optimizer.recommend().value).loss


START = Quadratic()(AFFINE.origin).loss


@pytest.mark.parametrize(("in_flight", "left"), [(1, 1e-6), (3, 1e-3), (12, 2e-2)])
def test_it_finds_the_minimum_of_a_quadratic(in_flight: int, left: float) -> None:
    optimizer = gradient_search(steps=300)
    run(optimizer, Quadratic(), 400, in_flight=in_flight)
    assert loss_of(optimizer) < left * START
    np.testing.assert_allclose(optimizer.recommend().value, MINIMUM, atol=0.03)


def test_every_gradient_is_asked_without_bias_on_noise_of_its_own_and_every_check_plainly() -> None:
    asked = [candidate_of(parameter) for parameter in run(gradient_search(), Quadratic(), 100)]
    steps = [candidate for candidate in asked if candidate.gradient]
    assert all(candidate.unbiased for candidate in steps)
    assert len({candidate.noise for candidate in steps}) == len(steps) == 80
    assert {candidate.noise.group for candidate in steps} == {"gradient"}
    checks = [candidate for candidate in asked if not candidate.gradient]
    assert all(how(candidate) == {**PLAIN_ASK, "error": True} for candidate in checks), "their error ends the search"


@pytest.mark.parametrize(("checks", "per_evaluation"), [(0.1, 1000), (0.2, 0), (0.5, 50)])
def test_checks_take_their_share_of_the_images(checks: float, per_evaluation: int) -> None:
    asked = run(gradient_search(checks=checks, steps=1000, plan=(10**9, per_evaluation)), Quadratic(), 300)
    steps = [candidate_of(one).images or 1 for one in asked if candidate_of(one).gradient]
    gradients, plain = sum(steps), (len(asked) - len(steps)) * (per_evaluation or 1)  # without images, candidates
    most = checks * (gradients + plain)
    room = (per_evaluation or 1) + (200 * plain / per_evaluation if per_evaluation else 0)  # whole checks, whole steps
    assert most - room <= plain <= most
    steps_of_check, images = LCSCGradient(checks=checks).steps_of_check(per_evaluation)
    assert set(steps) == {images or 1}, "by which a run tells how long it takes"
    assert len(steps) / (len(asked) - len(steps)) == pytest.approx(steps_of_check, rel=0.2)


@pytest.mark.parametrize(
    ("images", "evaluations", "in_flight"),
    [(1100, None, 1), (3000, None, 1), (20_000, None, 1), (None, 12, 99), (1100, None, 99)],  # 99: before a first step
)
def test_a_check_ends_the_planned_budget(images: int | None, evaluations: int | None, in_flight: int) -> None:
    """Without it a study with many workers would end without a number."""
    budget = {"images": images, "evaluations": evaluations}
    asked, left = spend(gradient_search(), Quadratic(), **budget, in_flight=in_flight)  # type: ignore[arg-type]
    assert [candidate.gradient for candidate in asked[-2:]] == [True, False]
    assert left > -400  # no more than the images of a step


@pytest.mark.parametrize("scale", [0.03, 0.3, 1.0])
def test_the_first_step_is_as_long_as_lowers_the_loss_most(scale: float) -> None:
    """The minimum is nearer by ``scale``, so the best length is shorter by as much."""
    nearby = AFFINE.to_coefficients(scale * AFFINE.to_free(MINIMUM))
    objective = Quadratic()
    objective.target = nearby @ WALK
    asked = run(gradient_search(length=None), objective, 20)
    kinds = [candidate_of(one).gradient for one in asked]
    first = kinds.index(True, 1)
    assert kinds[:first] == [True] + [False] * (first - 1)
    assert 4 <= first <= 9, "the neighbours of the best length, and what lies between it and the first that is tried"
    tried = [float(np.linalg.norm(one.value - asked[0].value)) for one in asked[1:first]]
    losses = [objective(one.value).loss for one in asked[1:first]]
    assert float(np.linalg.norm(asked[first].value - asked[0].value)) == tried[int(np.argmin(losses))]
    assert min(losses) < objective(asked[0].value).loss
    assert np.log2(np.divide(tried, tried[0])) == pytest.approx(np.rint(np.log2(np.divide(tried, tried[0]))))


def test_where_every_first_step_harms_it_is_short_and_not_nearly_nothing() -> None:
    """Near the floor slopes are noise, and a step that is as long in every direction is worse than none at first."""
    objective = Quadratic(noise=0.1)
    objective.target = AFFINE.to_coefficients(AFFINE.to_free(MINIMUM) * 0.0) @ WALK
    asked = run(gradient_search(length=None), objective, 12)
    tried = [one for one in asked if candidate_of(one).unbiased and not candidate_of(one).gradient]
    lengths = [float(np.linalg.norm(one.value - asked[0].value)) for one in tried]
    assert min(lengths) == pytest.approx(lengths[0] / 16)
    assert candidate_of(asked[len(tried) + 1]).gradient, "and the search goes on"


def test_lengths_are_compared_on_noise_of_their_own_and_without_bias() -> None:
    asked = [candidate_of(one) for one in run(gradient_search(length=None), Quadratic(noise=0.1), 30)]
    tried = [one for one in asked if one.unbiased and not one.gradient]
    assert len(tried) >= 3
    [noise] = {one.noise for one in tried}
    assert noise.group == "gradient"
    assert noise not in {one.noise for one in asked if one.gradient}


def test_lengths_that_fail_make_the_first_step_short_and_one_that_is_given_is_taken() -> None:
    optimizer = gradient_search(length=None)
    asked = run(optimizer, Quadratic(), 12, failing=lambda number: 2 <= number <= 5)
    steps = [one for one in asked if candidate_of(one).gradient]
    moved = np.linalg.norm(steps[1].value - steps[0].value)
    assert 0 < moved < 0.05 * math.sqrt(USUAL_CLOSENESS) / 8
    given = run(gradient_search(length=0.03), Quadratic(), 4)
    assert [candidate_of(one).gradient for one in given] == [True] * 4


@pytest.mark.parametrize("evaluations", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_budget_that_ends_while_lengths_are_tried_ends_with_a_check(evaluations: int, in_flight: int) -> None:
    optimizer = gradient_search(length=None)
    asked, left = spend(optimizer, Quadratic(), images=None, evaluations=evaluations, in_flight=in_flight)
    assert (len(asked), left) == (evaluations, 0)
    assert how(asked[-1]) == {**PLAIN_ASK, "error": True}
    if in_flight == 1 and evaluations > 2:
        assert Quadratic()(asked[-1].coefficients).loss < START


@pytest.mark.parametrize(("evaluations", "longer"), [(None, 1), (67, 1), (49, 60 / 42), (20, 2)])
def test_steps_are_longer_where_the_budget_allows_fewer(evaluations: int | None, longer: float) -> None:
    optimizer = LCSCGradient()(coefficient_array(AFFINE, seed=0))
    if evaluations is not None:
        optimizer.plan_budget(evaluations=evaluations, images=None, images_per_evaluation=1000)
    always = cosine_directions(COUNT).sum(axis=1)
    asked: list[Any] = []
    while sum(candidate_of(one).gradient for one in asked) < 4:
        asked.append(optimizer.ask())
        tried = float(np.linalg.norm(asked[-1].value - asked[min(1, len(asked) - 1)].value))  # the first one is best
        tell(optimizer, asked[-1], Evaluation(tried, gradient=always if candidate_of(asked[-1]).gradient else None))
    start, first, second, third = (one.value for one in asked if candidate_of(one).gradient)
    steps = np.array([np.linalg.norm(second - first), np.linalg.norm(third - second)])
    fallen = np.diff(steps)[0] / steps[0]  # by one part of the round in so many
    whole = steps[0] / (1 + fallen / (1 - fallen)) if fallen else steps[0]
    assert whole / np.linalg.norm(first - start) == pytest.approx(longer, rel=0.05)


@pytest.mark.parametrize(("in_flight", "left"), [(1, 1e-6), (3, 1e-3), (12, 5e-2)])
def test_with_a_length_that_it_finds_it_ends_at_the_minimum(in_flight: int, left: float) -> None:
    optimizer = gradient_search(length=None, steps=300)
    run(optimizer, Quadratic(), 450, in_flight=in_flight)
    assert loss_of(optimizer) < left * START


def lengths_of_steps(optimizer: Any, count: int) -> list[float]:
    """How long so many steps are where every direction rises by one, so that Adam always goes as far as it may."""
    always = Evaluation(1.0, gradient=cosine_directions(COUNT).sum(axis=1))
    asked = []
    while len(asked) <= count:
        candidate = optimizer.ask()
        if candidate_of(candidate).gradient:
            asked.append(candidate.value)
        tell(optimizer, candidate, always)
    return [float(np.linalg.norm(after - before)) for before, after in itertools.pairwise(asked)]


def test_the_step_falls_linearly_and_further_rounds_have_half_as_many_half_as_long() -> None:
    lengths = lengths_of_steps(gradient_search(steps=4, length=0.08), 8)
    np.testing.assert_allclose(lengths, [0.08, 0.06, 0.04, 0.02, 0.04, 0.02, 0.04, 0.02], rtol=1e-9)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [((None, 3000), 12), ((None, 10**6), 60), ((40, None), 38), ((5, None), 4)],  # 80 % of 3000 are twelve times 200
)
def test_a_small_budget_makes_the_first_round_shorter(budget: tuple[int | None, int | None], steps: int) -> None:
    optimizer = gradient_search()
    optimizer.plan_budget(evaluations=budget[0], images=budget[1], images_per_evaluation=1000)
    lengths = lengths_of_steps(optimizer, steps)
    np.testing.assert_allclose(lengths, 0.03 * (1 - np.arange(steps) / steps), rtol=1e-9)


def test_steps_have_no_more_images_than_a_check() -> None:
    assert candidate_of(gradient_search(plan=(10**9, 500)).ask()).images == 200
    assert candidate_of(gradient_search(plan=(10**9, 70)).ask()).images == 70


def test_an_objective_without_images_is_not_asked_for_any() -> None:
    optimizer = gradient_search()
    optimizer.plan_budget(evaluations=400, images=None, images_per_evaluation=0)
    asked = run(optimizer, Quadratic(), 60)
    assert {candidate_of(candidate).images for candidate in asked} == {None}


@pytest.mark.parametrize("length", [0.01, 0.1])
def test_every_direction_has_its_part_of_the_first_step(length: float) -> None:
    first, second = run(gradient_search(length=length), Quadratic(), 2)
    moved = cosine_directions(COUNT).T @ (second.value - first.value)
    assert np.linalg.norm(second.value - first.value) == pytest.approx(length)
    np.testing.assert_allclose(np.abs(moved), np.abs(moved).mean(), rtol=1e-9)


def test_the_step_of_each_row_grows_with_the_root_of_how_close_its_checkpoints_are() -> None:
    closeness = np.array([4.0, 100.0])
    optimizer = LCSCGradient(step_size=0.01)(
        coefficient_array(AffineSpace(STEPS, np.stack([AFFINE.origin] * 2), closeness))
    )
    first, second = run(optimizer, Rows(), 2)
    np.testing.assert_allclose(np.linalg.norm(second.value - first.value, axis=1), [0.02, 0.1], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    plain, scaled = gradient_search(), gradient_search()
    run(plain, Quadratic(), 60)
    run(scaled, Quadratic(scale=scale), 60)
    np.testing.assert_allclose(scaled.recommend().value, plain.recommend().value, rtol=1e-7, atol=1e-9)


def test_a_convex_space_is_searched_to_its_own_minimum() -> None:
    optimizer = gradient_search(ConvexSpace(STEPS, default_origin(STEPS)))
    asked = run(optimizer, Quadratic(), 300)
    assert min(float(one.value.min()) for one in asked) >= 0.0
    found = optimizer.recommend().value
    best = minimize(  # scipy's sequential quadratic programming
        lambda a: Quadratic()(a).loss,
        default_origin(STEPS),
        jac=lambda a: Quadratic()(a, gradient=True).gradient,
        bounds=[(0, 1)] * COUNT,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert (best.x < 1e-6).any()  # the bounds matter
    assert loss_of(optimizer) == pytest.approx(best.fun, rel=0.05)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_cosine_directions_are_scipys() -> None:
    expected = dct(np.eye(COUNT), type=2, norm="ortho", axis=0).T[:, 1:]
    np.testing.assert_allclose(cosine_directions(COUNT), expected, atol=1e-14)


# --- failures


def test_after_a_failure_it_goes_on_from_the_average_with_half_the_step() -> None:
    optimizer = gradient_search(length=0.02 * np.sqrt(COUNT - 1), checks=0.01, steps=10**9)
    always = Evaluation(1.0, gradient=cosine_directions(COUNT).sum(axis=1))  # every direction rises by one
    for _ in range(4):
        tell(optimizer, optimizer.ask(), always)
    average = optimizer.recommend().value
    assert np.abs(optimizer.ask().value - average).max() > 1e-3
    tell(optimizer, optimizer.ask(), None, loss=1e6)
    retreated = optimizer.ask()
    np.testing.assert_allclose(retreated.value, average, atol=1e-12)
    tell(optimizer, retreated, always)
    moved = cosine_directions(COUNT).T @ (optimizer.ask().value - average)
    np.testing.assert_allclose(moved, -0.01, rtol=1e-6)


def goes_on(ends: Sequence[float], error: float | None = None, first: float = 10.0) -> bool:
    """Whether a search goes on whose rounds end with these losses, whose differences have this error, if it is known.

    ``first`` is the loss of all checks before the end of the first round.
    """
    optimizer = gradient_search(steps=8, checks=0.2)
    left = list(ends)
    while left and not optimizer.finished:
        candidate = optimizer.ask()
        if candidate_of(candidate).gradient:
            tell(optimizer, candidate, Evaluation(0.0, gradient=np.zeros(COUNT)))
            continue
        ends_round = optimizer._path.has_ended_round
        loss = left.pop(0) if ends_round else first
        without_groups = {}
        if error is not None:  # of differences from the first check; those between others have about this error, too
            own = np.random.default_rng(len(left)).standard_normal(GROUPS)
            own *= error / np.sqrt(2) / standard_error(own.tolist())
            without_groups["loss"] = (loss + own).tolist()
        tell(optimizer, candidate, Evaluation(loss, without_groups=without_groups))
    return not optimizer.finished


def test_a_search_ends_when_a_round_of_shorter_steps_brought_nothing() -> None:
    assert goes_on([5.0]), "the first round has none to compare with"
    assert goes_on([5.0, 4.0, 3.0], error=0.1)
    assert not goes_on([5.0, 4.0, 3.95], error=0.1), "less than its error"
    assert goes_on([5.0, 4.0, 3.5])
    assert not goes_on([5.0, 4.0, 3.99]), "less than a hundredth of the whole gain"
    assert not goes_on([5.0, 5.1])


def test_a_search_in_noise_that_got_where_it_can_ends_by_itself() -> None:
    optimizer = gradient_search()
    asked = 0
    while not optimizer.finished and asked < 3000:
        run(optimizer, Quadratic(noise=1.0), 1)
        asked += 1
    assert 60 <= asked < 3000
    assert loss_of(optimizer) < 0.05 * START


class Rows(Quadratic):
    """A :class:`Quadratic` in each row of coefficients, with targets of their own."""

    def __call__(self, coefficients: Coefficients, *, seed: int | None = None, gradient: bool = False) -> Evaluation:
        parts = [
            Quadratic(scale=scale)(row, gradient=gradient) for row, scale in zip(coefficients, (1, 9), strict=True)
        ]
        slopes = np.stack([part.gradient for part in parts]) if gradient else None  # type: ignore[misc]
        return Evaluation(sum(part.loss for part in parts), gradient=slopes)


def test_each_row_is_searched_as_if_it_were_alone() -> None:
    whole = gradient_search(AffineSpace(STEPS, np.stack([AFFINE.origin] * 2)))
    found = [candidate.value for candidate in run(whole, Rows(), 60)]
    alone = [candidate.value for candidate in run(gradient_search(AFFINE), Quadratic(), 60)]
    for row in range(2):
        np.testing.assert_allclose([each[row] for each in found], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("evaluations", range(2, 40))
def test_a_check_at_the_end_of_a_round_leaves_no_step_unchecked(evaluations: int) -> None:
    optimizer = gradient_search(steps=5)
    optimizer.plan_budget(evaluations=evaluations, images=None, images_per_evaluation=1000)
    asked = [candidate_of(one).gradient for one in run(optimizer, Quadratic(), evaluations)]
    assert not asked[-1]
    assert not optimizer.is_unchecked
