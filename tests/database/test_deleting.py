"""Deleting a study: all of it or nothing, and nothing else."""

from __future__ import annotations

import os

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from tests.processes import forked
from tests.study_examples import write_study

NAME = "digits/LCSC/0"
OTHER = "digits/CMA/0"


def rows(storage: RDBStorage) -> dict[str, list[str]]:
    """Everything in Optuna's tables."""
    tables = sa.MetaData()
    with storage.engine.connect() as connection:
        tables.reflect(connection)
        return {table.name: sorted(map(str, connection.execute(sa.select(table)))) for table in tables.sorted_tables}


def test_nothing_is_left_of_it_and_other_studies_stay(any_storage: RDBStorage) -> None:
    write_study(any_storage, OTHER, [3.0, None])
    before = rows(any_storage)
    study = write_study(any_storage, NAME, [3.0, None, 2.0])
    assert rows(any_storage) != before
    study.delete()
    assert rows(any_storage) == before
    write_study(any_storage, "digits/DE/0", [1.0])
    with_another = rows(any_storage)
    study.delete()
    assert rows(any_storage) == with_another, "which may have its key"


def _killed_before_the_commit(url: str) -> None:
    storage = open_storage(url, write=True)
    study = StoredStudy.open(storage, NAME)
    sa.event.listen(storage.engine, "commit", lambda _: os._exit(9))
    study.delete()


def test_a_killed_deletion_leaves_the_whole_study(any_url: str) -> None:
    storage = open_storage(any_url, write=True)
    study = write_study(storage, NAME, [1.0] * 6)
    before = rows(storage)
    process = forked(_killed_before_the_commit, any_url)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert rows(storage) == before
    study.delete()
    assert read_contents(storage).studies == {}
