"""Ctrl-C and ``kill -9`` of a real process at counted events: the continued study equals the undisturbed one."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from lcsc_opt.cli import run as lcsc
from tests.processes import Ended, Lcsc, lcsc_process

MODULE = """
import os, signal
import numpy as np
import sqlalchemy as sa

NAME, EVENT, AT = os.environ.get("LCSC_TEST_SIGNAL", "SIGINT evaluation 0").split()
seen = 0

def count(*_):
    global seen
    seen += 1
    if seen == int(AT):
        os.kill(os.getpid(), getattr(signal, NAME))

if EVENT not in ("evaluation", "worker"):
    sa.event.listen(sa.Engine, EVENT, count)

def loss(coefficients):
    if EVENT == "evaluation":
        count()
    if EVENT == "worker" and not os.path.exists("killed"):
        open("killed", "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())
"""
EVALUATIONS = 12
STUDY = {
    "name": "long",
    "objective": {
        "file": "function.py",
        "settings": {"callable": "interrupted_losses:loss", "steps": list(range(10, 110, 10))},
    },
    "optimizers": ["LCSC", "CMA"],
    "budget": {"evaluations": EVALUATIONS},
}
SIGNALS = (
    "SIGKILL evaluation 1",
    "SIGINT before_cursor_execute 60",
    "SIGKILL after_cursor_execute 61",
    "SIGINT commit 21",
    "SIGINT commit 28",
    "SIGKILL commit 31",
    "SIGINT evaluation 8",
)
Trials = dict[str, list[tuple[int, list[float], float | None, TrialState]]]


def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "interrupted_losses.py").write_text(MODULE)
    (folder / "long.yaml").write_text(yaml.safe_dump(STUDY))


def run(signal_at: str, *changes: str) -> Ended:
    """A search to which a signal comes at the n-th event of a kind."""
    return lcsc_process("run", "long.yaml", *changes, environment={"LCSC_TEST_SIGNAL": signal_at})


def trials(*optimizers: str) -> Trials:
    found = {}
    for optimizer in optimizers or ("LCSC", "CMA"):
        study = optuna.load_study(study_name=f"long/{optimizer}/0", storage="sqlite:///studies.db")
        found[optimizer] = [(t.number, t.user_attrs["coefficients"], t.value, t.state) for t in study.trials]
    return found


@pytest.mark.slow
def test_a_search_interrupted_again_and_again_ends_as_the_undisturbed_one(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(workplace, monkeypatch)
    assert lcsc(["run", "long.yaml"]) == 0
    undisturbed = trials()
    Path("studies.db").unlink()
    for at in SIGNALS:
        ended, killed = run(at), at.startswith("SIGKILL")
        assert ended.status == (-signal.SIGKILL if killed else 130), at
        assert ("run the same command to continue" in ended.err) is not killed
        assert "Traceback" not in ended.err
    assert run("SIGKILL evaluation 0").status == 0
    assert trials() == undisturbed
    assert {len(study) for study in undisturbed.values()} == {EVALUATIONS}
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_two_commands_at_once_after_a_kill_end_as_one(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(workplace, monkeypatch)
    assert lcsc(["run", "long.yaml"]) == 0
    undisturbed = trials()
    Path("studies.db").unlink()
    assert run("SIGKILL evaluation 9").status == -signal.SIGKILL
    both = [Lcsc("run", "long.yaml") for _ in range(2)]
    assert [running.wait().status for running in both] == [0, 0]
    assert trials() == undisturbed


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_an_attempt_and_nothing_else(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(workplace, monkeypatch)
    changes = ("workers=2", "optimizers=[CMA]")
    assert lcsc(["run", "long.yaml", *changes]) == 0
    undisturbed = trials("CMA")
    Path("studies.db").unlink()
    ended = run("SIGKILL worker 0", *changes)
    assert ended.status == 0, ended.err
    assert Path("killed").exists()
    assert trials("CMA") == undisturbed
