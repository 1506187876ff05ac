"""A quick selection of ``make stress``: a coordinator killed before, in and after counted commits."""

from __future__ import annotations

import re
from pathlib import Path

from tests.processes import script_process

STRESS = Path(__file__).parents[2] / "benchmarks" / "stress.py"


def test_a_coordinator_killed_around_its_commits_loses_and_doubles_nothing(workplace: Path) -> None:
    done = script_process(STRESS, "--quick", "--only", "commit_points")
    assert done.status == 0, done.out[-3000:] + done.err[-3000:]
    (kills,) = re.findall(r"\| (\d+) kills in a study", done.out)
    assert int(kills) >= 4
