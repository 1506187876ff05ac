from __future__ import annotations

import json

import pytest

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory


def edit(trajectory, change):
    file = trajectory.path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return trajectory.path


def set_in(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


HOSTILE = {
    "negative offset": set_in("tensors", 0, "offset", value=-64),
    "overlapping": set_in("tensors", 2, "offset", value=0),
    "huge offset": set_in("tensors", 1, "offset", value=2**62),
    "huge shape": set_in("tensors", 1, "shape", value=[2**40, 2**40]),
    "huge empty shape": set_in("tensors", 1, "shape", value=[0, 2**50]),
    "negative shape": set_in("tensors", 1, "shape", value=[-3]),
    "unknown dtype": set_in("tensors", 0, "dtype", value="object"),
    "twice the same tensor": set_in("tensors", 1, "name", value="double"),
    "unaligned row": set_in("row_bytes", value=1001),
    "another format": set_in("format", value=2),
    "negative slot": set_in("checkpoints", 0, "slot", value=-1),
    "same slot": set_in("checkpoints", 0, "slot", value=1),
    "falling steps": set_in("checkpoints", 0, "step", value=900),
    "step is text": set_in("checkpoints", 0, "step", value="100"),
    "not a hash": set_in("checkpoints", 0, "sha256", value="beef"),
    "varying stranger": set_in("varying", value=["stranger"]),
    "no tensors": set_in("tensors", value=[]),
    "metadata not text": set_in("metadata", value={"a": 1}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifest_is_refused_in_one_line(trajectory, change):
    with pytest.raises(TrajectoryError, match="is broken") as caught:
        Trajectory.open(edit(trajectory, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slot", [5, 2**62])
def test_slots_beyond_the_file_are_truncation(trajectory, slot):
    with pytest.raises(TrajectoryError, match=r"truncated|Cannot map"):
        Trajectory.open(edit(trajectory, set_in("checkpoints", 0, "slot", value=slot)))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_text_that_is_no_manifest_is_refused(trajectory, text):
    (trajectory.path / "manifest.json").write_bytes(text)
    with pytest.raises(TrajectoryError, match="is broken"):
        Trajectory.open(trajectory.path)


def test_what_is_not_a_trajectory_says_so(tmp_path):
    with pytest.raises(TrajectoryError, match="no trajectory at"):
        Trajectory.open(tmp_path / "nowhere")
    with pytest.raises(TrajectoryError, match="is not a trajectory"):
        Trajectory.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrajectoryError, match="is not a trajectory"):
        Trajectory.open(tmp_path / "file")
