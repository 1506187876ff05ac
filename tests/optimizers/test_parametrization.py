from __future__ import annotations

import math
from typing import Any

import nevergrad as ng
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import HELD_OUT, Candidate, Evaluation, Noise
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import CoefficientSpace, ConvexSpace
from lcsc_opt.optimizers import ask_with, attach_evaluation, candidate_of, coefficient_array
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, failed, space_of, start_of
from tests.optimizers.asking import AFFINE, PLAIN_ASK, STEPS, how

ORIGIN = AFFINE.origin
CONVEX = ConvexSpace(STEPS, ORIGIN)
SPACES = pytest.mark.parametrize("space", [AFFINE, CONVEX], ids=["affine", "convex"])


@SPACES
def test_an_array_and_its_search_start_at_the_origin_of_its_space(space: CoefficientSpace) -> None:
    array = coefficient_array(space)
    np.testing.assert_allclose(array.value, ORIGIN, atol=1e-15)
    np.testing.assert_array_equal(start_of(array), array.value)
    assert array.dimension == space.shape[0]
    assert space_of(array) is space
    assert space_of(array.spawn_child()) is space


@given(st.integers(0, 2**32 - 1))
def test_a_child_of_given_coefficients_has_them(seed: int) -> None:
    wanted = ORIGIN + np.random.default_rng(seed).standard_normal(20)
    wanted[-1] += 1 - wanted.sum()
    child = coefficient_array(AFFINE).spawn_child(new_value=wanted)
    np.testing.assert_allclose(child.value, wanted, rtol=0, atol=1e-13)


@SPACES
def test_a_value_that_was_read_follows_the_free_vector(space: CoefficientSpace) -> None:
    array = coefficient_array(space, seed=0)
    array.value[0] += 1.0  # of a copy
    np.testing.assert_allclose(array.value, ORIGIN, atol=1e-15)
    child = array.sample()
    assert (
        child.value == space.to_coefficients(child.get_standardized_data(reference=array) * DEFAULT_STEP_SIZE)
    ).all()
    again = child.spawn_child()
    again.mutate()
    assert (again.value != child.value).any()
    assert (child.value == child.spawn_child().value).all()


@pytest.mark.parametrize("step_size", [DEFAULT_STEP_SIZE, 0.3])
def test_step_size_is_one_standard_deviation_of_a_coefficient(step_size: float) -> None:
    array = coefficient_array(AFFINE, step_size=step_size)
    for direction in np.eye(19):
        child = array.spawn_child().set_standardized_data(direction)
        assert np.linalg.norm(child.value - ORIGIN) == pytest.approx(step_size)
    drawn = np.random.default_rng(0).standard_normal((400, 19))
    moved = np.array([array.spawn_child().set_standardized_data(row).value for row in drawn]) - ORIGIN
    np.testing.assert_allclose(moved.std(axis=0), step_size * math.sqrt(19 / 20), rtol=0.2)


def test_a_search_of_a_plain_array_starts_at_the_default_origin_or_at_coefficients_of_ones_choice() -> None:
    np.testing.assert_array_equal(start_of(ng.p.Array(shape=(20,))), default_origin(range(1, 21)))
    np.testing.assert_allclose(start_of(ng.p.Array(init=ORIGIN)), ORIGIN, rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [np.ones(20), np.linspace(-1, 1, 20), [math.inf, -math.inf, 1.0], [1e308, 1e308]])
def test_a_plain_array_whose_value_does_not_sum_to_one_is_refused(value: Any) -> None:
    with pytest.raises(StudySpecError, match=r"sum to one, or all zero.*got a sum of"):
        start_of(ng.p.Array(init=np.array(value)))


@pytest.mark.parametrize(
    ("changes", "images", "compares"),
    [
        ({}, None, True),
        ({}, 1000, True),
        ({"images": 1000}, 1000, True),
        ({"images": 1000}, None, False),
        ({"images": 2000}, 1000, False),
        ({"noise": Noise("gradient", 3)}, 1000, False),
        ({"noise": HELD_OUT}, None, False),
        ({"unbiased": True}, None, False),
    ],
)
def test_losses_compare_on_the_searchs_noise_with_as_many_images(
    changes: dict[str, Any], images: int | None, compares: bool
) -> None:
    assert Candidate(ORIGIN, **changes).compares(images) is compares


def test_what_an_optimizer_asks_with_is_in_the_candidate_and_only_coefficients_without() -> None:
    parameter = coefficient_array(AFFINE).spawn_child()
    assert how(candidate_of(parameter)) == PLAIN_ASK
    wanted = {"images": 7, "noise": Noise("gradient", 3), "gradient": True, "keep_weight": 0.5, "unbiased": True}
    ask_with(parameter, Candidate(parameter.value, **wanted))  # type: ignore[arg-type]
    assert how(candidate_of(parameter)) == PLAIN_ASK | wanted
    assert how(candidate_of(parameter.spawn_child())) == PLAIN_ASK, "it belongs to this ask"


def test_what_failed_is_told_from_what_nobody_said_anything_of() -> None:
    parameter = ng.p.Array(shape=(2,))
    assert not failed(parameter)  # plain Nevergrad tells a loss and nothing else
    attach_evaluation(parameter, Evaluation(1.0))
    assert not failed(parameter)
    attach_evaluation(parameter, None)
    assert failed(parameter)
