"""A quick selection of ``make stress``: a coordinator killed before, in and after counted commits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEWEST_KILLS = 7


def test_a_coordinator_killed_around_its_commits_loses_and_doubles_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "stress.py"), "--quick", "--only", "commit_points"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (kills,) = re.findall(r"\| (\d+) kills, 0 lost, 0 doubled", done.stdout)
    assert int(kills) >= FEWEST_KILLS
