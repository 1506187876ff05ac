"""Opening a study database: SQLite, PostgreSQL, or whatever else SQLAlchemy and Optuna can use.

What a database raises becomes one line that says what to do, with the password hidden.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.errors import StudyStoreError

BUSY_SECONDS = 60.0  # how long SQLite waits for another process's lock
CREATION_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6)  # between attempts to create the tables at the same time as others


def open_storage(url: str, *, write: bool) -> RDBStorage:
    """Open a study database.

    Args:
        url: of SQLAlchemy, such as ``sqlite:///studies.db``.
        write: create it where it is not there yet, and take SQLite's write lock when a transaction begins, so
            that two writers can never deadlock half-way; a reader never takes it.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    parsed = _parse_url(url)
    file = _sqlite_file(parsed)
    if file is not None:
        _check_sqlite_file(file, write=write)
    engine_kwargs: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "sqlite":
        engine_kwargs["connect_args"] = {"timeout": BUSY_SECONDS}
    try:
        storage = _connect(url, engine_kwargs)
    except ImportError as error:
        raise StudyStoreError(f"{masked(url)}: no driver for it: pip install 'lcsc-opt[postgresql]'") from error
    except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise StudyStoreError(f"{masked(url)}: {_first_line(error)}") from error
    if write and parsed.get_backend_name() == "sqlite":
        _begin_immediate(storage.engine)
    return storage


def _connect(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Connect, and make Optuna's tables where they are missing; when others make them at this moment, look again."""
    escaped = url.replace("{", "{{").replace("}", "}}")  # since Optuna formats the URL
    for patience in CREATION_SECONDS:
        try:
            with quiet_optuna():
                return RDBStorage(escaped, engine_kwargs=engine_kwargs)
        except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            if not _is_creation_race(error):
                raise
            time.sleep(patience)
    with quiet_optuna():
        return RDBStorage(escaped, engine_kwargs=engine_kwargs)


def _is_creation_race(error: BaseException) -> bool:
    message = str(error).lower()
    return any(part in message for part in ("already exists", "unique constraint", "duplicate key"))


def _begin_immediate(engine: sa.Engine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions, and begin them with the write lock."""

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the listeners were there


def _parse_url(url: str) -> sa.URL:
    try:
        return sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise StudyStoreError(
            f"storage: expected a database URL such as sqlite:///studies.db, got {masked(url)!r}"
        ) from error


def _sqlite_file(url: sa.URL) -> Path | None:
    in_memory = url.database in (None, "", ":memory:")
    return None if url.get_backend_name() != "sqlite" or in_memory else Path(str(url.database))


def _check_sqlite_file(file: Path, *, write: bool) -> None:
    if file.exists():
        try:
            with file.open("r+b" if write else "rb") as opened:
                head = opened.read(16)
        except OSError as error:
            raise StudyStoreError(f"{file}: {error.strerror}; give another --storage") from error
        if head and head != b"SQLite format 3\x00":
            raise StudyStoreError(f"{file}: is not an SQLite database; give another --storage")
    elif not write:
        raise StudyStoreError(f"{file}: no such database; start a study with `lcsc run`, or give its --storage")
    elif not file.absolute().parent.is_dir():
        raise StudyStoreError(f"{file}: the folder {file.absolute().parent} does not exist")


def masked(url: str) -> str:
    """The URL with its password hidden, fit for messages and logs."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(an unreadable URL)"


def _first_line(error: BaseException) -> str:
    """The cause, without SQL and links."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(getattr(cause, "orig", None) or cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its messages about studies and trials; warnings still show."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def store_errors(storage: RDBStorage) -> Iterator[None]:
    """Turn what a database raises into one line that says what to do."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StudyStoreError(
            f"{masked(storage.url)}: {_first_line(error)}; what was committed is safe, run the same command to continue"
        ) from error
