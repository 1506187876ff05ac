"""Deleting a study by its foreign keys: all of it or nothing, and nothing else."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.deleting import BATCH, delete_study
from lcsc_opt.database.store import StoredStudy, our_studies
from tests.processes import forked, wait_until
from tests.study_examples import write_study

NAME = "digits/LCSC/0"
OTHER = "digits/CMA/0"


def rows(storage: RDBStorage) -> dict[str, list[str]]:
    """Everything in Optuna's tables."""
    tables = sa.MetaData()
    with storage.engine.connect() as connection:
        tables.reflect(connection)
        return {table.name: sorted(map(str, connection.execute(sa.select(table)))) for table in tables.sorted_tables}


def write_everything(storage: RDBStorage, name: str) -> int:
    """A study of plain Optuna with rows in each of its tables; its key."""
    study = optuna.create_study(storage=storage, study_name=name)
    key = storage.get_study_id_from_name(name)
    study.set_user_attr("user", 1)
    storage.set_study_system_attr(key, "system", 1)
    for number in range(5):
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        trial.report(1.0, 0)
        trial.set_user_attr("user", 1)
        trial_id = storage.get_trial_id_from_study_id_trial_number(key, number)
        storage.set_trial_system_attr(trial_id, "system", 1)
        storage.record_heartbeat(trial_id)
        study.tell(trial, 1.0)
    return key


def fill(storage: RDBStorage, key: int, count: int) -> None:
    """More trials than are deleted at once."""
    trials = sa.table("trials", *map(sa.column, ("number", "study_id", "state")))
    with storage.engine.begin() as connection:
        connection.execute(
            sa.insert(trials), [{"number": n, "study_id": key, "state": "RUNNING"} for n in range(10, 10 + count)]
        )


def test_nothing_is_left_in_any_of_optunas_tables(any_storage: RDBStorage) -> None:
    """The trials of two studies are interleaved in all tables."""
    write_study(any_storage, OTHER, [3.0, None])
    before = rows(any_storage)
    key = write_everything(any_storage, "plain")
    fill(any_storage, key, BATCH)
    changed = [name for name, content in rows(any_storage).items() if content != before[name]]
    assert len(changed) == 11, "this test is to fill each table that Optuna has for studies"
    delete_study(any_storage, key, "plain")
    assert rows(any_storage) == before


def test_interleaved_trials_of_other_studies_stay(any_storage: RDBStorage) -> None:
    studies = [optuna.create_study(storage=any_storage, study_name=name) for name in ("kept", "deleted")]
    for _ in range(5):
        for study in studies:
            study.tell(study.ask(), 1.0)
    delete_study(any_storage, any_storage.get_study_id_from_name("deleted"), "deleted")
    assert len(studies[0].trials) == 5
    assert [study.study_name for study in any_storage.get_all_studies()] == ["kept"]


def ended_in_the_middle(url: str, how: str) -> None:
    storage = open_storage(url, write=True)

    def end(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM trials"):
            if how == "killed":
                os._exit(9)
            raise KeyboardInterrupt

    sa.event.listen(storage.engine, "after_cursor_execute", end)
    with contextlib.suppress(KeyboardInterrupt):
        StoredStudy.open(storage, NAME).delete()
    sys.exit(7)


@pytest.mark.parametrize(("how", "status"), [("killed", 9), ("interrupted", 7)])
def test_a_deletion_that_is_cut_off_leaves_the_whole_study(any_url: str, how: str, status: int) -> None:
    storage = open_storage(any_url, write=True)
    study = write_study(storage, NAME, [1.0] * 6)
    before = rows(storage)
    process = forked(ended_in_the_middle, any_url, how)
    process.start()
    process.join()
    assert process.exitcode == status
    assert rows(storage) == before
    study.delete()
    assert our_studies(storage) == {}


def test_a_row_that_still_refers_to_a_trial_stops_the_deletion(
    any_storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would leave it, and Optuna would find it with the next trial of the same key."""
    study = write_study(any_storage, NAME, [1.0] * 3)
    before = rows(any_storage)
    reflect = sa.MetaData.reflect

    def without_values(tables: sa.MetaData, *arguments: Any, **options: Any) -> None:
        reflect(tables, *arguments, **options)
        tables.remove(tables.tables["trial_values"])

    with monkeypatch.context() as patched:
        patched.setattr(sa.MetaData, "reflect", without_values)
        with pytest.raises(StudyStoreError, match=r"(?i)foreign key"):
            study.delete()
    assert rows(any_storage) == before


def test_a_study_that_was_deleted_before_is_no_error(any_storage: RDBStorage) -> None:
    study = write_study(any_storage, NAME, [1.0])
    study.delete()
    study.delete()
    other = write_study(any_storage, OTHER, [1.0])
    delete_study(any_storage, other.key, NAME)
    assert list(our_studies(any_storage)) == [OTHER], "the key may be another study's now"


@pytest.mark.usefixtures("impatient")
def test_a_lock_of_another_process_on_the_file_is_waited_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(url, write=True)
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with contextlib.closing(other), ThreadPoolExecutor() as pool:
        found = pool.submit(our_studies, storage)
        wait_until(lambda: "is locked by another process; waiting" in capsys.readouterr().err)
        other.execute("ROLLBACK")
        assert found.result(timeout=60) == {}
