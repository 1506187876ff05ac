"""A recipe is merged again as a search merges: from a packed trajectory or the files, up to rounding."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.database.arrays import rounded_coefficients
from lcsc_opt.exports import Recipe
from lcsc_opt.exports.merging import merge
from lcsc_opt.trajectory import Trajectory, pack
from tests.trajectory.trajectory_examples import STEPS, make_trajectory, same_bits, state_dict

COEFFICIENTS = np.array([-0.7, 0.3, 1.9, -0.9, 0.4])
TWO = np.array([0.0, 0.5, 0.0, 0.0, 0.5])


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "run.trajectory")


def written(path: Path, *states: dict[str, Tensor]) -> Trajectory:
    return make_trajectory(path, range(1, len(states) + 1), weights=lambda step: states[step - 1])


def recipe(trajectory: Trajectory, coefficients: np.ndarray = COEFFICIENTS, dtype: str | None = None) -> Recipe:
    return Recipe.of(trajectory, np.array(coefficients), study="tests", dtype=dtype)


def packed_files(folder: Path, *steps: int) -> Trajectory:
    files = []
    for step in steps:
        files.append(folder / f"model{step:06d}.safetensors")
        save_file(state_dict(step), files[-1])
    return pack(files, folder / "again.trajectory")


@pytest.mark.parametrize("on_grid", [True, False])
def test_the_recipe_of_many_rows_is_short_and_read_again_bit_for_bit(tmp_path: Path, on_grid: bool) -> None:
    """It is in the header of the file, which other programs read: a small LoRA was four times as large as an epoch."""
    states = [{"a.w": torch.full((2000, 2), float(step))} for step in range(1, 6)]
    trajectory = written(tmp_path / "wide.trajectory", *states).in_rows("channels")
    drawn = np.random.default_rng(0).standard_normal((2000, 5)) * 0.1 + 0.2
    drawn += (1 - drawn.sum(axis=1, keepdims=True)) / 5
    coefficients = rounded_coefficients(drawn) if on_grid else drawn
    made = recipe(trajectory, coefficients)
    text = made.as_text()
    assert len(text) < 10_000 * (3 if on_grid else 11.5), "2 bytes of a number on the grid, else 8, in base64"
    (tmp_path / "recipe.json").write_text(text)
    read = Recipe.read(tmp_path / "recipe.json")
    assert np.array_equal(read.coefficients, coefficients)
    assert read == made


@pytest.mark.parametrize(
    "packed",
    [
        {"shape": [2, 2], "int16": "eJw=", "scale": 1.0},
        {"shape": [2, 2]},
        {"shape": [2, 2], "int16": base64.b64encode(zlib.compress(bytes(50_000_000))).decode(), "scale": 1.0},
    ],
)
def test_packed_coefficients_that_are_none_are_a_broken_recipe(tmp_path: Path, packed: dict[str, Any]) -> None:
    trajectory = written(tmp_path / "two.trajectory", *({"a.w": torch.ones(2) * step} for step in (1, 2)))
    fields = json.loads(recipe(trajectory, np.array([0.5, 0.5])).as_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**fields, "coefficients": packed}))
    if "eJw=" in str(packed) or "int16" not in packed:
        with pytest.raises(TrajectoryError, match="holds a broken recipe"):
            Recipe.read(tmp_path / "recipe.json")
    else:
        assert np.shape(Recipe.read(tmp_path / "recipe.json").coefficients) == (2, 2), "no more is unpacked"


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_it_is_the_searchs_own_merge_rounded_to_the_dtype(trajectory: Trajectory, dtype: str | None) -> None:
    searched = trajectory.merge(COEFFICIENTS, wide=dtype is not None)
    merged = merge(trajectory, recipe(trajectory, dtype=dtype))
    expected = {
        name: tensor.to(getattr(torch, dtype)) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in searched.items()
    }
    torch.testing.assert_close(merged, expected)
    assert merged["index"].dtype == torch.int16
    total = sum(a * state_dict(step)["weight"].double() for a, step in zip(COEFFICIENTS, STEPS, strict=True))
    torch.testing.assert_close(merged["weight"], torch.as_tensor(total).to(merged["weight"].dtype))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("saved", "dtype"), [("bfloat16", "float32"), ("float16", "float32"), ("float16", "bfloat16")])
def test_another_dtype_has_the_sums_of_the_checkpoints_values_rounded_once(
    tmp_path: Path, rows: bool, saved: str, dtype: str
) -> None:
    drawn = torch.Generator().manual_seed(0)
    states = [
        {name: torch.randn(64, 64, generator=drawn).to(getattr(torch, saved)) for name in ("a.w", "b.w")}
        for _ in range(5)
    ]
    trajectory = written(tmp_path / "half.trajectory", *states)
    if rows:
        trajectory = trajectory.in_rows("layers")
    coefficients = np.stack([COEFFICIENTS, COEFFICIENTS[::-1]])
    merged = merge(trajectory, recipe(trajectory, coefficients if rows else COEFFICIENTS, dtype=dtype))
    for row, name in enumerate(("a.w", "b.w")):
        of_row = coefficients[row if rows else 0]
        exact = sum(a * state[name].double() for a, state in zip(of_row, states, strict=True))
        expected = torch.as_tensor(exact).to(getattr(torch, dtype))
        assert merged[name].dtype == expected.dtype
        assert float((merged[name].double() - expected.double()).abs().max()) < 1e-5 or dtype == "bfloat16"
        # a sum in float32 that lies in the middle of two numbers may be rounded to either
        assert dtype == "float32" or float((merged[name] == expected).double().mean()) > 0.99, "rounded twice, 0.94"


def test_a_recipe_of_rows_is_merged_with_the_row_of_each_tensor(trajectory: Trajectory) -> None:
    grouped = trajectory.in_rows("layers")
    assert grouped.layer_groups is not None
    rows = np.stack([np.roll(COEFFICIENTS, row) for row in range(len(grouped.layer_groups))])
    merged = merge(trajectory, recipe(grouped, rows))
    torch.testing.assert_close(merged, grouped.merge(rows))


def test_checkpoints_with_coefficient_zero_are_not_needed_and_further_ones_do_no_harm(
    trajectory: Trajectory, tmp_path: Path
) -> None:
    few = packed_files(tmp_path, 200, 500)
    torch.testing.assert_close(merge(few, recipe(trajectory, TWO)), trajectory.merge(TWO))
    torch.testing.assert_close(merge(trajectory, recipe(few, np.array([0.5, 0.5]))), few.merge([0.5, 0.5]))
    with pytest.raises(TrajectoryError, match="3 of the 5 checkpoints that are combined are missing: 100, 300, 400"):
        merge(few, recipe(trajectory))


def test_a_single_checkpoint_comes_back_bit_for_bit(trajectory: Trajectory) -> None:
    assert same_bits(merge(trajectory, recipe(trajectory, np.eye(5)[2])), state_dict(STEPS[2]))


def test_swapped_names_are_refused(tmp_path: Path) -> None:
    """The bytes of a row do not tell its names: two tensors of one shape that change places in all checkpoints."""

    def tensors(step: int, *names: str) -> dict[str, Tensor]:
        return {name: torch.full((64,), step / divisor) for name, divisor in zip(names, (3, 7), strict=True)}

    trajectory = written(tmp_path / "a.trajectory", tensors(1, "a", "b"), tensors(2, "a", "b"))
    other = written(tmp_path / "b.trajectory", tensors(1, "x", "y"), tensors(2, "x", "y"))
    with pytest.raises(TrajectoryError, match="other tensor names"):
        merge(other, recipe(trajectory, np.array([0.25, 0.75])))


def test_weights_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    trajectory = written(tmp_path / "large.trajectory", *({"w": torch.tensor([1e5 * step, 1.0])} for step in (1, 2)))
    half = np.array([0.5, 0.5])
    assert torch.isfinite(merge(trajectory, recipe(trajectory, half, "bfloat16"))["w"]).all()
    with pytest.raises(TrajectoryError, match="'w' has values too large for float16: pass --dtype float32"):
        merge(trajectory, recipe(trajectory, half, "float16"))


def with_average(folder: Path, *steps: int, dtype: torch.dtype = torch.float32) -> Trajectory:
    """Files in which the trainer kept an average beside the weights, which have a ``dtype`` of their own, packed."""
    folder.mkdir()
    files = []
    for step in steps:
        files.append(folder / f"model{step:06d}.pt")
        weights = state_dict(step)
        rounded = {
            name: weight.to(dtype) if weight.dtype == torch.float32 else weight for name, weight in weights.items()
        }
        torch.save({"model": rounded, "ema": state_dict(step + 1)}, files[-1])
    return pack(files, folder / "packed.trajectory", key="model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trainers_average_is_that_of_the_recipes_last_checkpoint_and_of_no_other(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    trajectory = with_average(tmp_path / "run", 100, 200, dtype=dtype)
    kept = Recipe.of(trajectory, np.array([0.0, 1.0]), study="tests", trainer_ema="trainer's EMA")
    assert same_bits(merge(trajectory, kept), state_dict(201))
    with pytest.raises(TrajectoryError, match="leave out the checkpoints after step 200"):
        merge(with_average(tmp_path / "longer", 100, 200, 300, dtype=dtype), kept)
    with pytest.raises(TrajectoryError, match="missing: 200"):
        merge(with_average(tmp_path / "shorter", 50, 100, dtype=dtype), kept)
