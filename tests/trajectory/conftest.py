from __future__ import annotations

from pathlib import Path

import pytest

from lcsc_opt.trajectory import Trajectory
from tests.trajectory.trajectory_examples import make_trajectory


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "run.trajectory")
