from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import Plane, plane_grid
from lcsc_opt.coefficients.profiles import (
    POWER_EMA_SIGMAS,
    average_name,
    default_origin,
    ema_coefficients,
    power_ema_coefficients,
    window_ema_rates,
)
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import (
    DecayGrid,
    EachCheckpoint,
    EMAGrid,
    ExtraMergeGrid,
    PlaneGrid,
    PowerEMAGrid,
    UniformGrid,
    build_optimizer,
    coefficient_array,
)
from tests.optimizers.asking import AFFINE, STEPS, tell


def uniform(*counts: int) -> list[np.ndarray]:
    return [np.repeat([0.0, 1 / count], [20 - count, count]) for count in counts]


def decayed(last: int) -> np.ndarray:
    """The sum of the coefficients from checkpoint j on is what a 1 - √ decay multiplies update j by."""
    factors = np.concatenate([np.ones(21 - last), 1 - np.sqrt(np.arange(1, last) / last), [0.0]])
    return factors[:-1] - factors[1:]


def extrapolated(last: int, *extrapolations: float) -> list[np.ndarray]:
    """By hand: the last ones above 1 / N, those before them below zero."""
    points = []
    for extrapolation in extrapolations:
        point = np.zeros(20)
        point[20 - last :] = (1 + extrapolation) / last
        point[20 - 2 * last : 20 - last] = -extrapolation / last
        points.append(point)
    return points


UNIFORM = uniform(1, 3, 10, 20)
ALONG = (0, 0.25, 0.5, 1, 2)
ALL_ALONG = [point for last in (1, 2, 4, 8, 10) for point in extrapolated(last, *ALONG)]


FOUR = AffineSpace(STEPS[:4], default_origin(STEPS[:4]))


def build(grid: Any) -> Any:
    return grid(coefficient_array(AFFINE, seed=0), budget=100)


def plane_points(corners: Any) -> list[np.ndarray]:
    plane = Plane.through(corners, STEPS)
    return [plane.at(x, y) for x, y in plane_grid(4)[1]]


@pytest.mark.parametrize(
    ("grid", "points"),
    [
        (EMAGrid(), [*(ema_coefficients(STEPS, rate) for rate in window_ema_rates(STEPS)), *UNIFORM]),
        (EMAGrid(rates=[0.99, 0.9]), [*(ema_coefficients(STEPS, rate) for rate in (0.99, 0.9)), *UNIFORM]),
        (PowerEMAGrid(), [power_ema_coefficients(STEPS, sigma_rel) for sigma_rel in POWER_EMA_SIGMAS]),
        (PowerEMAGrid(sigma_rels=(0.2,)), [power_ema_coefficients(STEPS, 0.2)]),
        (UniformGrid(), uniform(2, 4, 8, 16, 20)),
        (UniformGrid(windows=[99, 3]), uniform(3, 20)),
        (DecayGrid(windows=[8, 20]), [*uniform(8, 20), decayed(8), decayed(20)]),
        (DecayGrid(decays=["1-sqrt"]), [decayed(last) for last in (2, 4, 8, 16, 20)]),
        (ExtraMergeGrid(), ALL_ALONG),
        (ExtraMergeGrid(windows=[99], extrapolations=[-0.5, 3]), [*uniform(20), *extrapolated(10, 3)]),
        (EachCheckpoint(), list(np.eye(20))),
        (PlaneGrid(size=4), plane_points(None)),
        (PlaneGrid(size=4, corners=["ema:0.9", "ema:0.99", 500]), plane_points(["ema:0.9", "ema:0.99", 500])),
    ],
    ids=[
        *("EMA", "rates", "power EMA", "sigma_rels", "uniform", "windows", "decay", "decays", "along", "far", "each"),
        *("plane", "corners"),
    ],
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


@pytest.mark.parametrize(
    "grid",
    [
        *(EMAGrid(), PowerEMAGrid(), PowerEMAGrid(sigma_rels=[0.013, 0.085]), UniformGrid(), DecayGrid()),
        *(ExtraMergeGrid(), EachCheckpoint()),
    ],
)
@pytest.mark.parametrize(
    "steps",
    [
        STEPS,
        tuple(range(0, 500, 100)),
        (50, 100, 180, 190),
    ],
)
def test_every_answer_of_a_grid_has_its_own_name(grid: Any, steps: tuple[int, ...]) -> None:
    points = grid.profiles(steps)
    names = [average_name(point, steps) for point in points]
    assert None not in names
    for name, point in zip(names, points, strict=True):  # one name stands for one average
        np.testing.assert_allclose(points[names.index(name)], point, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_of_two_or_three_checkpoints_the_last_two_are_the_line(count: int) -> None:
    points = ExtraMergeGrid(extrapolations=[1]).profiles(tuple(range(10, 10 + count)))
    np.testing.assert_allclose(points, [np.concatenate([np.zeros(count - 2), [-1.0, 2.0]])])


def soup(losses: dict[tuple[int, ...], float | None]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """What a greedy soup of four checkpoints asks, where averages have these losses (``None``: it failed)."""
    optimizer = build_optimizer(OptimizerSpec(name="GreedySoup"), FOUR, budget=99, workers=1, seed=0)
    asked = []
    while not optimizer.finished:
        candidate = optimizer.ask()
        asked.append(tuple(np.flatnonzero(candidate.value > 1e-9).tolist()))
        np.testing.assert_allclose(candidate.value[list(asked[-1])], 1 / len(asked[-1]))
        loss = losses[asked[-1]]
        tell(optimizer, candidate, None if loss is None else Evaluation(loss), loss=9.0)
    return asked, optimizer.recommend().value


SINGLE: dict[tuple[int, ...], float | None] = {(0,): 4.0, (1,): 2.0, (2,): 3.0, (3,): 1.0}


def test_a_greedy_soup_adds_checkpoints_from_the_best_to_the_worst_where_the_soup_does_not_get_worse() -> None:
    asked, best = soup({**SINGLE, (1, 3): 0.8, (1, 2, 3): 0.9, (0, 1, 3): 0.8})
    assert asked == [(0,), (1,), (2,), (3,), (1, 3), (1, 2, 3), (0, 1, 3)]  # Wortsman et al. 2022, Recipe 1
    np.testing.assert_allclose(best, [1 / 3, 1 / 3, 0, 1 / 3])
    assert soup({**SINGLE, (1, 3): 1.0, (1, 2, 3): 1.0, (0, 1, 2, 3): 1.0})[0][4:] == [(1, 3), (1, 2, 3), (0, 1, 2, 3)]
    assert soup({**SINGLE, (1, 3): 1.1, (2, 3): 1.1, (0, 3): 1.1})[0][4:] == [(1, 3), (2, 3), (0, 3)]


def test_failed_checkpoints_and_soups_are_left_out_of_a_greedy_soup() -> None:
    asked, best = soup({(0,): None, (1,): 2.0, (2,): 3.0, (3,): None, (1, 2): None})
    assert asked[4:] == [(1, 2)]
    np.testing.assert_allclose(best, [0, 1, 0, 0], atol=1e-12)
    assert len(soup(dict.fromkeys(SINGLE))[0]) == 4
