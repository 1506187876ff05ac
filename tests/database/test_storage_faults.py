"""What may go wrong with a database file while a search runs, and what nobody may notice afterwards."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import yaml

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.store import StoredStudy
from tests.processes import lcsc_process, wait_until
from tests.study.test_loop import trials_of
from tests.study_examples import write_study

ONE = Candidate(np.array([0.5, 0.5]))


@pytest.mark.usefixtures("impatient")
def test_reads_and_writes_wait_for_a_lock_of_another_process_and_are_done_once(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(open_storage(url, write=True), "digits/LCSC/0", [], ended=False)
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    work: list[Callable[[], Any]] = [
        study.trials,
        lambda: study.add_candidate(ONE),
        lambda: study.finish(0, Evaluation(1.0)),
    ]
    with contextlib.closing(other), ThreadPoolExecutor(max_workers=1) as pool:
        for step in work:
            other.execute("BEGIN IMMEDIATE")
            done = pool.submit(step)
            wait_until(lambda: "is locked by another process; waiting" in capsys.readouterr().err)
            other.execute("ROLLBACK")
            done.result(timeout=60)
    assert [(trial.number, trial.value) for trial in study.trials()] == [(0, 1.0)]


MODULE = """
import os
import numpy as np
from pathlib import Path

calls = 0

def loss(coefficients):
    global calls
    calls += 1
    if calls == 10 and "FILL" in os.environ:
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
        "settings": {"callable": "losses_that_fill:loss", "steps": list(range(10, 160, 10))},
    },
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 20},
}


def test_a_full_disk_ends_the_run_cleanly_and_it_continues_when_there_is_room(
    workplace: Path, small_disk: Path
) -> None:
    (workplace / "losses_that_fill.py").write_text(MODULE)
    (workplace / "full.yaml").write_text(yaml.safe_dump(STUDY))
    filler, file = small_disk / "filler", small_disk / "studies.db"
    places = (file, workplace / "clean.db")
    failed = lcsc_process("run", "full.yaml", "--storage", str(file), environment={"FILL": str(filler)})
    assert failed.status == 2
    assert "database or disk is full" in failed.err
    assert "run the same command to continue" in failed.err
    assert "Traceback" not in failed.err
    filler.unlink()
    for place in places:
        assert lcsc(["run", "full.yaml", "--storage", str(place)]) == 0
    found, expected = (
        trials_of(StoredStudy.open(open_storage(f"sqlite:///{place}", write=False), "full/LCSC/0")) for place in places
    )
    assert len(found) == 20
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
