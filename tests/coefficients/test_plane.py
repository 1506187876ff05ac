from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, MARGIN, Plane, plane_grid
from lcsc_opt.coefficients.profiles import ema_coefficients

STEPS = tuple(range(100, 2100, 100))
PLANE = Plane.through((100, "ema:0.99", 2000), STEPS)


def weights(seed: int, parameters: int = 50) -> np.ndarray:
    """``[K, P]`` checkpoints that move on, as those of a training do."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(len(STEPS), parameters)), axis=0)


@pytest.mark.parametrize("corners", [(100, 200, 470), (100, 200, "last"), ("ema:x", 100, 200), ("ema:1", 100, 200)])
def test_corners_that_are_not_there_are_refused(corners: Any) -> None:
    with pytest.raises(StudySpecError, match=r"expected three steps of checkpoints|expected at least 0 and below 1"):
        Plane.through(corners, STEPS)


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
    first = np.eye(20)[0]
    second = ema_coefficients(STEPS, 0.99)
    third = np.eye(20)[19]
    point = PLANE.at(x, y)
    np.testing.assert_allclose(point, first + x * (second - first) + y * (third - first), rtol=0, atol=1e-14)
    assert abs(math.fsum(point) - 1) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_projection_in_weight_space_is_the_least_squares_solution_over_all_parameters(seed: int) -> None:
    theta = weights(seed)
    centered = theta - theta.mean(axis=0)
    models = np.random.default_rng(seed).normal(size=(4, len(STEPS)))
    models /= models.sum(axis=1, keepdims=True)
    corners = PLANE.corners @ theta
    directions = corners[1:] - corners[0]

    def nearest(merged: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.lstsq(directions.T, (merged - corners[0]).T, rcond=None)[0].T)

    expected = nearest(models @ theta)
    np.testing.assert_allclose(PLANE.project(models, PLANE.products(centered @ centered.T)), expected, rtol=1e-8)

    in_rows = np.stack([models, models[::-1]], axis=1)  # a row of coefficients for each part of the parameters
    parts = (centered[:, :6], centered[:, 6:])
    products = PLANE.products(np.stack([part @ part.T for part in parts]))
    merged = np.concatenate([models @ theta[:, :6], models[::-1] @ theta[:, 6:]], axis=1)
    np.testing.assert_allclose(PLANE.project(in_rows, products), nearest(merged), rtol=1e-8)
    np.testing.assert_allclose(PLANE.project(models, products), expected, rtol=1e-8)

    # elsewhere than in coefficients, for checkpoints that are no orthonormal set
    assert not np.allclose(PLANE.project(models, PLANE.products(None)), expected, rtol=1e-2)


@pytest.mark.parametrize(("size", "count"), [(DEFAULT_SIZE, 441), (6, 39), (2, 7)])
def test_every_point_of_the_grid_and_every_corner_is_visited_once(size: int, count: int) -> None:
    axis, visited = plane_grid(size)
    assert (axis[0], axis[-1], len(axis)) == (-MARGIN, 1 + MARGIN, size)
    assert visited[:3] == [(0, 0), (1, 0), (0, 1)]
    assert len(visited) == count == len(set(visited))
    assert {(x, y) for x in axis.tolist() for y in axis.tolist()} <= set(visited)


def test_a_grid_is_visited_from_coarse_to_fine() -> None:
    axis, visited = plane_grid(9)
    for stride, before in ((8, 3 + 4), (4, 3 + 9), (2, 3 + 25)):
        assert {(x, y) for x in axis[::stride].tolist() for y in axis[::stride].tolist()} <= set(visited[:before])
