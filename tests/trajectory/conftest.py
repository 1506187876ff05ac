from __future__ import annotations

from pathlib import Path

import pytest

from lcsc_opt.trajectory import Trajectory, merge
from tests.trajectory.trajectory_examples import make_trajectory


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "run.trajectory")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that end inside tensors."""
    monkeypatch.setattr(merge, "TILE_BYTES", 1)
