"""What may go wrong with a database file while a search runs, and what nobody may notice afterwards."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import yaml

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from tests.processes import lcsc_process, wait_until
from tests.study.test_loop import open_study, run, trials_of

STEPS = tuple(range(100, 2100, 100))
ONE = Candidate(np.array([0.5, 0.5]))


@pytest.fixture
def clean(tmp_path: Path, objective: Objective) -> list[Any]:
    study = open_study(f"sqlite:///{tmp_path / 'clean.db'}")
    run(study, objective)
    return trials_of(study)


HOLD_THE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=300)
sys.stdin.readline()
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


@pytest.mark.usefixtures("impatient")
def test_a_write_lock_held_by_another_process_during_a_run_is_waited_for(
    url: str, objective: Objective, clean: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_study(url)
    command = [sys.executable, "-c", HOLD_THE_LOCK, url.removeprefix("sqlite:///")]
    calls = 0
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other, ThreadPoolExecutor() as pool:
        assert other.stdin is not None
        assert other.stdout is not None

        def locked(coefficients: np.ndarray) -> float:
            nonlocal calls
            calls += 1
            if calls == 10:
                print(file=other.stdin, flush=True)
                assert other.stdout.readline() == "held\n"
                pool.submit(release)
            return objective(coefficients)

        def release() -> None:
            wait_until(lambda: "is locked by another process; waiting" in capsys.readouterr().err)
            print(file=other.stdin, flush=True)

        try:
            with study.hold():
                run(study, CoefficientFunction(locked, STEPS, name="locked"))
            assert other.wait(timeout=120) == 0
        finally:
            other.kill()
    assert trials_of(study) == clean


MODULE = """
import os
import numpy as np
from pathlib import Path

calls = 0

def loss(coefficients):
    global calls
    calls += 1
    if calls == 25 and "FILL" in os.environ:
        with open(os.environ["FILL"], "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())
"""

STUDY = {
    "name": "full",
    "objective": {
        "file": "function.py",
        "settings": {"callable": "losses_that_fill:loss", "steps": list(range(10, 310, 10))},
    },
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 60},
}


def test_a_full_disk_ends_the_run_cleanly_and_it_continues_when_there_is_room(
    workplace: Path, small_disk: Path
) -> None:
    (workplace / "losses_that_fill.py").write_text(MODULE)
    (workplace / "full.yaml").write_text(yaml.safe_dump(STUDY))
    filler, file = small_disk / "filler", small_disk / "studies.db"
    command = ["run", "full.yaml", "--storage", f"sqlite:///{file}"]
    failed = lcsc_process(*command, environment={"FILL": str(filler)})
    assert failed.status == 2
    assert "database or disk is full" in failed.err
    assert "run the same command to continue" in failed.err
    assert "Traceback" not in failed.err
    filler.unlink()
    assert lcsc_process(*command).status == 0
    assert lcsc(["run", "full.yaml", "--storage", f"sqlite:///{workplace / 'clean.db'}"]) == 0
    found, expected = (
        trials_of(StoredStudy.open(open_storage(f"sqlite:///{path}", write=False), "full/LCSC/0"))
        for path in (file, workplace / "clean.db")
    )
    assert len(found) == 60
    assert found == expected
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


LOCKED = sa.exc.OperationalError("INSERT", None, sqlite3.OperationalError("database is locked"))
LOST = sa.exc.OperationalError("INSERT", None, sqlite3.OperationalError("it is gone"), connection_invalidated=True)
FULL = sa.exc.OperationalError("INSERT", None, sqlite3.OperationalError("database or disk is full"))


def attempts_of(storage: optuna.storages.RDBStorage, error: Exception, *, failures: int) -> int:
    """How often it is tried; negative if it never succeeds."""
    attempts = 0

    def work() -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= failures:
            raise error

    try:
        in_database(storage, work)
    except StudyStoreError:
        return -attempts
    return attempts


@pytest.mark.usefixtures("impatient")
def test_what_passes_is_tried_again_and_what_stays_is_not(storage: optuna.storages.RDBStorage, capfd: Any) -> None:
    assert attempts_of(storage, LOST, failures=2) == 3
    assert attempts_of(storage, LOCKED, failures=40) == 41
    assert "it is gone; trying again" in capfd.readouterr().err
    assert attempts_of(storage, LOST, failures=100) == -6
    assert attempts_of(storage, FULL, failures=1) == -1
    assert attempts_of(storage, StudyStoreError("another process"), failures=1) == -1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("sqlstate", "transient"),
    [(None, True), ("57P01", True), ("55P03", True), ("40P01", True), ("08006", True), ("53100", False)],
)
def test_errors_of_postgresql_are_told_apart_by_their_code(
    storage: optuna.storages.RDBStorage, sqlstate: str | None, transient: bool
) -> None:
    from_server = RuntimeError("from the server")
    from_server.sqlstate = sqlstate  # type: ignore[attr-defined]
    error = sa.exc.OperationalError("COMMIT", None, from_server)
    assert attempts_of(storage, error, failures=1) == (2 if transient else -1)
