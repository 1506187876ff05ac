"""Ctrl-C and ``kill -9`` of a real process at any moment: the continued study equals the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

MODULE = """
import time
import numpy as np

def loss(coefficients):
    time.sleep(0.01)
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())
"""

STUDY = {
    "name": "long",
    "objective": {"file": "function.py", "settings": {"callable": "my_losses:loss", "steps": list(range(10, 310, 10))}},
    "optimizers": ["LCSC", "CMA"],
    "budget": {"evaluations": 80},
}
ENOUGH_KILLS = 6


@pytest.fixture
def study_file(workplace: Path) -> Path:
    (workplace / "my_losses.py").write_text(MODULE)
    path = workplace / "long.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def start(database: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from lcsc_opt.cli import main; main()"]
    arguments = ["run", "long.yaml", "--storage", f"sqlite:///{database}"]
    with Path(f"{database}.log").open("a") as log:
        return subprocess.Popen([*command, *arguments], stderr=log)


def trials(database: str) -> dict[str, list[tuple[int, bytes, float | None, TrialState]]]:
    storage = f"sqlite:///{database}"
    found = {}
    for name in ("long/LCSC/0", "long/CMA/0"):
        study = optuna.load_study(study_name=name, storage=storage)
        found[name] = [
            (t.number, np.array(t.user_attrs["coefficients"]).tobytes(), t.value, t.state) for t in study.trials
        ]
    return found


def running(database: str) -> int:
    """How many trials there are, read without Optuna so that polling is quick."""
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def wait_for_trials(process: subprocess.Popen[bytes], database: str, count: int) -> bool:
    """Whether there are so many trials before the process ends."""
    while process.poll() is None:
        if running(database) >= count:
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def undisturbed(study_file: Path) -> dict[str, list[tuple[int, bytes, float | None, TrialState]]]:
    process = start("undisturbed.db")
    assert process.wait(timeout=120) == 0
    found = trials("undisturbed.db")
    assert {len(study) for study in found.values()} == {80}
    return found


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed: object) -> None:
    chance = random.Random(3)
    kills = 0
    while True:
        process = start("killed.db")
        if kills < ENOUGH_KILLS and wait_for_trials(process, "killed.db", running("killed.db") + chance.randint(1, 30)):
            time.sleep(chance.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        elif process.wait(timeout=120) == 0:
            break
    assert kills >= 3
    assert trials("killed.db") == undisturbed
    with sqlite3.connect("killed.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_loses_nothing(undisturbed: object) -> None:
    process = start("interrupted.db")
    assert wait_for_trials(process, "interrupted.db", 40)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    printed = Path("interrupted.db.log").read_text()
    assert "run the same command to continue" in printed
    assert "Traceback" not in printed
    assert start("interrupted.db").wait(timeout=120) == 0
    assert trials("interrupted.db") == undisturbed
