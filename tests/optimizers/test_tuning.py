"""Numbers of the sampler beside coefficients: the flat point, and each optimizer on a bowl over both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, ConvexSpace
from lcsc_opt.coefficients.tuning import RANGE, TunedNumber, TunedSpace
from lcsc_opt.optimizers import attach_evaluation, build_optimizer, candidate_of, point_of

STEPS = (10, 20, 30, 40)
GUIDANCE = TunedNumber("guidance", 1.0, 5.0, 1.5)
CHURN = TunedNumber("churn", 0.0, 1.0, 0.5)
TARGET = np.array([-0.1, 0.2, 0.3, 0.6])
BEST = {"guidance": 3.2, "churn": 0.25}


def space(rows: int | None = None, *numbers: TunedNumber) -> TunedSpace:
    origin = default_origin(STEPS)
    if rows is not None:
        origin = np.tile(origin, (rows, 1))
    return TunedSpace(AffineSpace(STEPS, origin), numbers or (GUIDANCE, CHURN))


def bowl(candidate: Candidate, *, gradient: bool) -> Evaluation:
    """Squared distances from :data:`TARGET` and :data:`BEST`, each number in its range."""
    distance = candidate.coefficients - TARGET
    shares = {"guidance": 4.0, "churn": 1.0}
    errors = {name: (value - BEST[name]) / shares[name] for name, value in candidate.tuned.items()}
    loss = float(np.square(distance).sum() + sum(error**2 for error in errors.values()))
    slopes = [2 * error / shares[name] for name, error in errors.items()]
    product = np.concatenate([2 * distance.ravel(), slopes]) if gradient else None
    return Evaluation(loss, gradient=product)


def search(name: str, evaluations: int, *, rows: int | None = None, gradient: bool = False) -> Candidate:
    """The best candidate of a search on the bowl."""
    optimizer = build_optimizer(OptimizerSpec(name=name), space(rows), budget=evaluations, workers=1, seed=0)
    best: tuple[float, Candidate] | None = None
    for _ in range(evaluations):
        if getattr(optimizer, "finished", False):
            break
        parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        assert all(1 - 1e-9 <= total <= 1 + 1e-9 for total in np.atleast_1d(candidate.coefficients.sum(axis=-1)))
        assert GUIDANCE.low <= candidate.tuned["guidance"] <= GUIDANCE.high
        evaluation = bowl(candidate, gradient=gradient)
        attach_evaluation(parameter, evaluation)
        optimizer.tell(parameter, evaluation.loss)
        if best is None or evaluation.loss < best[0]:
            best = (evaluation.loss, candidate)
    assert best is not None
    return best[1]


@pytest.mark.parametrize("rows", [None, 3])
def test_a_point_is_coefficients_and_numbers(rows: int | None) -> None:
    tuned = space(rows)
    average = ema_coefficients(STEPS, 0.95)
    point = tuned.point(average, {"churn": 0.75})
    assert point.shape == ((rows or 1) * len(STEPS) + 2,)
    np.testing.assert_array_equal(tuned.coefficients_of(point), np.broadcast_to(average, (rows, 4) if rows else (4,)))
    assert tuned.tuned_of(point) == pytest.approx({"guidance": 1.5, "churn": 0.75})
    np.testing.assert_allclose(tuned.to_coefficients(tuned.to_free(point)), point, atol=1e-15)
    assert tuned.to_free(point).shape == tuned.shape


def test_the_origin_of_the_free_vector_is_the_start() -> None:
    tuned = space()
    point = tuned.to_coefficients(np.zeros(tuned.shape))
    np.testing.assert_array_equal(tuned.coefficients_of(point), default_origin(STEPS))
    assert tuned.tuned_of(point) == {"guidance": 1.5, "churn": 0.5}


@pytest.mark.parametrize("moved", [0.3, 5.0, -0.9, -12.3])
def test_numbers_are_reflected_into_their_range(moved: float) -> None:
    tuned = space(None, GUIDANCE)
    free = np.zeros(tuned.shape)
    free[-1] = moved
    value = tuned.tuned_of(tuned.to_coefficients(free))["guidance"]
    assert GUIDANCE.low <= value <= GUIDANCE.high
    distance = (GUIDANCE.to_unit(1.5) + moved) % (2 * RANGE)  # along a path up and down the range
    assert value == pytest.approx(GUIDANCE.to_value(min(distance, 2 * RANGE - distance)))


def test_the_gradient_in_a_free_vector_is_the_finite_difference() -> None:
    tuned = TunedSpace(ConvexSpace(STEPS, default_origin(STEPS)), (GUIDANCE, CHURN))
    rng = np.random.default_rng(0)
    free = 0.02 * rng.standard_normal(tuned.shape)

    def loss(free: Any) -> Evaluation:
        point = tuned.to_coefficients(free)
        candidate = Candidate(tuned.coefficients_of(point), tuned=tuned.tuned_of(point))
        return bowl(candidate, gradient=True)

    gradient = loss(free).gradient
    assert gradient is not None
    product = tuned.to_free_gradient(free, tuned.point_gradient(tuned.to_coefficients(free), gradient))
    direction = rng.standard_normal(tuned.shape)
    step = 1e-6
    difference = (loss(free + step * direction).loss - loss(free - step * direction).loss) / (2 * step)
    assert product @ direction == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "evaluations", "rows", "tolerance"),
    [
        ("LCSC", 500, None, 0.1),
        ("LCSC", 500, 2, 0.15),
        ("CMA", 500, None, 0.1),
        ("DE", 1500, None, 0.15),
        ("LCSCGradient", 150, None, 0.1),
        ("LCSCGradient", 150, 2, 0.1),
    ],
)
def test_optimizers_find_numbers_and_coefficients(
    name: str, evaluations: int, rows: int | None, tolerance: float
) -> None:
    best = search(name, evaluations, rows=rows, gradient=name == "LCSCGradient")
    assert best.tuned["guidance"] == pytest.approx(BEST["guidance"], abs=4 * tolerance)
    assert best.tuned["churn"] == pytest.approx(BEST["churn"], abs=tolerance)
    start = np.abs(default_origin(STEPS) - TARGET).max()
    assert np.abs(best.coefficients - TARGET).max() < start


def test_a_grid_searches_the_numbers_of_each_average() -> None:
    optimizer = build_optimizer(OptimizerSpec(name="EMAGrid"), space(), budget=400, workers=1, seed=0)
    losses: dict[bytes, list[float]] = {}
    values: dict[bytes, set[float]] = {}
    asked = 0
    best = Candidate(default_origin(STEPS))
    best_loss = np.inf
    while not optimizer.finished:  # type: ignore[attr-defined]
        parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        loss = bowl(candidate, gradient=False).loss
        optimizer.tell(parameter, loss)
        average = np.round(candidate.coefficients, 12).tobytes()
        losses.setdefault(average, []).append(loss)
        values.setdefault(average, set()).add(round(candidate.tuned["guidance"], 9))
        asked += 1
        if loss < best_loss:
            best_loss = loss
            best = candidate
    assert asked < 200
    assert all({1.0, 2.0, 3.0, 4.0, 5.0} <= several for several in values.values())
    # the last steps are 1/32 of the range
    assert best.tuned["guidance"] == pytest.approx(BEST["guidance"], abs=4 / 32)
    assert best.tuned["churn"] == pytest.approx(BEST["churn"], abs=1 / 32)


def test_a_grid_goes_on_while_results_are_missing() -> None:
    """With workers several candidates are asked before the first is told; all are different."""
    optimizer = build_optimizer(OptimizerSpec(name="EMAGrid"), space(None, GUIDANCE), budget=400, workers=4, seed=0)
    waiting: list[Any] = []
    points: list[bytes] = []
    while not optimizer.finished:  # type: ignore[attr-defined]
        waiting.append(optimizer.ask())
        points.append(waiting[-1].value.tobytes())
        if len(waiting) == 4:
            parameter = waiting.pop(0)
            optimizer.tell(parameter, bowl(candidate_of(parameter), gradient=False).loss)
    assert len(set(points)) == len(points) < 100


def test_plain_arrays_and_spaces_have_coefficients_as_their_point() -> None:
    average = ema_coefficients(STEPS, 0.95)
    optimizer = build_optimizer(
        OptimizerSpec(name="LCSC"), AffineSpace(STEPS, default_origin(STEPS)), budget=10, workers=1, seed=0
    )
    assert point_of(optimizer.parametrization, average) is average
    assert candidate_of(optimizer.ask()).tuned == {}


LEVEL = TunedNumber("sigma_min", 0.001, 10.0, 0.1, logarithmic=True)


def test_equal_steps_of_a_logarithmic_number_are_equal_ratios() -> None:
    values = [LEVEL.to_value(share * RANGE) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([0.001, 0.01, 0.1, 1.0, 10.0])
    assert [LEVEL.to_unit(value) for value in values] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert LEVEL.to_value(-1.0) == LEVEL.low
    assert LEVEL.to_value(1.0) == LEVEL.high


@pytest.mark.parametrize("number", [GUIDANCE, LEVEL])
def test_the_slope_of_a_number_is_the_finite_difference(number: TunedNumber) -> None:
    difference = (number.to_value(0.1 + 1e-7) - number.to_value(0.1 - 1e-7)) / 2e-7
    assert number.slope(0.1) / RANGE == pytest.approx(difference, rel=1e-6)


def test_a_logarithmic_number_is_found_by_its_derivative() -> None:
    """LCSCGradient on (log10(sigma_min) + 2)² begins at 0.1."""
    optimizer = build_optimizer(OptimizerSpec(name="LCSCGradient"), space(None, LEVEL), budget=120, workers=1, seed=0)
    for _ in range(120):
        parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        error = np.log10(candidate.tuned["sigma_min"]) + 2
        slope = 2 * error / (candidate.tuned["sigma_min"] * np.log(10))
        gradient = np.append(2 * (candidate.coefficients - TARGET), slope)
        loss = float(np.square(candidate.coefficients - TARGET).sum() + error**2)
        attach_evaluation(parameter, Evaluation(loss, gradient=gradient))
        optimizer.tell(parameter, loss)
    answer = candidate_of(optimizer.recommend())
    assert np.log10(answer.tuned["sigma_min"]) == pytest.approx(-2, abs=0.1)
