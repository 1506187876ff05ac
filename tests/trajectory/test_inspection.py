from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import pack
from lcsc_opt.trajectory.inspection import inspect
from tests.trajectory.trajectory_examples import STEPS, make_trajectory, state_dict


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for step in STEPS:
        write(path, step, state_dict(step))
    return path


def write(folder, step, tensors, name="model{:06d}.safetensors"):
    save_file(tensors, folder / name.format(step))


def test_unpacked_and_packed_tell_the_same(folder, tmp_path):
    pack(folder, tmp_path / "t.trajectory")
    unpacked, packed = inspect(folder), inspect(tmp_path / "t.trajectory")
    assert unpacked.pop("difference_norms") == pytest.approx(packed.pop("difference_norms"), rel=1e-12)
    differing = {name for name in packed if packed[name] != unpacked[name]}
    assert differing == {"path", "packed"}
    assert (packed["checkpoints"], packed["steps"], packed["intervals"]) == (5, list(STEPS), [100])
    assert packed["series"] == ["model"]
    assert packed["warnings"] == []


def test_identical_weights(folder):
    for step in (600, 700):
        write(folder, step, state_dict(200))
    seen = inspect(folder)
    names = ", ".join(f"step {step} (model000{step}.safetensors)" for step in (200, 600, 700))
    assert seen["warnings"] == [f"identical weights: {names}"]
    assert seen["difference_norms"][-1] == 0


@pytest.mark.parametrize(
    ("missing", "warnings"), [(300, ["gap: 200 from step 200 to 400, where 100 is usual"]), (100, [])]
)
def test_gaps(folder, missing, warnings):
    (folder / f"model{missing:06d}.safetensors").unlink()
    assert inspect(folder)["warnings"] == warnings


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_not_finite_names_the_tensor_and_the_step(folder, value):
    broken = state_dict(300)
    broken["weight"][2, 1] = float(value)
    broken["bfloat"][1] = float(value)
    write(folder, 300, broken)
    seen = inspect(folder)
    assert seen["warnings"] == ["NaN or infinity: tensor 'weight' of step 300 (model000300.safetensors)"]
    assert seen["difference_norms"][1:3] == [None, None]
    assert seen["sha256"] is None
    json.dumps(seen, allow_nan=False)


def test_mixed_architectures_say_what_differs(folder):
    other = state_dict(300)
    del other["bias"], other["half"]
    other["extra"] = torch.ones(2)
    other["weight"] = torch.ones(7, 6)
    write(folder, 300, other)
    seen = inspect(folder)
    assert seen["warnings"] == [
        "mixed architectures: step 300 (model000300.safetensors) lacks 'bias' and 1 more, has also 'extra', "
        "has 'weight' as [7, 6] and not [7, 5]"
    ]
    assert seen["difference_norms"][1:3] == [None, None]
    assert None not in (seen["difference_norms"][0], seen["difference_norms"][3])


def test_damaged_files_do_not_hide_the_rest(folder):
    (folder / "model000300.safetensors").write_bytes(b"x" * 100)
    torch.save(state_dict(600), folder / "model000600.pt")
    os.truncate(folder / "model000600.pt", (folder / "model000600.pt").stat().st_size - 200)
    seen = inspect(folder)
    assert seen["steps"] == [*STEPS, 600]
    first, second = seen["warnings"]
    assert "model000300.safetensors" in first
    assert "model000600.pt" in second
    assert seen["difference_norms"][0] is not None


def test_verify_is_for_packed_trajectories(folder, tmp_path):
    make_trajectory(tmp_path / "t")
    assert inspect(tmp_path / "t", verify=True)["verified"]
    for paths in (folder, sorted(folder.iterdir())):
        with pytest.raises(TrajectoryError, match="trajectory"):
            inspect(paths, verify=True)
