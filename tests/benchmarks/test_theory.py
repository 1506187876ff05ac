"""The closed forms of ``benchmarks/theory.py`` against simulated training and a general optimizer."""

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
