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


@pytest.mark.parametrize("corners", [(100, 200, 470), (100, 200, "last"), ("ema:x", 100, 200), ("ema:1", 100, 200)])
def test_corners_that_are_not_there_are_refused(corners: Any) -> None:
    with pytest.raises(StudySpecError, match=r"expected the step of a checkpoint|expected at least 0 and below 1"):
        Plane.through(corners, STEPS)


@given(x=st.floats(-5, 5), y=st.floats(-5, 5))
def test_a_point_is_the_linear_combination_of_the_paper(x: float, y: float) -> None:
    first = np.eye(20)[0]
    second = ema_coefficients(STEPS, 0.99)
    third = np.eye(20)[19]
    point = PLANE.at(x, y)
    np.testing.assert_allclose(point, first + x * (second - first) + y * (third - first), rtol=0, atol=1e-14)
    assert abs(math.fsum(point) - 1) <= 1e-12


def test_a_projection_is_the_nearest_point() -> None:
    points = [(0.25, -0.5), (0.0, 0.0), (1.5, 2.0)]
    on_the_plane = np.array([PLANE.at(x, y) for x, y in points])
    away = np.random.default_rng(0).normal(size=on_the_plane.shape)
    away -= away @ np.linalg.pinv(PLANE.directions) @ PLANE.directions  # at right angles to it
    np.testing.assert_allclose(PLANE.project(on_the_plane + away), points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [DEFAULT_SIZE, 11, 6, 2])
def test_every_point_of_the_grid_is_visited_once(size: int) -> None:
    axis, visited = plane_grid(size)
    assert (axis[0], axis[-1], len(axis)) == (-MARGIN, 1 + MARGIN, size)
    assert len(visited) == size**2
    assert {(x, y) for x in axis.tolist() for y in axis.tolist()} == set(visited)
    if size > 6:
        assert {(0, 0), (1, 0), (0, 1)} <= set(visited), "the corners are among them"


def test_a_grid_is_visited_from_coarse_to_fine() -> None:
    axis, visited = plane_grid(9)
    for stride, before in ((8, 4), (4, 9), (2, 25)):
        assert {(x, y) for x in axis[::stride].tolist() for y in axis[::stride].tolist()} == set(visited[:before])
