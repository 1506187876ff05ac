"""Arrays as they are stored: bit for bit, and short where they were rounded before."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lcsc_opt.database.arrays import array_of, rounded_coefficients, rounded_gradient, stored_array

ROWS, CHECKPOINTS = 3000, 8


def coefficients_like(spread: float) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, spread, (ROWS, CHECKPOINTS))
    return drawn + (1 - drawn.sum(axis=1, keepdims=True)) / CHECKPOINTS


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0, 30.0, 1e5])
def test_coefficients_are_rounded_to_a_grid_on_which_rows_sum_to_one_exactly(spread: float) -> None:
    coefficients = coefficients_like(spread)
    rounded = rounded_coefficients(coefficients)
    np.testing.assert_array_equal(rounded.sum(axis=1), 1.0)
    np.testing.assert_allclose(rounded, coefficients, rtol=0, atol=max(1, spread * 5) * 2**-11)
    np.testing.assert_array_equal(rounded_coefficients(rounded), rounded)
    np.testing.assert_array_equal(array_of(json.loads(json.dumps(stored_array(rounded)))), rounded)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradients_are_rounded_to_eleven_bits_of_each_number(scale: float) -> None:
    random = np.random.default_rng(0)
    gradient = scale * random.normal(size=(ROWS, CHECKPOINTS)) * np.exp(random.normal(size=(ROWS, 1)))
    rounded = rounded_gradient(gradient)
    far = np.abs(gradient) > 1e-6 * np.abs(gradient).max()  # smaller ones have fewer bits
    np.testing.assert_allclose(rounded[far], gradient[far], rtol=2**-11, atol=0)
    np.testing.assert_array_equal(array_of(json.loads(json.dumps(stored_array(rounded)))), rounded)


@pytest.mark.parametrize(
    "rounded", [rounded_coefficients(coefficients_like(0.2)), rounded_gradient(coefficients_like(1.0))]
)
def test_thirty_thousand_rows_of_eight_take_six_tenths_of_a_megabyte(rounded: np.ndarray) -> None:
    assert len(json.dumps(stored_array(rounded))) < 600_000 * ROWS / 30_000


@pytest.mark.parametrize(
    "array", [np.array([0.1, 0.2, 0.7]), np.full((2, 3), 1 / 3), np.array([[np.nan, np.inf]]), np.zeros((2, 0))]
)
def test_whatever_was_not_rounded_is_stored_bit_for_bit(array: np.ndarray) -> None:
    assert array_of(json.loads(json.dumps(stored_array(array)))).tobytes() == array.tobytes()


def test_one_row_is_not_rounded() -> None:
    row = np.array([0.1, 0.2, 0.7])
    np.testing.assert_array_equal(rounded_coefficients(row), row)
