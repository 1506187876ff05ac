from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, filling, pack
from lcsc_opt.trajectory.means import Interval, described
from tests.trajectory.trajectory_examples import (
    COMBINED,
    append,
    interrupt,
    make_trajectory,
    same_bits,
    state_dict,
)

STEPS = tuple(range(10, 90, 10))
INTERVALS = ((10, 20, 2), (30, 40, 2), (50, 70, 3), (80, 80, 1))


def with_statistics(step):
    """A model with batch norm, at a step; means do not keep the sign of a constant zero."""
    tensors = state_dict(step)
    tensors["norm.running_mean"] = torch.full((2,), float(step))
    tensors["constant"] = torch.tensor([0.1, 0.3, 1e-40])
    return tensors


def expected_mean(steps):
    """What a mean holds: averages in float64, and the last values of all else."""
    states = [with_statistics(step) for step in steps]
    row = dict(states[-1])
    for name in COMBINED:
        mean = sum(state[name].double() for state in states) / len(states)
        row[name] = mean.to(row[name].dtype)
    return row


def assert_is_mean(trajectory, index, steps):
    row = trajectory.checkpoint(index)
    expected = expected_mean(steps)
    assert row.keys() == expected.keys()
    for name, tensor in row.items():
        assert tensor.dtype == expected[name].dtype
        if name in COMBINED and tensor.dtype == torch.bfloat16:  # rounded again whenever a training merges two rows
            torch.testing.assert_close(tensor, expected[name], atol=0.02, rtol=0.02)
        elif name in COMBINED:
            torch.testing.assert_close(tensor, expected[name], atol=1e-3 if name == "half" else 1e-5, rtol=1e-5)
        else:
            assert torch.equal(tensor, expected[name])


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"model{step:06d}.safetensors" for step in STEPS]
    for path, step in zip(paths, STEPS, strict=True):
        save_file(with_statistics(step), path)
    return paths


def assert_packed_means(trajectory):
    trajectory.verify()
    assert trajectory.intervals == INTERVALS
    assert trajectory.steps == (20, 40, 70, 80)
    assert "constant" not in trajectory.varying
    for index, (first, last, _) in enumerate(INTERVALS):
        assert_is_mean(trajectory, index, range(first, last + 1, 10))
    assert same_bits(trajectory.checkpoint(-1), with_statistics(80))


def test_files_are_packed_as_means_and_the_last_checkpoint(files, tmp_path):
    trajectory = pack(files, tmp_path / "t", means=3)
    assert_packed_means(trajectory)
    assert trajectory.sources == ("", "", "", str(files[-1]))


def test_trajectory_is_packed_as_means(tmp_path):
    whole = make_trajectory(tmp_path / "whole", steps=STEPS, weights=with_statistics)
    assert_packed_means(pack(whole.path, tmp_path / "t", means=3))
    again = pack(whole.path, tmp_path / "again")
    assert again.sha256 == whole.sha256


@pytest.mark.parametrize("count", range(1, 8))
def test_interrupted_pack_of_means_goes_on_and_has_the_same_bits(files, tmp_path, monkeypatch, count):
    whole = pack(files, tmp_path / "whole", means=3)
    with monkeypatch.context() as patch:
        interrupt(patch, filling, "read_checkpoint", count + 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(files, tmp_path / "t", means=3)
    assert not (tmp_path / "t").exists()
    assert pack(files, tmp_path / "t", means=3).sha256 == whole.sha256


def test_pack_with_other_means_begins_again(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, filling, "read_checkpoint", 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(files, tmp_path / "t", means=3)
    assert len(pack(files, tmp_path / "t", means=2)) == 3


@pytest.mark.parametrize(
    ("means", "message"), [(8, "need 9 checkpoints, and 8 are selected"), (0, "expected a whole number of at least 1")]
)
def test_too_many_means_are_refused(files, tmp_path, means, message):
    with pytest.raises(TrajectoryError, match=message):
        pack(files, tmp_path / "t", means=means)
    assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((2, 3, 1), "2 means of 2 to 3 checkpoints each, and the last checkpoint"),
        ((2, 1), "1 mean of 2 checkpoints, and the last checkpoint"),
        ((1, 1, 1), "2 means of 1 checkpoint each, and the last checkpoint"),
        ((1,), "1 mean of 1 checkpoint"),
    ],
)
def test_means_are_described_in_words(counts, text):
    assert described([Interval(10, 20, count) for count in counts]) == text


@pytest.mark.parametrize("dtype", ["exact", "float16"])
def test_trajectory_of_means_is_packed_again_in_another_dtype(files, tmp_path, dtype):
    means = pack(files, tmp_path / "t", means=3)
    again = pack(means.path, tmp_path / "again", dtype=dtype)
    assert again.intervals == INTERVALS
    assert again.sources == means.sources
    if dtype == "exact":
        assert again.sha256 == means.sha256


def test_means_are_not_averaged_again_nor_mixed_with_checkpoints(files, tmp_path):
    path = pack(files, tmp_path / "t", means=3).path
    sha256 = Trajectory.open(path).sha256
    with pytest.raises(TrajectoryError, match="holds means: pack the checkpoints"):
        pack(path, tmp_path / "again", means=2)
    with pytest.raises(TrajectoryError, match="holds means of checkpoints"):
        append(path, 90, weights=with_statistics)
    assert Trajectory.open(path).sha256 == sha256
    assert not (tmp_path / "again").exists()


def test_checkpoint_of_a_mean_that_is_not_finite_is_named(files, tmp_path):
    broken = with_statistics(30)
    broken["bias"][1] = float("nan")
    save_file(broken, files[2])
    with pytest.raises(TrajectoryError, match=r"model000030\.safetensors: Tensor 'bias' at step 30 holds NaN"):
        pack(files, tmp_path / "t", means=3)
