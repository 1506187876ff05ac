"""What is the same for every SQLite file of the tests: Optuna's migration scripts, an empty database, compiled SQL."""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._rdb import models, storage
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

_read, _create_engine, _create_all = (
    storage._VersionManager._create_alembic_script,
    sa.create_engine,
    sa.MetaData.create_all,
)
_known: list[Any] = []
_compiled: dict[Any, Any] = {}


def read_once() -> None:
    """In this process, and in those that are forked from it: a database is opened in a third of the time.

    Only this process copies an empty database: of others that begin at the same time, each creates the tables.
    """
    storage._VersionManager._create_alembic_script = _once  # type: ignore[assignment, method-assign]
    sa.engine.create_engine = _engine  # which Optuna calls
    dialect: Any = SQLiteDialect_pysqlite  # what was compiled for one is good for all
    Insert.excluded = property(lambda insert: _excluded(insert.table))  # type: ignore[assignment]
    dialect.__eq__, dialect.__hash__ = (lambda one, other: type(one) is type(other)), (lambda one: hash(type(one)))


def copy_empty() -> None:
    """A new file is a copy of an empty database."""
    pid, target = os.getpid(), models.BaseModel.metadata

    def create_all(engine: sa.Engine, **options: Any) -> None:
        file = engine.url.database
        if not file or engine.dialect.name != "sqlite" or Path(file).exists() or os.getpid() != pid or not _place(file):
            _create_all(target, engine, **options)

    target.create_all = create_all  # type: ignore[method-assign]


def _place(file: str) -> bool:
    """Whether the empty database is there now, and nobody else's."""
    new = Path(f"{file}.{uuid.uuid4().hex}")
    try:
        new.write_bytes(_empty())
        os.link(new, file)
    except OSError:
        return False
    finally:
        new.unlink(missing_ok=True)
    return True


@functools.cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.db"
        _create_all(models.BaseModel.metadata, engine := _create_engine(f"sqlite:///{file}"))
        engine.dispose()
        RDBStorage(f"sqlite:///{file}").engine.dispose()
        return file.read_bytes()


@functools.cache
def _excluded(table: Any) -> Any:
    """What an insertion would have written; Optuna asks each time that it writes an attribute."""
    return sa.alias(table, name="excluded").columns


def _once(manager: Any) -> Any:
    if not _known:
        _known.append(_read(manager))
    return _known[0]


def _engine(url: Any, **options: Any) -> sa.Engine:
    return _create_engine(url, **options, execution_options={"compiled_cache": _compiled})
