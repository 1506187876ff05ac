"""``LCSCQuadratic`` finds minima from losses alone, in few evaluations, whatever is delayed, noisy or failing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Coefficients, Cost, Evaluation
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace
from lcsc_opt.optimizers import LCSCQuadratic, candidate_of, coefficient_array
from lcsc_opt.optimizers.gradient import cosine_directions
from lcsc_opt.optimizers.quadratic import NOISE_GROUP
from tests.optimizers.asking import PLAIN_ASK, how, run, spend, tell

STEPS = tuple(range(100, 4100, 100))
COUNT = len(STEPS)
AFFINE = AffineSpace(STEPS, default_origin(STEPS))
PLAIN = 1000  # images
WALK = np.random.default_rng(0).standard_normal((COUNT, 300)).cumsum(axis=0)  # checkpoints lie like a random walk
STRETCH = np.random.default_rng(2).uniform(0.3, 1.7, size=300)  # the loss is no sphere in the weights, either
WAVES = cosine_directions(COUNT)[:, :20] * np.arange(1, 21)
MINIMUM = AFFINE.origin + WAVES * (0.1 / np.abs(WAVES[:, 0]).sum()) @ np.random.default_rng(1).standard_normal(20)
TARGET = MINIMUM @ WALK


class Merged:
    """Squared distance of merged weights from a target.

    A noise shifts the target, the less the more images; and like FID the loss is too large by ``bias`` / images.
    """

    def __init__(self, *, noise: float = 0.0, bias: float = 0.0) -> None:
        self.noise, self.bias = noise, bias

    def true(self, coefficients: Coefficients) -> float:
        return float(np.sum(STRETCH * (coefficients @ WALK - TARGET) ** 2))

    def answer(self, candidate: Any) -> Evaluation:
        asked = candidate_of(candidate)
        images = asked.images or PLAIN
        generator = np.random.default_rng([asked.noise.seed, len(asked.noise.group)])
        shift = self.noise / np.sqrt(images) * generator.standard_normal(WALK.shape[1])
        loss = float(np.sum(STRETCH * (candidate.value @ WALK - TARGET - shift) ** 2)) + self.bias / images
        return Evaluation(loss, cost=Cost(images=images))


def search(space: CoefficientSpace = AFFINE, *, seed: int = 0, images: int | None = 300_000, **options: Any) -> Any:
    optimizer = LCSCQuadratic(**options)(coefficient_array(space, seed=seed), num_workers=12)
    if images is not None:
        optimizer.plan_budget(evaluations=None, images=images, images_per_evaluation=PLAIN)
    return optimizer


def left(optimizer: Any) -> float:
    """The true loss of what it recommends, as a share of the loss it began with."""
    return Merged().true(optimizer.recommend().value) / Merged().true(AFFINE.origin)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_and_bias_of_few_images_do_not_lead_it_astray(seed: int) -> None:
    optimizer = search(seed=seed)
    run(optimizer, Merged(noise=15.0, bias=1000.0), 200)
    assert left(optimizer) < 0.12


def test_the_first_stage_has_few_images_on_one_noise_of_its_own_then_all_are_plain() -> None:
    asked = [candidate_of(parameter) for parameter in run(search(), Merged(), 200)]
    cheap = [candidate for candidate in asked if how(candidate) != PLAIN_ASK]
    assert len(cheap) == 2 * (COUNT - 1)
    assert {candidate.images for candidate in cheap} == {200}
    assert len({candidate.noise for candidate in cheap}) == 1
    assert cheap[0].noise.group == NOISE_GROUP
    assert not any(candidate.gradient for candidate in asked)
    assert all(how(candidate) == PLAIN_ASK for candidate in asked[-50:])


def test_checks_take_their_share_of_the_first_stage_and_no_more() -> None:
    asked = [candidate_of(parameter) for parameter in run(search(), Merged(), 2 * (COUNT - 1))]
    plain = sum(PLAIN for candidate in asked if how(candidate) == PLAIN_ASK)
    cheap = sum(candidate.images or 0 for candidate in asked)
    assert 0.1 * (plain + cheap) < plain <= 0.2 * (plain + cheap)


@pytest.mark.parametrize(("images", "evaluations", "probed"), [(12_000, None, 6), (None, 60, 6), (60_000, None, 30)])
def test_a_small_budget_searches_fewer_waves(images: int | None, evaluations: int | None, probed: int) -> None:
    optimizer = search(images=None)
    optimizer.plan_budget(evaluations=evaluations, images=images, images_per_evaluation=PLAIN)
    candidates = [candidate.value - AFFINE.origin for candidate in run(optimizer, Merged(), 200)]
    assert np.linalg.matrix_rank(np.array(candidates), tol=1e-9) == probed


@pytest.mark.parametrize("in_flight", [1, 12])
@pytest.mark.parametrize(("images", "evaluations"), [(400, None), (3000, None), (None, 1)])
def test_even_the_smallest_budget_has_a_plain_evaluation(
    images: int | None, evaluations: int | None, in_flight: int
) -> None:
    optimizer = LCSCQuadratic()(coefficient_array(AFFINE, seed=0), num_workers=in_flight)
    asked, _ = spend(optimizer, Merged(), images=images, evaluations=evaluations, in_flight=in_flight)
    assert PLAIN_ASK in [how(candidate) for candidate in asked]


@pytest.mark.parametrize("images_per_evaluation", [0, PLAIN])
def test_an_objective_without_images_or_a_share_of_all_of_them_has_plain_evaluations_only(
    images_per_evaluation: int,
) -> None:
    optimizer = search(images=None, share=1.0)
    optimizer.plan_budget(evaluations=300, images=None, images_per_evaluation=images_per_evaluation)
    asked = run(optimizer, Merged(), 120)
    assert all(how(candidate_of(parameter)) == PLAIN_ASK for parameter in asked)
    assert left(optimizer) < 0.05


@pytest.mark.parametrize(
    ("failing", "in_flight", "count", "most"),
    [
        *((lambda _: False, workers, 240, most) for workers, most in ((1, 1e-3), (3, 1e-3), (12, 1e-2))),
        (lambda told: told % 5 == 0, 3, 240, 1e-2),
        (lambda told: told <= 1, 1, 251, 1e-1),
        (lambda told: told <= 60, 1, 310, 1e-1),
        (lambda told: 50 <= told < 75, 1, 240, 1e-2),
    ],
)
def test_it_finds_the_minimum_of_an_ill_conditioned_quadratic_although_candidates_fail(
    failing: Any, in_flight: int, count: int, most: float
) -> None:
    optimizer = search()
    run(optimizer, Merged(), count, in_flight=in_flight, failing=failing)
    assert left(optimizer) < most


def test_a_loss_that_never_changes_ends_nowhere_and_breaks_nothing() -> None:
    optimizer = search()
    for _ in range(150):
        tell(optimizer, optimizer.ask(), Evaluation(1.0))
    assert np.isfinite(optimizer.recommend().value).all()


def test_a_convex_space_is_kept_to() -> None:
    space = ConvexSpace(STEPS, AFFINE.origin)
    optimizer = search(space)
    for candidate in run(optimizer, Merged(), 160):
        np.testing.assert_allclose(space.to_coefficients(space.to_free(candidate.value)), candidate.value, atol=1e-9)
    assert left(optimizer) < 0.7


def test_probes_move_the_weights_of_a_random_walk_about_equally() -> None:
    walk = np.random.default_rng(0).standard_normal((COUNT, 20_000)).cumsum(axis=0)
    probes = np.array([candidate.value for candidate in run(search(), Merged(), 40)][1:]) - AFFINE.origin
    moved = np.linalg.norm(probes[np.abs(probes).max(axis=1) > 1e-9] @ walk, axis=1)
    assert moved.max() < 1.6 * moved.min()
    np.testing.assert_allclose(np.abs(probes[0]).sum(), 0.07)
