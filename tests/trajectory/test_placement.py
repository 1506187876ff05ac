"""Trajectories on a device, or read for each merge, against the same ones as they are mapped."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import ObjectiveError, TrajectoryError
from lcsc_opt.trajectory import Trajectory, placement
from lcsc_opt.trajectory.placement import Placement
from tests.trajectory.trajectory_examples import COMBINED, STEPS, append, make_trajectory, same_bits, state_dict

K = len(STEPS)
COMBINATIONS = np.array([[2.5, -1.75, 0.5, 0.25, -0.5], [0.0, 0.0, 3.0, -2.0, 0.0], [1 / K] * K])
UNITS = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=["resident", "streamed"])
def way(request: pytest.FixtureRequest) -> Placement:
    return request.param


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    """So that segments have several reads, and reads several tiles."""
    monkeypatch.setattr(placement, "READ_BYTES", 2**13)


def assert_close(merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to the precision of each dtype; tensors that are copied, bit for bit."""
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.is_contiguous()
        tolerance = UNITS[tensor.dtype] if name in COMBINED else 0.0
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", ["exact", "float16", "bfloat16"])
def test_merges_are_those_of_the_map(tmp_path: Path, stored: str, way: Placement) -> None:
    trajectory = make_trajectory(tmp_path / "run.trajectory", dtype=stored)
    placed = trajectory.on("cpu", how=way)
    for index in (0, 2, K - 1):
        assert same_bits(placed.merge(np.eye(K)[index]), trajectory.checkpoint(index))
    for row in COMBINATIONS:
        assert_close(placed.merge(row), trajectory.merge(row))


def test_projections_are_those_of_the_map(trajectory: Trajectory, way: Placement) -> None:
    placed = trajectory.on("cpu", how=way)
    gradients = {name: torch.ones_like(state_dict(1)[name], dtype=torch.float64) for name in COMBINED}
    for names in (COMBINED, ("double",), ("half", "scale"), ()):
        some = {name: gradients[name] for name in names}
        np.testing.assert_allclose(placed.project(some), trajectory.project(some), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mapped", "resident", "streamed"])
def test_results_belong_to_the_caller(trajectory: Trajectory, how: Placement) -> None:
    placed = trajectory.on("cpu", how=how)
    first = placed.merge(COMBINATIONS[0])
    copy = {name: tensor.clone() for name, tensor in first.items()}
    placed.merge(COMBINATIONS[1])
    assert same_bits(first, copy)
    for tensor in first.values():
        tensor.zero_()
    assert same_bits(placed.merge(COMBINATIONS[0]), copy)


@pytest.mark.parametrize("how", ["mapped", "resident", "streamed"])
def test_several_threads_may_merge_at_once(trajectory: Trajectory, how: Placement) -> None:
    placed = trajectory.on("cpu", how=how)
    threads = torch.get_num_threads()
    rows = np.random.default_rng(2).dirichlet(np.ones(K), size=12)
    expected = [placed.merge(row) for row in rows]
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same_bits, expected, pool.map(placed.merge, rows)))


def test_appended_checkpoints_change_nothing_and_overwritten_ones_are_noticed(tmp_path: Path, way: Placement) -> None:
    trajectory = make_trajectory(tmp_path / "run.trajectory")
    placed = trajectory.on("cpu", how=way)
    expected = placed.merge(COMBINATIONS[0])
    assert pickle.loads(pickle.dumps(placed)).sha256 == trajectory.sha256
    append(trajectory.path, 600)
    assert same_bits(placed.merge(COMBINATIONS[0]), expected)
    append(trajectory.path, 700, keep_last=3)
    for use in (lambda: placed.merge(COMBINATIONS[0]), lambda: placed.project({})):
        with pytest.raises(TrajectoryError, match="open it again"):
            use()
    append(trajectory.path, 800, keep_last=3)  # in the row of a checkpoint that was dropped
    with pytest.raises(TrajectoryError, match="open it again"):
        placed.verify()


@pytest.mark.parametrize("device", ["gpu", "cuda:97"])
def test_a_device_that_is_not_there_is_refused(trajectory: Trajectory, device: str) -> None:
    with pytest.raises(ObjectiveError, match=f"device: {device} is not available; expected auto or one of cpu"):
        trajectory.on(device)


def test_a_streamed_trajectory_is_read_again_after_an_error(trajectory: Trajectory) -> None:
    placed = trajectory.on("cpu", how="streamed")
    expected = placed.merge(COMBINATIONS[0])
    weights = trajectory.path / "weights.bin"
    content = weights.read_bytes()
    os.truncate(weights, len(content) - 200)
    with pytest.raises(TrajectoryError, match=r"weights\.bin is truncated"):
        placed.merge(COMBINATIONS[0])
    weights.write_bytes(content)
    assert same_bits(placed.merge(COMBINATIONS[0]), expected)


def test_what_memory_holds_is_mapped_without_a_word(trajectory: Trajectory, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory.on("cpu")
    assert capsys.readouterr().err == ""
