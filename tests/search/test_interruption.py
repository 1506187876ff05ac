"""Ctrl-C and ``kill -9`` of a real process at any moment: the continued study equals the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

MODULE = """
import os, signal, sys, threading
import numpy as np

NAME, AT, SECONDS = os.environ.get("LCSC_TEST_SIGNAL", "SIGINT 0 0").split()
calls = 0

def loss(coefficients):
    global calls
    calls += 1
    if calls == int(AT):  # so many seconds later, at whatever the process then does; evaluations wait for it
        send = threading.Timer(float(SECONDS), os.kill, (os.getpid(), getattr(signal, NAME)))
        send.start()
    if int(AT) and calls >= int(AT) + 10:
        send.join()
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())
"""

STUDY = {
    "name": "long",
    "objective": {"file": "function.py", "settings": {"callable": "my_losses:loss", "steps": list(range(10, 310, 10))}},
    "optimizers": ["LCSC", "CMA"],
    "budget": {"evaluations": 80},
}
KILLS = 4


@pytest.fixture
def study_file(workplace: Path) -> Path:
    (workplace / "my_losses.py").write_text(MODULE)
    path = workplace / "long.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def run(database: str, signal_at: str = "SIGINT 0 0") -> int:
    """The exit status of a search to which a signal comes some seconds after it began its n-th evaluation."""
    command = [sys.executable, "-c", "from lcsc_opt.cli import main; main()"]
    arguments = ["run", "long.yaml", "--storage", f"sqlite:///{database}"]
    environment = {**os.environ, "LCSC_TEST_SIGNAL": signal_at}
    with Path(f"{database}.log").open("a") as log:
        return subprocess.run([*command, *arguments], stderr=log, env=environment, check=False).returncode


def trials(database: str) -> dict[str, list[tuple[int, bytes, float | None, TrialState]]]:
    storage = f"sqlite:///{database}"
    found = {}
    for name in ("long/LCSC/0", "long/CMA/0"):
        study = optuna.load_study(study_name=name, storage=storage)
        found[name] = [
            (t.number, np.array(t.user_attrs["coefficients"]).tobytes(), t.value, t.state) for t in study.trials
        ]
    return found


@pytest.fixture
def undisturbed(study_file: Path) -> dict[str, list[tuple[int, bytes, float | None, TrialState]]]:
    assert run("undisturbed.db") == 0
    found = trials("undisturbed.db")
    assert {len(study) for study in found.values()} == {80}
    return found


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed: object) -> None:
    chance = random.Random(3)
    for _ in range(KILLS):
        status = run("killed.db", f"SIGKILL {chance.randint(1, 20)} {chance.random() * 0.02}")
        assert status == -signal.SIGKILL
    assert run("killed.db") == 0
    assert trials("killed.db") == undisturbed
    with sqlite3.connect("killed.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_loses_nothing(undisturbed: object) -> None:
    assert run("interrupted.db", "SIGINT 40 0") == 130
    printed = Path("interrupted.db.log").read_text()
    assert "run the same command to continue" in printed
    assert "Traceback" not in printed
    assert run("interrupted.db") == 0
    assert trials("interrupted.db") == undisturbed
