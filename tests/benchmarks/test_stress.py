"""A quick selection of ``make stress``: coordinators killed at random instants, one and four workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEWEST_KILLS = 20


@pytest.mark.slow
def test_coordinators_killed_at_random_instants_lose_and_double_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "stress.py"), "--quick", "--only", "random_kills"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills = [int(count) for count in re.findall(r"\| (\d+) kills: ", done.stdout)]
    assert len(kills) >= 2, done.stdout  # three where there is a PostgreSQL
    assert sum(kills) >= FEWEST_KILLS
