from __future__ import annotations

import functools
import json
import operator

import pytest

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.manifest import Manifest


def edit(trajectory, *keys, value):
    file = trajectory.path / "manifest.json"
    content = json.loads(file.read_text())
    functools.reduce(operator.getitem, keys[:-1], content)[keys[-1]] = value
    file.write_text(json.dumps(content))
    return trajectory.path


AVERAGE = {"step": 500, "slot": 7, "source": "", "sha256": "0" * 64, "name": "trainer's EMA", "slots": 2}
HOSTILE = {
    "negative offset": ("tensors", 0, "offset", -64),
    "overlapping": ("tensors", 2, "offset", 0),
    "huge offset": ("tensors", 1, "offset", 2**62),
    "huge shape": ("tensors", 1, "shape", [2**40, 2**40]),
    "huge empty shape": ("tensors", 1, "shape", [0, 2**50]),
    "negative shape": ("tensors", 1, "shape", [-3]),
    "unknown dtype": ("tensors", 0, "dtype", "object"),
    "twice the same tensor": ("tensors", 1, "name", "double"),
    "unaligned row": ("row_bytes", 1001),
    "another format": ("format", 3),
    "negative slot": ("checkpoints", 0, "slot", -1),
    "same slot": ("checkpoints", 0, "slot", 1),
    "same slot as the trainer's average": (
        "averages",
        [{"step": 500, "slot": 1, "source": "", "sha256": "0" * 64, "name": "trainer's EMA"}],
    ),
    "an average over the first checkpoint": ("averages", [{**AVERAGE, "slot": 0, "slots": 1}]),
    "an average with no slot": ("averages", [{**AVERAGE, "slots": 0}]),
    "an average of too few slots": ("averages", [{**AVERAGE, "slots": 1, "dtypes": {"bfloat": "float64"}}]),
    "an average of an unknown dtype": ("averages", [{**AVERAGE, "dtypes": {"bfloat": "float12"}}]),
    "an average of a stranger": ("averages", [{**AVERAGE, "dtypes": {"stranger": "float32"}}]),
    "two averages in one slot": ("averages", [{**AVERAGE, "slots": 3}, {**AVERAGE, "slot": 9, "name": "another"}]),
    "falling steps": ("checkpoints", 0, "step", 900),
    "step is text": ("checkpoints", 0, "step", "100"),
    "not a hash": ("checkpoints", 0, "sha256", "beef"),
    "varying stranger": ("varying", ["stranger"]),
    "no tensors": ("tensors", []),
    "metadata not text": ("metadata", {"a": 1}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifest_is_refused_in_one_line(trajectory, change):
    with pytest.raises(TrajectoryError, match=r"is broken .*: remove .*run\.trajectory and pack again") as caught:
        Trajectory.open(edit(trajectory, *change[:-1], value=change[-1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slot", [5, 2**62])
def test_slots_beyond_the_file_are_truncation(trajectory, slot):
    with pytest.raises(TrajectoryError, match=r"truncated|Cannot map"):
        Trajectory.open(edit(trajectory, "checkpoints", 0, "slot", value=slot))


@pytest.mark.parametrize("slots", [2, 2**40, 2**62])
def test_an_average_beyond_the_file_is_truncation(trajectory, slots):
    with pytest.raises(TrajectoryError, match=r"truncated|Cannot map"):
        Trajectory.open(edit(trajectory, "averages", value=[{**AVERAGE, "slots": slots}]))


@pytest.mark.parametrize(
    ("taken", "count", "slot"),
    [([], 1, 0), ([0, 1], 1, 2), ([0, 2], 1, 1), ([1], 1, 0), ([0, 2], 2, 3), ([0, 3], 2, 1), ([2], 2, 0)],
)
def test_a_row_gets_the_first_slots_that_are_free(trajectory, taken, count, slot):
    manifest = Manifest.load(trajectory.path)
    checkpoints = tuple(manifest.checkpoints[0].model_copy(update={"slot": number}) for number in taken)
    assert manifest.model_copy(update={"checkpoints": checkpoints}).free_slot(count) == slot


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_text_that_is_no_manifest_is_refused(trajectory, text):
    (trajectory.path / "manifest.json").write_bytes(text)
    with pytest.raises(TrajectoryError, match="is broken"):
        Trajectory.open(trajectory.path)


def test_what_is_not_a_trajectory_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        with pytest.raises(TrajectoryError, match=f"{path} is not a trajectory: make one with `lcsc trajectory pack`"):
            Trajectory.open(path)
