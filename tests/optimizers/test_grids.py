from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.plane import Plane, plane_grid
from lcsc_opt.coefficients.profiles import (
    POWER_EMA_SIGMAS,
    average_name,
    ema_coefficients,
    power_ema_coefficients,
    window_ema_rates,
)
from lcsc_opt.optimizers import ProfileGrid, coefficient_array
from lcsc_opt.optimizers.grids import PROFILES, PlaneGrid
from lcsc_opt.optimizers.parametrization import candidate_of
from tests.optimizers.asking import AFFINE, STEPS


def uniform(*counts: int) -> list[np.ndarray]:
    return [np.repeat([0.0, 1 / count], [20 - count, count]) for count in counts]


def extrapolated(*extrapolations: float) -> list[np.ndarray]:
    """By hand: the last ones above 1 / N, those before them below zero."""
    points = []
    for last in (1, 2, 4, 8, 10):
        for extrapolation in extrapolations:
            point = np.zeros(20)
            point[20 - last :] = (1 + extrapolation) / last
            point[20 - 2 * last : 20 - last] = -extrapolation / last
            points.append(point)
    return points


UNIFORM = uniform(1, 3, 10, 20)


def build(grid: Any) -> Any:
    return grid(coefficient_array(AFFINE, seed=0), budget=100)


@pytest.mark.parametrize(("grid", "with_error"), [(ProfileGrid("single"), True), (PlaneGrid(size=2), False)])
def test_the_few_models_that_people_compare_are_measured_with_their_errors(grid: Any, with_error: bool) -> None:
    optimizer = build(grid)
    assert {candidate_of(optimizer.ask()).error for _ in range(4)} == {with_error}


def plane_points(corners: Any) -> list[np.ndarray]:
    plane = Plane.through(corners, STEPS)
    return [plane.at(x, y) for x, y in plane_grid(4)[1]]


@pytest.mark.parametrize(
    ("grid", "points"),
    [
        (ProfileGrid(), [*(ema_coefficients(STEPS, rate) for rate in window_ema_rates(STEPS)), *UNIFORM]),
        (ProfileGrid("ema", values=[0.99, 0.9]), [*(ema_coefficients(STEPS, rate) for rate in (0.99, 0.9)), *UNIFORM]),
        (ProfileGrid("power"), [power_ema_coefficients(STEPS, sigma_rel) for sigma_rel in POWER_EMA_SIGMAS]),
        (ProfileGrid("power", values=(0.2,)), [power_ema_coefficients(STEPS, 0.2)]),
        (ProfileGrid("uniform"), uniform(2, 4, 8, 16, 20)),
        (ProfileGrid("uniform", values=[99, 3]), uniform(3, 20)),
        (ProfileGrid("extrapolated"), extrapolated(0, 0.25, 0.5, 1, 2)),
        (ProfileGrid("extrapolated", values=[-0.5, 3]), extrapolated(-0.5, 3)),
        (ProfileGrid("single"), list(np.eye(20))),
        (ProfileGrid("single", values=[STEPS[3], STEPS[1]]), [np.eye(20)[3], np.eye(20)[1]]),
        (PlaneGrid(size=4), plane_points(None)),
        (PlaneGrid(size=4, corners=["ema:0.9", "ema:0.99", 500]), plane_points(["ema:0.9", "ema:0.99", 500])),
    ],
    ids=str,
)
def test_a_grid_asks_its_points_in_order_and_is_finished(grid: Any, points: list[np.ndarray]) -> None:
    optimizer = build(grid)
    for number, point in enumerate(points):
        assert not optimizer.finished
        candidate = optimizer.ask()
        np.testing.assert_allclose(candidate.value, point, rtol=0, atol=1e-14)
        optimizer.tell(candidate, -float(number))
    assert optimizer.finished
    for best in (optimizer.recommend(), optimizer.ask()):  # which it asks again
        np.testing.assert_allclose(best.value, points[-1], rtol=0, atol=1e-14)


WITH_BASE = tuple(range(0, 500, 100))
ANY_STEPS = [ProfileGrid(profile) for profile in PROFILES if profile != "strength"]


@pytest.mark.parametrize(
    ("grid", "steps"),
    [
        *itertools.product(
            [*ANY_STEPS, ProfileGrid("power", values=[0.013, 0.085])], [STEPS, WITH_BASE, (50, 100, 180, 190)]
        ),
        (ProfileGrid("strength"), WITH_BASE),
    ],
)
def test_every_answer_of_a_grid_has_its_own_name(grid: Any, steps: tuple[int, ...]) -> None:
    points = grid.points(steps)
    names = [average_name(point, steps) for point in points]
    assert None not in names
    for name, point in zip(names, points, strict=True):  # one name stands for one average
        np.testing.assert_allclose(points[names.index(name)], point, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_of_two_or_three_checkpoints_the_last_two_are_the_line(count: int) -> None:
    points = ProfileGrid("extrapolated", values=[1]).points(tuple(range(10, 10 + count)))
    np.testing.assert_allclose(points, [np.concatenate([np.zeros(count - 2), [-1.0, 2.0]])])


@pytest.mark.parametrize(
    ("profile", "value", "message"),
    [
        ("ema", 1.0, "rate: expected at least 0 and below 1, got 1.0"),
        ("power", 0.9, "sigma_rel: expected above 0"),
        ("uniform", 0, "values: expected whole numbers of checkpoints, got 0"),
        ("uniform", 2.5, "values: expected whole numbers of checkpoints, got 2.5"),
        ("uniform", np.inf, "values: expected finite numbers, got"),
        ("extrapolated", np.nan, "values: expected finite numbers, got"),
        ("single", 7, "values: there is no checkpoint of step 7"),
    ],
)
def test_values_that_no_average_has_are_refused(profile: Any, value: float, message: str) -> None:
    with pytest.raises(StudySpecError, match=f"^{message}"):
        ProfileGrid(profile, values=[value]).points(STEPS)


@pytest.mark.parametrize("profile", ["ema", "power", "uniform", "extrapolated"])
def test_a_checkpoint_of_step_0_has_no_part_in_averages_and_changes_none(profile: Any) -> None:
    """It is a base model, or a network before its training."""
    trained = PROFILES[profile]((100, 200, 300, 400), None)
    with_start = PROFILES[profile]((0, 100, 200, 300, 400), None)
    np.testing.assert_allclose(with_start, np.insert(trained, 0, 0.0, axis=1), atol=1e-12)
    both = PROFILES[profile]((0, 100), None)
    assert any(point[0] > 0 for point in both) == (profile in ("ema", "uniform")), "of two checkpoints, it is one"
