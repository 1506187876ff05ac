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
from tests.processes import Ended, lcsc_process

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

if EVENT != "evaluation":
    sa.event.listen(sa.Engine, EVENT, count)

def loss(coefficients):
    if EVENT == "evaluation":
        count()
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())
"""
EVALUATIONS = 20
STUDY = {
    "name": "long",
    "objective": {
        "file": "function.py",
        "settings": {"callable": "interrupted_losses:loss", "steps": list(range(10, 310, 10))},
    },
    "optimizers": ["LCSC", "CMA"],
    "budget": {"evaluations": EVALUATIONS},
}
KILLS = (
    "evaluation 1",
    "before_cursor_execute 60",
    "after_cursor_execute 61",
    "commit 30",
    "commit 31",
    "evaluation 12",
)
Trials = dict[str, list[tuple[int, list[float], float | None, TrialState]]]


def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "interrupted_losses.py").write_text(MODULE)
    (folder / "long.yaml").write_text(yaml.safe_dump(STUDY))


def run(signal_at: str) -> Ended:
    """A search to which a signal comes at the n-th event of a kind."""
    return lcsc_process("run", "long.yaml", environment={"LCSC_TEST_SIGNAL": signal_at})


def trials() -> Trials:
    names, storage = ("long/LCSC/0", "long/CMA/0"), "sqlite:///studies.db"
    return {
        name: [(t.number, t.user_attrs["coefficients"], t.value, t.state) for t in study.trials]
        for name in names
        for study in [optuna.load_study(study_name=name, storage=storage)]
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    with pytest.MonkeyPatch.context() as patch:
        place(tmp_path_factory.mktemp("undisturbed"), patch)
        assert lcsc(["run", "long.yaml"]) == 0
        found = trials()
    assert {len(study) for study in found.values()} == {EVALUATIONS}
    return found


def test_a_search_killed_again_and_again_ends_as_the_undisturbed_one(
    undisturbed: Trials, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(workplace, monkeypatch)
    for at in KILLS:
        assert run(f"SIGKILL {at}").status == -signal.SIGKILL, at
    assert run("SIGKILL evaluation 0").status == 0
    assert trials() == undisturbed
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_ctrl_c_says_how_to_continue_and_loses_nothing(
    undisturbed: Trials, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(workplace, monkeypatch)
    for at in ("before_cursor_execute 50", "commit 25", "evaluation 15"):
        ended = run(f"SIGINT {at}")
        assert ended.status == 130, at
        assert "run the same command to continue" in ended.err
        assert "Traceback" not in ended.err
    assert run("SIGINT evaluation 0").status == 0
    assert trials() == undisturbed
