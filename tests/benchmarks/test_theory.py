"""The closed forms of ``benchmarks/theory.py`` against simulated training, a general optimizer, and cases by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import theory

STEPS = [2, 5, 6, 11, 20]
PROBLEMS = [theory.strongly_convex(), theory.noisy_quadratic(), theory.noisy_quadratic(100)]


def one_axis(*, noise: float, start: float, step: float = 0.2) -> theory.Quadratic:
    return theory.Quadratic("one axis", np.ones(1), np.full(1, noise), np.full(1, start), lambda _: step)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_expected_matrix_is_that_of_simulated_runs(problem: theory.Quadratic) -> None:
    rng = np.random.default_rng(0)
    runs = np.array([theory.gram_of_run(problem, STEPS, rng) for _ in range(1500)])
    error = runs.std(axis=0) / np.sqrt(len(runs))
    assert (np.abs(runs.mean(axis=0) - theory.gram(problem, STEPS)) < 4.5 * error).all()


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


@pytest.mark.parametrize("length", [1, 2, 32, 256])
def test_the_bound_of_theorem_31_holds(length: int) -> None:
    problem = theory.strongly_convex()
    last = theory.excess_loss(theory.gram(problem, [length]), np.ones(1))
    assert last < theory.shamir_zhang_bound(problem, length)
