from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, DEFAULT_SIZE, Plane, plane_grid
from lcsc_opt.coefficients.profiles import ema_coefficients

STEPS = tuple(range(100, 2100, 100))
PLANE = Plane.through((100, "ema:0.99", 2000), STEPS)


def weights(seed: int, parameters: int = 50) -> np.ndarray:
    """``[K, P]`` checkpoints that move on, as those of a training do."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(len(STEPS), parameters)), axis=0)


@pytest.mark.parametrize(
    "corners", ["abc", [1, 2], [1, 2, True], [1, 2, 3.5], [1, 2, "last"], ["ema:1", 1, 2], ["ema:x", 1, 2]]
)
def test_other_values_are_refused(corners: Any) -> None:
    with pytest.raises(StudySpecError, match="corners: expected three"):
        Plane.through(corners, STEPS)


def test_a_step_that_was_not_saved_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(StudySpecError, match="no checkpoint was saved at step 470; the nearest one is 500"):
        Plane.through((100, 470, 2000), STEPS)


@pytest.mark.parametrize(
    ("corners", "count"),
    [
        ((100, 200, 100), 20),
        (("ema:0", 2000, 100), 20),
        (("ema:0.9", "ema:0.9", 100), 20),
        (("ema:0.9", "ema:0.99", 100), 2),
    ],
)
def test_corners_on_one_line_are_refused(corners: tuple[Any, ...], count: int) -> None:
    with pytest.raises(StudySpecError, match="lie on one line; choose three that span a plane"):
        Plane.through(corners, STEPS[:count])


@given(x=st.floats(-5, 5), y=st.floats(-5, 5))
def test_a_point_is_the_linear_combination_of_the_paper(x: float, y: float) -> None:
    first, second, third = np.eye(20)[0], ema_coefficients(STEPS, 0.99), np.eye(20)[19]
    point = PLANE.at(x, y)
    np.testing.assert_allclose(point, first + x * (second - first) + y * (third - first), rtol=0, atol=1e-14)
    assert abs(math.fsum(point) - 1) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_projection_in_weight_space_is_the_least_squares_solution_over_all_parameters(seed: int) -> None:
    theta = weights(seed)
    centered = theta - theta.mean(axis=0)
    found = np.random.default_rng(seed).normal(size=(4, len(STEPS)))
    found /= found.sum(axis=1, keepdims=True)
    origin, *others = PLANE.corners @ theta
    directions = np.stack(others) - origin
    expected = np.linalg.lstsq(directions.T, (found @ theta - origin).T, rcond=None)[0].T
    np.testing.assert_allclose(PLANE.project(found, PLANE.products(centered @ centered.T)), expected, rtol=1e-8)
    both = np.stack([found, found[::-1]], axis=1)  # a row of coefficients for each half of the parameters
    halves = centered[:, :6], centered[:, 6:]
    products = PLANE.products(np.stack([half @ half.T for half in halves]))
    merged = np.concatenate([found @ theta[:, :6], found[::-1] @ theta[:, 6:]], axis=1)
    expected_of_rows = np.linalg.lstsq(directions.T, (merged - origin).T, rcond=None)[0].T
    np.testing.assert_allclose(PLANE.project(both, products), expected_of_rows, rtol=1e-8)
    np.testing.assert_allclose(PLANE.project(found, products), expected, rtol=1e-8)
    # elsewhere than in coefficients, for checkpoints that are no orthonormal set
    assert not np.allclose(PLANE.project(found), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("size", "margin", "count"),
    [(DEFAULT_SIZE, DEFAULT_MARGIN, 441), (5, 0.5, 25), (2, 0.0, 4), (4, 0.5, 19), (2, 0.25, 7)],
)
def test_every_point_of_the_grid_and_every_corner_is_visited_once(size: int, margin: float, count: int) -> None:
    axis, visited = plane_grid(size, margin)
    assert (axis[0], axis[-1], len(axis)) == (-margin, 1 + margin, size)
    assert visited[:3].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert len(visited) == count == len({tuple(place) for place in visited.tolist()})
    assert {(x, y) for x in axis.tolist() for y in axis.tolist()} <= {tuple(place) for place in visited.tolist()}


def test_a_grid_is_visited_from_coarse_to_fine() -> None:
    axis, places = plane_grid(9, 0.5)
    visited = [tuple(place) for place in places.tolist()]
    for stride, before in ((8, 3 + 4), (4, 3 + 9), (2, 25)):
        assert {(x, y) for x in axis[::stride].tolist() for y in axis[::stride].tolist()} <= set(visited[:before])
