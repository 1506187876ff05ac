from __future__ import annotations

from safetensors.torch import save_file

from lcsc_opt.trajectory import pack
from lcsc_opt.trajectory.inspection import inspect
from tests.trajectory.trajectory_examples import STEPS, state_dict


def test_a_packed_trajectory_is_described(tmp_path):
    for step in STEPS:
        save_file(state_dict(step), tmp_path / f"model{step:06d}.safetensors")
    packed = inspect(pack(tmp_path, tmp_path / "t.trajectory").path, verify=True)
    assert (packed["checkpoints"], packed["steps"], packed["intervals"]) == (5, list(STEPS), [100])
    assert packed["series"] == ["model"]
    assert packed["verified"]
    assert packed["warnings"] == []
