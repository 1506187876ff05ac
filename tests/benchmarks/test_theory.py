"""The closed forms of ``benchmarks/theory.py`` against simulated training, and what tells an optimum."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

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
def test_no_direction_leads_down_from_the_best_coefficients(problem: theory.Quadratic) -> None:
    """The loss is convex: it is least where the slope is the same in all coefficients, or larger where they are 0."""
    matrix = theory.gram(problem, STEPS)
    signed, convex = theory.best_signed(matrix), theory.best_convex(matrix)
    assert [signed.sum(), convex.sum()] == pytest.approx([1, 1], abs=1e-12)
    slope = matrix @ signed
    assert np.ptp(slope) < 1e-9 * np.abs(matrix).max()
    assert (convex >= 0).all()
    slope = matrix @ convex
    assert slope.min() > slope[convex > 1e-9].max() - 1e-6 * np.abs(matrix).max()
