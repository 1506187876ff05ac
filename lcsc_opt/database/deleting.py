"""Deletes a study with everything that belongs to it, in one transaction.

Optuna's own way issues six statements for each trial. This one follows the foreign keys that the database itself names,
and deletes many rows with each statement.
"""

from __future__ import annotations

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.progress import progress

BATCH = 1000  # trials that are deleted between two steps of the progress bar


def delete_study(storage: RDBStorage, study_id: int, name: str) -> None:
    """Delete a study with its trials and attributes, or nothing where it no longer exists.

    All of it is one transaction: whoever is interrupted leaves the whole study. SQLite checks foreign keys meanwhile,
    as PostgreSQL always does. Errors of the database are left to :func:`~lcsc_opt.database.connection.in_database`.

    Args:
        storage: of the study.
        study_id: the database's key of it.
        name: of the study; another one may have its key where an earlier attempt has deleted it.
    """
    with storage.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.detach()  # closed at the end, and these settings with it
            cursor = connection.connection.cursor()  # no transaction has begun
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA secure_delete = FAST")  # some systems overwrite every page that becomes free
        with connection.begin():
            tables = sa.MetaData()
            tables.reflect(connection)
            studies = tables.tables["studies"]
            trials = tables.tables["trials"]
            is_study = (studies.c.study_id == study_id) & (studies.c.study_name == name)
            if connection.scalar(sa.select(studies.c.study_id).where(is_study)) is None:
                return
            of_study = trials.c.study_id == study_id
            query = sa.select(trials.c.trial_id).where(of_study).order_by(trials.c.trial_id)
            trial_ids = list(connection.scalars(query))
            with progress(f"deleting {name}", len(trial_ids)) as advance:
                for first in range(0, len(trial_ids), BATCH):
                    batch = trial_ids[first : first + BATCH]
                    is_in_batch = of_study & trials.c.trial_id.between(batch[0], batch[-1])
                    _delete(connection, tables, trials, is_in_batch)
                    advance(len(batch))
            _delete(connection, tables, studies, is_study)


def _delete(
    connection: sa.Connection, tables: sa.MetaData, table: sa.Table, is_deleted: sa.ColumnElement[bool]
) -> None:
    """Delete these rows of a table, and before them all rows that refer to them, directly or through others."""
    conditions = {table: is_deleted}
    for referring in tables.sorted_tables:  # a table comes after those that it refers to
        references = []
        for key in referring.foreign_keys:
            if key.column.table in conditions:
                referred = sa.select(key.column).where(conditions[key.column.table])
                references.append(key.parent.in_(referred))
        if references:
            conditions[referring] = sa.or_(*references)
    for table_of_rows, condition in reversed(conditions.items()):
        connection.execute(sa.delete(table_of_rows).where(condition))
