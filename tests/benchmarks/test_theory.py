"""The closed forms of ``benchmarks/theory.py`` against simulated training, a general optimizer, and cases by hand."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import theory

from lcsc_opt.coefficients.profiles import ema_coefficients

STEPS = [2, 5, 6, 11, 20]
PROBLEMS = [theory.strongly_convex(), theory.noisy_quadratic(), theory.noisy_quadratic(100)]


def one_axis(*, noise: float, start: float, step: float = 0.2) -> theory.Quadratic:
    return theory.Quadratic("one axis", np.ones(1), np.full(1, noise), np.full(1, start), lambda _: step)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_expected_matrix_is_that_of_simulated_runs(problem: theory.Quadratic) -> None:
    rng = np.random.default_rng(0)
    runs = np.array([theory.gram_of_run(problem, STEPS, rng) for _ in range(4000)])
    error = runs.std(axis=0) / np.sqrt(len(runs))
    assert (np.abs(runs.mean(axis=0) - theory.gram(problem, STEPS)) < 4.5 * error).all()


def test_a_simulated_run_is_gradient_descent_with_noise() -> None:
    problem = theory.strongly_convex()
    rng = np.random.default_rng(3)
    theta, kept = problem.start.copy(), []
    for n in range(1, 21):
        gradient = problem.curvature * theta + rng.standard_normal(6)
        theta = theta - gradient / n
        kept += [theta] if n in STEPS else []
    coefficients = np.array([0.3, -0.5, 0.2, 0.4, 0.6])
    merged = coefficients @ np.array(kept)
    loss = 0.5 * float(problem.curvature @ merged**2)
    matrix = theory.gram_of_run(problem, STEPS, np.random.default_rng(3))
    assert theory.excess_loss(matrix, coefficients) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_best_coefficients_are_those_of_a_general_optimizer(problem: theory.Quadratic) -> None:
    matrix = theory.gram(problem, STEPS)
    start = np.full(len(STEPS), 1 / len(STEPS))
    for found, bounds in ((theory.best_signed(matrix), None), (theory.best_convex(matrix), [(0, None)] * len(STEPS))):
        searched = scipy.optimize.minimize(
            lambda a: theory.excess_loss(matrix, a) / matrix.max(),
            start,
            jac=lambda a: matrix @ a / matrix.max(),
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert theory.excess_loss(matrix, found) == pytest.approx(theory.excess_loss(matrix, searched.x), rel=1e-5)
        assert theory.excess_loss(matrix, found) <= theory.excess_loss(matrix, searched.x) * (1 + 1e-9)
    assert (theory.best_convex(matrix) >= 0).all()
    assert theory.excess_loss(matrix, theory.best_signed(matrix)) == pytest.approx(
        0.5 / np.linalg.solve(matrix, np.ones(len(STEPS))).sum(), rel=1e-9
    )


def test_without_noise_two_checkpoints_give_the_minimum_and_a_convex_combination_the_last_one() -> None:
    matrix = theory.gram(one_axis(noise=0.0, start=3.0), [4, 5])
    r = 0.8
    extrapolated = np.array([-r, 1]) / (1 - r)
    last = theory.excess_loss(matrix, np.array([0.0, 1.0]))
    assert last == pytest.approx(0.5 * (3 * r**5) ** 2)
    assert theory.excess_loss(matrix, extrapolated) == pytest.approx(0, abs=1e-12)
    assert min(theory.excess_loss(matrix, np.array([a, 1 - a])) for a in np.linspace(0, 1, 101)) == last


def test_noise_alone_wants_a_flat_average_with_heavier_ends() -> None:
    steps = list(range(1000, 1010))
    expected = np.array([1, *[0.2] * 8, 1]) / 3.6  # 1 - r = 0.2
    np.testing.assert_allclose(
        theory.best_signed(theory.gram(one_axis(noise=1.0, start=1.0), steps)), expected, atol=1e-9
    )


def test_the_variance_of_an_ema_of_noise_is_the_formula_of_the_page() -> None:
    gamma, r = 0.9, 0.8
    steps = list(range(1000, 1400))
    matrix = theory.gram(one_axis(noise=1.0, start=1.0), steps)
    variance = 2 * theory.excess_loss(matrix, ema_coefficients(steps, gamma)) / matrix[-1, -1]
    assert variance == pytest.approx((1 - gamma) * (1 + gamma * r) / ((1 + gamma) * (1 - gamma * r)), rel=1e-9)


def test_an_ema_is_optimal_exactly_where_the_gradient_is_the_same_in_all_coefficients() -> None:
    matrix = theory.gram(theory.noisy_quadratic(), STEPS)
    assert np.ptp(matrix @ theory.best_signed(matrix)) < 1e-12
    for ema in theory.emas(STEPS):
        assert np.ptp(matrix @ ema) > 0.05


def test_polynomial_decay_without_a_parameter_is_the_plain_average() -> None:
    np.testing.assert_allclose(theory.polynomial_decay(7, 0.0), np.full(7, 1 / 7))
    np.testing.assert_allclose(theory.polynomial_decay(3, 2.0), [0.1, 0.3, 0.6])  # t (t + 1) / 2 over 10


def test_suffixes_are_averages_of_the_last_ones() -> None:
    np.testing.assert_allclose(theory.suffixes(3), np.array([[0, 0, 1], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("length", [1, 2, 32, 256])
def test_the_bound_of_theorem_31_holds(length: int) -> None:
    problem = theory.strongly_convex()
    last = theory.excess_loss(theory.gram(problem, [length]), np.ones(1))
    assert last < theory.shamir_zhang_bound(problem, length)


def test_the_bound_is_theorem_31s_number() -> None:
    problem = dataclasses.replace(one_axis(noise=4.0, start=3.0), step_size=lambda n: 1.0 / n)
    # the first gradient is 3 plus noise of variance 4, so its square is 13; later ones are smaller
    assert theory.shamir_zhang_bound(problem, 10) == pytest.approx(17 * 13 * (1 + np.log(10)) / 10)


def test_the_numbers_of_the_page_are_those_of_the_script() -> None:
    _, losses = theory.expected(theory.PROBLEMS[1], 512)
    shown = next(line for line in theory.PAGE.read_text().splitlines() if line.startswith("| 512 |"))
    assert f"{losses['best EMA'] / losses['best signed']:.2f}" == shown.split(" | ")[2]
