from __future__ import annotations

import pytest
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import pack
from lcsc_opt.trajectory.inspection import inspect
from tests.trajectory.trajectory_examples import STEPS, state_dict


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for step in STEPS:
        write(path, step, state_dict(step))
    return path


def write(folder, step, tensors, name="model{:06d}.safetensors"):
    save_file(tensors, folder / name.format(step))


def test_a_packed_trajectory_is_described(folder, tmp_path):
    packed = inspect(pack(folder, tmp_path / "t.trajectory").path, verify=True)
    assert (packed["checkpoints"], packed["steps"], packed["intervals"]) == (5, list(STEPS), [100])
    assert packed["series"] == ["model"]
    assert packed["verified"]
    assert packed["warnings"] == []


def test_files_that_are_not_packed_are_refused(folder):
    with pytest.raises(TrajectoryError, match="is not a trajectory: make one with `lcsc trajectory pack`"):
        inspect(folder)
