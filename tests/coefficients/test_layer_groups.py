"""Which tensors share a row of coefficients, and spaces of several rows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from lcsc_opt.coefficients.layer_groups import MOST_ROWS, LayerGroups, of_layers
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, ConvexSpace

UNET = (
    *("conv_in.weight", "conv_in.bias", "down.0.to_q.weight", "down.1.to_q.weight", "down.10.to_q.weight"),
    *("down.2.to_q.weight", "down.0.norm.weight", "down.0.norm.bias", "scale"),
)
STEPS = (10, 20, 30, 40)


def test_tensors_are_divided_by_their_layers() -> None:
    groups = LayerGroups.by("layers", dict.fromkeys(UNET, (3,)))
    expected = ["conv_in", "down.0.norm", "down.0.to_q", "down.1.to_q", "down.2.to_q", "down.10.to_q", "scale"]
    assert list(groups.names) == expected
    assert set(groups.rows_of) == set(UNET)
    assert groups.rows_of["conv_in.weight"] == groups.rows_of["conv_in.bias"]
    assert pickle.loads(pickle.dumps(groups)).rows_of == groups.rows_of
    assert len(groups) == len(expected)


SHAPES: dict[str, tuple[int, ...]] = {
    **{"conv.weight": (6, 4, 3, 3), "conv.bias": (6,), "up.weight": (6, 4, 2, 2), "up.bias": (4,)},
    **{"norm.weight": (6,), "norm.bias": (6,), "to.lora_A.weight": (2, 6), "to.lora_B.weight": (6, 2), "scale": ()},
}


def test_each_output_channel_has_a_row_and_those_of_a_layer_follow_each_other() -> None:
    groups = LayerGroups.by("channels", SHAPES)
    assert dict(zip(groups.names, groups.counts, strict=True)) == {"conv": 12, "norm": 12, "scale": 1, "to": 8, "up": 8}
    assert groups.rows_of["up.weight"].axis == 1, "a transposed convolution, by its bias"
    assert {rows.axis for name, rows in groups.rows_of.items() if name != "up.weight"} == {0}
    rows = np.concatenate([groups.rows_of[name].of_channels() for name in sorted(SHAPES)])
    assert sorted(rows.tolist()) == list(range(len(groups))), "no two share a row"
    of_norm = {groups.rows_of[name].first for name in ("norm.weight", "norm.bias")}
    assert of_norm == {12, 18}


def test_neighbouring_channels_share_a_row() -> None:
    groups = LayerGroups.by({"channels": 4}, SHAPES)
    rows = groups.rows_of["conv.weight"].of_channels()
    np.testing.assert_array_equal(rows - rows[0], [0, 0, 0, 0, 1, 1])
    assert groups.counts == (4, 4, 1, 3, 2)


def test_the_same_weights_under_two_names_have_the_same_rows() -> None:
    groups = LayerGroups.by("channels", {"a.weight": (5, 2), "b.weight": (5, 2)}, {"b.weight": "a.weight"})
    assert groups.rows_of["a.weight"] == groups.rows_of["b.weight"]
    assert len(groups) == 5


def test_a_model_of_very_many_channels_shares_rows() -> None:
    groups = LayerGroups.by("channels", {"embedding.weight": (4 * MOST_ROWS, 2), "bias": (10,)})
    assert groups.rows_of["embedding.weight"].size == 8, "four would leave no room for the others"
    assert len(groups) <= MOST_ROWS


def test_mean_and_spread_of_each_layer() -> None:
    coefficients = np.random.default_rng(0).standard_normal((5, 3))
    means, spreads = of_layers(coefficients, (2, 3))
    np.testing.assert_allclose(means, [coefficients[:2].mean(0), coefficients[2:].mean(0)])
    np.testing.assert_allclose(spreads, [coefficients[:2].std(0), coefficients[2:].std(0)])


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
