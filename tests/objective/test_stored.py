"""How checkpoints are packed that a study file names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import LcscError, TrajectoryError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.trajectory import Trajectory


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for step in (100, 200, 300):
        generator = torch.Generator().manual_seed(step)
        save_file({"w": torch.randn(50, generator=generator)}, tmp_path / f"model{step}.safetensors")
    return str(tmp_path / "model*.safetensors")


def settings(checkpoints: str, **given: str) -> ImageObjectiveSettings:
    return parse_settings(ImageObjectiveSettings, {"checkpoints": checkpoints, **given}, source="objective.settings")


def opened(checkpoints: str, **given: str) -> Trajectory:
    return settings(checkpoints, **given).trajectory(BuildContext())


def test_study_file_says_how_checkpoints_are_stored(files: str) -> None:
    stored = {dtype: opened(files, stored=dtype) for dtype in ("exact", "float16", "bfloat16")}
    assert [trajectory.stored for trajectory in stored.values()] == [None, "float16", "bfloat16"]
    assert len({trajectory.sha256 for trajectory in stored.values()}) == 3  # so a study knows which it searched
    assert opened(files).path == stored["exact"].path
    packed = str(stored["bfloat16"].path)
    assert opened(packed).stored == opened(packed, stored="bfloat16").stored == "bfloat16"
    with pytest.raises(TrajectoryError, match="was packed with stored 'bfloat16', not 'float16'"):
        opened(packed, stored="float16")
    with pytest.raises(LcscError, match=r"stored.*exact.*bfloat16"):
        settings(files, stored="int4")


def test_a_study_file_names_the_trainers_ema(files: str, tmp_path: Path) -> None:
    average = {"w": torch.full((50,), 2.0)}
    save_file(average, tmp_path / "ema.safetensors")
    for named in ("ema.safetensors", str(tmp_path / "ema.safetensors")):
        found = opened(files, trainer_ema=named).trainer_ema()
        assert found is not None
        assert torch.equal(found["w"], average["w"])
    with pytest.raises(TrajectoryError, match=r"model300\.safetensors has no key 'other'"):
        opened(files, trainer_ema="other").trainer_ema()
    assert opened(files).trainer_ema() is None
