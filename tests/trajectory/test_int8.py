"""Rows of 8-bit deviations from a mean, against the float32 that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.exports.exact_merge import merge_exactly
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter, filling
from lcsc_opt.trajectory.int8 import Int8Layout, dequantize, quantize
from lcsc_opt.trajectory.layout import BLOCK, Layout
from lcsc_opt.trajectory.packing import pack
from tests.trajectory.trajectory_examples import (
    COMBINED,
    STEPS,
    append,
    make_trajectory,
    same_bits,
)

ROW = np.array([2.5, -1.75, 0.5, 0.25, -0.5])
K = len(STEPS)


def walk(step: int) -> dict[str, Tensor]:
    """Weights as a training leaves them: far from zero, near to each other; tensors end within a block."""
    generator = torch.Generator().manual_seed(0)
    start = {"a.weight": torch.randn(40, 30, generator=generator), "b.bias": torch.randn(7, generator=generator)}
    steps = torch.Generator().manual_seed(step)
    return {
        "a.weight": start["a.weight"] + 0.01 * torch.randn(40, 30, generator=steps),
        "b.bias": 1000 * start["b.bias"] + torch.randn(7, generator=steps),
        "calls": torch.tensor(step),
    }


@pytest.fixture
def exact(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "exact", weights=walk)


@pytest.fixture
def packed(exact: Trajectory, tmp_path: Path) -> Trajectory:
    return pack(exact.path, tmp_path / "int8", dtype="int8")


def relative_error(merged: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> float:
    return float((merged[name].double() - expected[name].double()).norm() / expected[name].double().norm())


def test_error_is_far_below_that_of_bfloat16(exact: Trajectory, packed: Trajectory, tmp_path: Path) -> None:
    half = pack(exact.path, tmp_path / "half", dtype="bfloat16")
    expected = exact.merge(ROW)
    for name in ("a.weight", "b.bias"):  # one of a thousand beside one of ones: they share no scale
        error = relative_error(packed.merge(ROW), expected, name)
        assert 1e-8 < error < relative_error(half.merge(ROW), expected, name) / 10


def test_large_trajectories_take_a_quarter_and_the_mean(tmp_path: Path) -> None:
    exact = make_trajectory(
        tmp_path / "exact",
        range(1, 21),
        weights=lambda step: {"weight": torch.full((100, 1000), float(step))},
    )
    packed = pack(exact.path, tmp_path / "int8", dtype="int8")
    assert packed.nbytes == sum((packed.path / name).stat().st_size for name in ("weights.bin", "mean.bin"))
    assert packed.nbytes / exact.nbytes == pytest.approx((1 + 4 / BLOCK) / 4 + 1 / 20, abs=1e-3)


def test_whatever_reads_it_sees_the_same_weights(packed: Trajectory) -> None:
    checkpoints = [packed.checkpoint(index) for index in range(K)]
    packed.verify()
    for index, checkpoint in enumerate(checkpoints):
        assert same_bits(packed.merge(np.eye(K)[index]), checkpoint)
        assert checkpoint["calls"] == STEPS[index]
    names = ("a.weight", "b.bias")
    merged = packed.merge(ROW)
    gradients = {name: torch.randn_like(checkpoints[0][name]) for name in names}
    stacked = torch.stack([torch.cat([one[name].double().reshape(-1) for name in names]) for one in checkpoints])
    expected = torch.from_numpy(ROW) @ stacked
    assert torch.allclose(torch.cat([merged[name].double().reshape(-1) for name in names]), expected, atol=1e-3)
    flat_gradient = torch.cat([gradients[name].double().reshape(-1) for name in names])
    np.testing.assert_allclose(packed.project(gradients), (stacked @ flat_gradient).numpy(), rtol=1e-6, atol=1e-4)
    centered = stacked - stacked.mean(dim=0)
    np.testing.assert_allclose(packed.gram(), (centered @ centered.T).numpy(), rtol=1e-4, atol=1e-3)
    norms = stacked.diff(dim=0).norm(dim=1).numpy()
    np.testing.assert_allclose(packed.difference_norms(), norms, rtol=1e-5)


@pytest.mark.parametrize("how", ["mapped", "resident", "streamed"])
def test_a_row_for_each_layer(packed: Trajectory, how: str) -> None:
    grouped = packed.in_rows("layers").on("cpu", how=how)  # type: ignore[arg-type]
    assert grouped.layer_groups is not None
    rows = np.stack([ROW, ROW[::-1], np.eye(K)[0]])  # of the two tensors, and of the integer
    merged = grouped.merge(rows)
    for name in ("a.weight", "b.bias"):
        row = rows[grouped.layer_groups.row_of[name]]
        assert torch.equal(merged[name], packed.merge(row)[name])
    gradients = {name: torch.ones_like(merged[name]) for name in ("a.weight", "b.bias")}
    projected = grouped.project(gradients)
    np.testing.assert_allclose(projected.sum(axis=0), packed.project(gradients), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(grouped.gram().sum(axis=0), packed.gram(), rtol=1e-6)


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    exact = make_trajectory(tmp_path / "exact")
    packed = pack(exact.path, tmp_path / "int8", dtype="int8")
    merged = packed.merge(ROW)
    expected = exact.merge(ROW)
    assert packed.varying == exact.varying
    for name, tensor in expected.items():
        if name in COMBINED:
            assert merged[name].dtype == torch.float32
            torch.testing.assert_close(merged[name], tensor.float(), rtol=0, atol=0.06)
        else:  # integers, booleans, an empty tensor and one that never changes
            assert torch.equal(merged[name], tensor)


def test_a_model_without_any_weight_to_merge(tmp_path: Path) -> None:
    weights = {step: {"calls": torch.tensor(step), "flag": torch.tensor([True, False])} for step in STEPS}
    exact = make_trajectory(tmp_path / "exact", weights=weights.__getitem__)
    packed = pack(exact.path, tmp_path / "int8", dtype="int8")
    assert packed.merge(ROW)["calls"] == 100
    assert packed.project({}).tolist() == [0.0] * K


def test_an_export_merges_the_rounded_checkpoints_exactly(packed: Trajectory) -> None:
    recipe = Recipe.of(packed, ROW, study="tests")
    exported = merge_exactly(packed, recipe)
    checkpoints = [packed.checkpoint(index) for index in range(K)]
    expected = sum(a * checkpoint["a.weight"].double() for a, checkpoint in zip(ROW, checkpoints, strict=True))
    assert torch.equal(exported["a.weight"], expected.float())
    torch.testing.assert_close(exported, packed.merge(ROW))


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_value_is_off_by_half_a_step_at_most(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator)
    padded = -(-size // BLOCK) * BLOCK
    mean = torch.zeros(padded)
    mean[:size] = torch.randn(size, generator=generator)
    codes, scales = quantize(values, mean)
    assert codes.shape == (padded,)
    assert scales.shape == (padded // BLOCK,)
    assert not codes[size:].any()
    steps = scales.repeat_interleave(BLOCK)[:size]
    off = (dequantize(codes, scales, mean)[:size] - values).abs()
    assert bool((off <= 0.5 * steps + 1e-6).all())
    assert codes.abs().max() == 127  # all of the range is used


@pytest.mark.parametrize("deviation", [0.0, 1e-45, 1e-39, 1e30])
def test_blocks_of_no_deviation_and_of_extreme_ones(deviation: float) -> None:
    mean = torch.full((BLOCK,), 1.0 if deviation < 1 else 0.0)
    values = mean.clone()
    values[3] += deviation
    codes, scales = quantize(values, mean)
    rounded = dequantize(codes, scales, mean)
    assert torch.allclose(rounded, values, rtol=1e-6, atol=0)
    if deviation == 0:
        assert not scales.any()
        assert not codes.any()


def test_tensors_do_not_share_blocks() -> None:
    layout = Layout.of({"large": torch.zeros(300), "small": torch.zeros(3), "none": torch.empty(0)})
    codes = Int8Layout.of(layout).codes
    assert [(codes[name].offset, codes[name].numel) for name in ("large", "none", "small")] == [
        (0, 512),
        (512, 0),
        (512, 256),
    ]


def test_a_training_that_goes_on_keeps_the_mean(packed: Trajectory) -> None:
    before = (packed.path / "mean.bin").read_bytes()
    append(packed.path, 600, weights=walk)
    append(packed.path, 600, weights=walk)  # the same bytes again
    grown = Trajectory.open(packed.path)
    grown.verify()
    assert (packed.path / "mean.bin").read_bytes() == before
    assert relative_error(grown.checkpoint(-1), walk(600), "a.weight") < 1e-3
    with TrajectoryWriter(packed.path) as writer, pytest.raises(TrajectoryError, match="saved already"):
        writer.append(600, walk(601))


def test_a_training_cannot_begin_with_int8(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="pack TRAJECTORY -o OUT --stored int8"):
        TrajectoryWriter(tmp_path / "run", dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    def weights(step: int) -> dict[str, Tensor]:
        return {"weight": torch.full((3,), value if step == STEPS[2] else 1.0, dtype=torch.float64)}

    for step in STEPS:
        torch.save(weights(step), tmp_path / f"model-{step}.pt")
    with pytest.raises(TrajectoryError, match=r"'weight' at step 300 holds NaN or infinity"):
        pack(tmp_path, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_deviations_that_no_float32_can_hold_are_refused(tmp_path: Path) -> None:
    exact = make_trajectory(tmp_path / "exact", (1, 2), weights=lambda _: {"weight": torch.tensor([3e38])})
    packed = pack(exact.path, tmp_path / "int8", dtype="int8")
    with pytest.raises(TrajectoryError, match="infinity in int8"):
        append(packed.path, 3, weights=lambda _: {"weight": torch.tensor([-3e38])})


def test_an_interrupted_pack_goes_on(exact: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = filling._write_checkpoint
    whole = pack(exact.path, tmp_path / "whole", dtype="int8")

    def interrupted(*arguments: object) -> None:
        plain(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(filling, "_write_mean", None)  # is not made again
        raise KeyboardInterrupt

    monkeypatch.setattr(filling, "_write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(exact.path, tmp_path / "int8", dtype="int8")
    monkeypatch.setattr(filling, "_write_checkpoint", plain)
    assert pack(exact.path, tmp_path / "int8", dtype="int8").sha256 == whole.sha256


@pytest.mark.parametrize("name", ["mean.bin", "weights.bin"])
def test_damage_is_noticed(packed: Trajectory, name: str) -> None:
    content = bytearray((packed.path / name).read_bytes())
    content[1] ^= 64
    (packed.path / name).write_bytes(content)
    with pytest.raises(TrajectoryError, match="of step 100 are damaged"):
        Trajectory.open(packed.path).verify()
    (packed.path / name).write_bytes(content[:100])
    with pytest.raises(TrajectoryError, match="truncated"):
        Trajectory.open(packed.path)


def test_an_older_version_refuses_it(packed: Trajectory, exact: Trajectory) -> None:
    assert json.loads((packed.path / "manifest.json").read_bytes())["format"] == 2
    assert json.loads((exact.path / "manifest.json").read_bytes())["format"] == 1
