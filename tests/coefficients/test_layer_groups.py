"""Which tensors share a row of coefficients, and spaces of several rows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, ConvexSpace

UNET = (
    *("conv_in.weight", "conv_in.bias", "down.0.to_q.weight", "down.1.to_q.weight", "down.10.to_q.weight"),
    *("down.2.to_q.weight", "down.0.norm.weight", "down.0.norm.bias", "scale"),
)
STEPS = (10, 20, 30, 40)


def test_tensors_are_divided_by_their_layers() -> None:
    groups = LayerGroups.by("layers", UNET)
    expected = ["conv_in", "down.0.norm", "down.0.to_q", "down.1.to_q", "down.2.to_q", "down.10.to_q", "scale"]
    assert list(groups.names) == expected
    assert set(groups.row_of) == set(UNET)
    assert groups.row_of["conv_in.weight"] == groups.row_of["conv_in.bias"]
    assert pickle.loads(pickle.dumps(groups)).row_of == groups.row_of
    with pytest.raises(StudySpecError, match=r"space\.rows: expected layers, got 'blocks'"):
        LayerGroups.by("blocks", UNET)


def test_a_space_of_rows_is_the_space_of_each_row() -> None:
    generator = np.random.default_rng(0)
    origins = np.stack([default_origin(STEPS), ema_coefficients(STEPS, 0.9)])
    cases: tuple[tuple[Any, list[Any]], ...] = (
        (AffineSpace(STEPS, origins), [AffineSpace(STEPS, origin) for origin in origins]),
        (ConvexSpace(STEPS, origins), [ConvexSpace(STEPS, origin) for origin in origins]),
    )
    for space, row_spaces in cases:
        assert space.shape == (2, *row_spaces[0].shape)
        free = 0.4 * generator.standard_normal(space.shape)
        gradient = generator.standard_normal((2, 4))
        coefficients = space.to_coefficients(free)
        rows = range(2)
        expected = [row_spaces[row].to_coefficients(free[row]) for row in rows]
        np.testing.assert_allclose(coefficients, expected, rtol=0, atol=1e-14)
        back = [row_spaces[row].to_free(coefficients[row]) for row in rows]
        np.testing.assert_allclose(space.to_free(coefficients), back, rtol=0, atol=1e-14)
        slopes = [row_spaces[row].to_free_gradient(free[row], gradient[row]) for row in rows]
        np.testing.assert_allclose(space.to_free_gradient(free, gradient), slopes, rtol=0, atol=1e-13)
        equal_rows = default_origin(STEPS)
        np.testing.assert_array_equal(space.to_free(equal_rows), space.to_free(np.stack([equal_rows, equal_rows])))
