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
from tests.processes import Lcsc, lcsc_process

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
    "SIGKILL commit 31",
    "SIGINT evaluation 8",
)
Trials = dict[str, list[tuple[int, list[float], float | None, TrialState]]]


@pytest.fixture(autouse=True)
def place(workplace: Path) -> None:
    (workplace / "interrupted_losses.py").write_text(MODULE)
    (workplace / "long.yaml").write_text(yaml.safe_dump(STUDY))


def trials() -> Trials:
    storage = optuna.storages.RDBStorage("sqlite:///studies.db")
    return {
        study.study_name: [(t.number, t.user_attrs["coefficients"], t.value, t.state) for t in study.trials]
        for study in (
            optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)
        )
        if study.trials
    }


def undisturbed(*changes: str) -> Trials:
    """The trials of a search in this process, whose database is removed."""
    assert lcsc(["run", "long.yaml", *changes]) == 0
    found = trials()
    Path("studies.db").unlink()
    return found


@pytest.mark.slow
def test_a_search_interrupted_again_and_again_and_continued_by_two_commands_at_once_ends_as_the_undisturbed_one() -> (
    None
):
    clean = undisturbed()
    for at in SIGNALS:
        ended = lcsc_process("run", "long.yaml", environment={"LCSC_TEST_SIGNAL": at})
        killed = at.startswith("SIGKILL")
        assert ended.status == (-signal.SIGKILL if killed else 130), at
        assert ("run the same command to continue" in ended.err) is not killed
        assert "Traceback" not in ended.err
    both = [Lcsc("run", "long.yaml") for _ in range(2)]
    assert [running.wait().status for running in both] == [0, 0]
    assert trials() == clean
    searches = [found for name, found in clean.items() if "/" in name]
    assert [len(found) for found in searches] == [EVALUATIONS, EVALUATIONS]
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_an_attempt_and_nothing_else() -> None:
    clean = undisturbed("workers=2", "optimizers=[CMA]")
    ended = lcsc_process(
        "run", "long.yaml", "workers=2", "optimizers=[CMA]", environment={"LCSC_TEST_SIGNAL": "SIGKILL worker 0"}
    )
    assert ended.status == 0, ended.err
    assert Path("killed").exists()
    assert trials() == clean
