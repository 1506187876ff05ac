from __future__ import annotations

from typing import Any

import nevergrad as ng
import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, Plane, plane_grid
from lcsc_opt.coefficients.profiles import (
    POWER_EMA_SIGMAS,
    ema_coefficients,
    power_ema_coefficients,
    window_ema_rates,
)
from lcsc_opt.optimizers import EMAGrid, PlaneGrid, PowerEMAGrid, build_optimizer, coefficient_array
from tests.optimizers.asking import AFFINE, STEPS

UNIFORM = [np.repeat([0.0, 1 / count], [20 - count, count]) for count in (1, 3, 10, 20)]


def build(grid: Any) -> Any:
    return grid(coefficient_array(AFFINE, seed=0), budget=100)


def plane_points(corners: Any) -> list[np.ndarray]:
    plane = Plane.through(corners, STEPS)
    return [plane.at(x, y) for x, y in plane_grid(4, DEFAULT_MARGIN)[1]]


@pytest.mark.parametrize(
    ("grid", "points"),
    [
        (EMAGrid(), [*(ema_coefficients(STEPS, rate) for rate in window_ema_rates(STEPS)), *UNIFORM]),
        (EMAGrid(rates=[0.99, 0.9]), [*(ema_coefficients(STEPS, rate) for rate in (0.99, 0.9)), *UNIFORM]),
        (PowerEMAGrid(), [power_ema_coefficients(STEPS, sigma_rel) for sigma_rel in POWER_EMA_SIGMAS]),
        (PowerEMAGrid(sigma_rels=(0.2,)), [power_ema_coefficients(STEPS, 0.2)]),
        (PlaneGrid(size=4), plane_points(None)),
        (PlaneGrid(size=4, corners=["ema:0.9", "ema:0.99", 500]), plane_points(["ema:0.9", "ema:0.99", 500])),
    ],
    ids=["EMA", "rates", "power EMA", "sigma_rels", "plane", "corners"],
)
def test_a_grid_asks_its_points_in_order_and_is_finished(grid: Any, points: list[np.ndarray]) -> None:
    optimizer = build(grid)
    for number, point in enumerate(points):
        assert not optimizer.finished
        candidate = optimizer.ask()
        np.testing.assert_allclose(candidate.value, point, rtol=0, atol=1e-14)
        optimizer.tell(candidate, -float(number))
    assert optimizer.finished
    np.testing.assert_allclose(optimizer.recommend().value, points[-1], rtol=0, atol=1e-14)


def test_a_finished_grid_asks_its_best_again() -> None:
    optimizer = build(EMAGrid())
    for loss in (4.0, 3.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0, 8.0, 7.0):
        optimizer.tell(optimizer.ask(), loss)
    best = ema_coefficients(STEPS, window_ema_rates(STEPS)[2])
    for _ in range(3):
        candidate = optimizer.ask()
        np.testing.assert_allclose(candidate.value, best, rtol=0, atol=1e-14)
        optimizer.tell(candidate, 1.0)
    assert optimizer.finished


def test_steps_can_be_given_for_a_plain_array() -> None:
    optimizer = EMAGrid(steps=[10, 20, 60], rates=[0.9])(ng.p.Array(shape=(3,)), budget=5)
    np.testing.assert_allclose(optimizer.ask().value, ema_coefficients([10, 20, 60], 0.9))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"corners": [1, 2]}, "corners: expected three"),
        ({"corners": [100, 200, 250]}, "corners: no checkpoint was saved at step 250"),
        ({"size": 1}, r"optimizers.Landscape.size: expected a whole number from 2 to 501, got 1"),
        ({"margin": -0.1}, r"optimizers.Landscape.margin: expected a number from 0, got -0.1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StudySpecError, match=complaint):
        build_optimizer(OptimizerSpec(name="Landscape", options=options), AFFINE, budget=9, workers=1, seed=0)
