from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from trajectory_examples import STEPS, make_trajectory, same_bits, state_dict

from lcsc_opt.errors import CheckpointError, TrajectoryError
from lcsc_opt.trajectory import Trajectory, pack, packing


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"model{step:06d}.safetensors" for step in STEPS]
    for path, step in zip(paths, STEPS, strict=True):
        save_file(state_dict(step), path)
    return paths


def names(folder):
    return {entry.name for entry in folder.iterdir()}


def test_packed_in_the_order_of_steps(files, tmp_path):
    trajectory = pack(files[::-1], tmp_path / "run.trajectory")
    assert trajectory.steps == STEPS
    assert trajectory.sources == tuple(map(str, files))
    for index, step in enumerate(STEPS):
        assert same_bits(trajectory.checkpoint(index), state_dict(step))
    trajectory.verify()
    assert "run.trajectory.partial" not in names(tmp_path)


def test_packed_and_written_trajectories_are_the_same(files, tmp_path):
    assert pack(files, tmp_path / "a").sha256 == make_trajectory(tmp_path / "b").sha256


def test_given_steps_win(files, tmp_path):
    trajectory = pack(files[:3], tmp_path / "t", steps=[30, 10, 20])
    assert trajectory.steps == (10, 20, 30)
    assert same_bits(trajectory.checkpoint(2), state_dict(STEPS[0]))


def test_mixed_formats_of_one_model(files, tmp_path):
    torch.save({f"module.{name}": tensor for name, tensor in state_dict(600).items()}, tmp_path / "model600.pt")
    assert same_bits(pack([*files, tmp_path / "model600.pt"], tmp_path / "t").checkpoint(-1), state_dict(600))


def test_key_of_the_first_is_taken_from_all(tmp_path):
    torch.save({"ema": state_dict(1), "model": state_dict(2)}, tmp_path / "m1.pt")
    torch.save({"model": state_dict(4)}, tmp_path / "m2.pt")
    paths = [tmp_path / "m1.pt", tmp_path / "m2.pt"]
    with pytest.raises(CheckpointError, match=r"m2\.pt has no key 'ema'"):
        pack(paths, tmp_path / "t")
    trajectory = pack(paths, tmp_path / "t", key="model")
    assert same_bits(trajectory.checkpoint(0), state_dict(2))
    assert trajectory.metadata["key"] == "model"


@pytest.mark.parametrize("count", range(1, len(STEPS)))
def test_interrupted_pack_goes_on_where_it_stopped(files, tmp_path, monkeypatch, count):
    read = []

    def reading(path, *, key):
        read.append(path)
        if len(read) == count + 2:  # the first file is looked at once more, for its key
            raise KeyboardInterrupt
        return plain(path, key=key)

    plain = packing.read_checkpoint
    monkeypatch.setattr(packing, "read_checkpoint", reading)
    with pytest.raises(KeyboardInterrupt):
        pack(files, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert Trajectory.open(tmp_path / "t.partial").steps == STEPS[:count]
    read[:] = [None] * len(STEPS) * 2
    trajectory = pack(files, tmp_path / "t")
    assert read[len(STEPS) * 2 :] == [files[0], *files[count:]]
    assert trajectory.sha256 == make_trajectory(tmp_path / "whole").sha256


@pytest.mark.parametrize("change", ["content", "selection"])
def test_partial_of_other_sources_is_not_continued(files, tmp_path, monkeypatch, change):
    torch.save({"w": torch.ones(1)}, tmp_path / "model000600.pt")
    with pytest.raises(TrajectoryError, match=r"model000600\.pt: Tensor 'batches' is missing"):
        pack([*files, tmp_path / "model000600.pt"], tmp_path / "t")
    assert "t.partial" in names(tmp_path)
    if change == "content":
        for path in files:
            save_file(state_dict(int(path.stem[5:]) + 1), path)
        torch.save(state_dict(601), tmp_path / "model000600.pt")
        files = [*files, tmp_path / "model000600.pt"]
    expected = state_dict(STEPS[0] + (change == "content"))
    assert same_bits(pack(files, tmp_path / "t").checkpoint(0), expected)


def test_existing_output_needs_overwrite(files, tmp_path):
    pack(files[:2], tmp_path / "t")
    with pytest.raises(TrajectoryError, match="--overwrite"):
        pack(files, tmp_path / "t")
    assert len(Trajectory.open(tmp_path / "t")) == 2
    assert len(pack(files, tmp_path / "t", overwrite=True)) == len(STEPS)


def test_overwrite_never_removes_anything_else(files, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(TrajectoryError, match="is not a trajectory"):
        pack(files, tmp_path / "photos", overwrite=True)
    (tmp_path / "photos").rename(tmp_path / "t.partial")
    with pytest.raises(TrajectoryError, match="in the way"):
        pack(files, tmp_path / "t")
    assert (tmp_path / "t.partial" / "me.jpg").exists()


def test_failed_overwrite_keeps_the_old_one(files, tmp_path):
    pack(files[:2], tmp_path / "t")
    files[3].write_bytes(b"broken" * 9)
    with pytest.raises(CheckpointError, match=files[3].name):
        pack(files, tmp_path / "t", overwrite=True)
    assert len(Trajectory.open(tmp_path / "t")) == 2


def test_non_finite_weights_name_file_tensor_and_step(files, tmp_path):
    broken = state_dict(300)
    broken["bias"][1] = float("nan")
    save_file(broken, files[2])
    with pytest.raises(TrajectoryError, match=r"model000300.*'bias' at step 300"):
        pack(files, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("select", "steps", "message"),
    [
        (slice(0, 1), None, "at least 2"),
        (slice(0, 0), None, "at least 2"),
        (slice(0, 2), [1], "expected 2"),
        (slice(0, 2), [4, 4], "Step 4 is there twice"),
        (slice(0, 2), [-4, 4], "cannot be -4"),
    ],
)
def test_bad_selections_are_refused(files, tmp_path, select, steps, message):
    with pytest.raises(TrajectoryError, match=message):
        pack(files[select], tmp_path / "t", steps=steps)
    assert not (tmp_path / "t").exists()


def test_file_that_is_not_there(files, tmp_path):
    for name in ("model9.pt", "model9.safetensors"):
        with pytest.raises(CheckpointError, match="model9"):
            pack([*files, tmp_path / name], tmp_path / "t")


PEAK = """
import sys, threading
from lcsc_opt.trajectory import pack
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
start, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
pack(sys.argv[2:], sys.argv[1])
done.set(); watcher.join()
print(max(peak[0], anonymous()) - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_holds_less_than_two_checkpoints(tmp_path):
    size = 40_000_000
    paths = [str(tmp_path / f"model{step}.safetensors") for step in range(6)]
    for step, path in enumerate(paths):
        save_file({f"w{i}": torch.full((size // 40,), float(step)) for i in range(10)}, path)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "t"), *paths]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 2 * size
