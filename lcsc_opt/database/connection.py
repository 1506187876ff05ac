"""Opening a study database, an SQLite file or PostgreSQL.

After a lost connection, work is tried again for about a minute. Locks of other processes on an SQLite file are waited
for, and a line says so. All other errors of a database become one line that says what to do, without the password.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.database.urls import masked, parse_url, sqlite_file, without_secrets

BUSY_SECONDS = 3.0  # how long SQLite waits for a lock before a line says so
RETRY_SECONDS = (0.1, 1.0, 4.0, 10.0, 20.0, 20.0)  # between attempts; a server needs some seconds to restart
_CREATION_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6)  # between attempts to create the tables at the same time as others

# PostgreSQL: connection lost, rolled back to end a deadlock, too many connections, lock timeout, idle for too long,
# shutdown, crash of another backend, starting up
_TRANSIENT_SQLSTATES = ("08", "40", "53300", "55P03", "25P03", "57P01", "57P02", "57P03")
LOCKED = ("database is locked", "database table is locked")
READ_ONLY = "attempt to write a readonly database"
T = TypeVar("T")


def open_storage(url: str, *, write: bool) -> RDBStorage:
    """Open a study database.

    Args:
        url: of SQLAlchemy, such as ``sqlite:///studies.db`` or ``postgresql://me:p%40ss@host/studies``, with the
            password percent-encoded.
        write: create it where it is not there yet, and take SQLite's write lock when a transaction begins, so
            that two writers can never deadlock half-way; a reader never takes it.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    parsed = parse_url(url)
    file = sqlite_file(parsed)
    if file is not None:
        _check_sqlite_file(file, write=write)
    same = sa.make_url(url).drivername == parsed.drivername  # else the driver was chosen here
    driven = url if same else parsed.render_as_string(hide_password=False)
    how = {"pool_pre_ping": True, "connect_args": _connect_args(parsed)}
    if file is not None and not write:  # a connection that stays would read on in a file that was deleted
        how["poolclass"] = sa.NullPool
    try:
        storage = _when_unlocked(url, lambda: _connect(driven, how))
    except ImportError as error:
        driver = ": pip install 'psycopg[binary]'" if parsed.get_backend_name() == "postgresql" else ""
        raise StudyStoreError(f"{masked(url)}: its driver is not installed{driver}") from error
    except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise StudyStoreError(f"{masked(url)}: {_first_line(error, url)}") from error
    if file is not None and not write:
        sa.event.listen(storage.engine, "do_connect", lambda *_: _check_sqlite_file(file, write=False))
    weakref.finalize(storage, storage.engine.dispose)  # no connection outlives what it was opened for
    sa.event.listen(storage.engine, "handle_error", _past_optuna)
    if write and file is not None:
        _begin_immediate(storage.engine)
    return storage


@contextlib.contextmanager
def reading(url: str) -> Iterator[RDBStorage]:
    """A study database that is open to read; no connection to it stays.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    storage = open_storage(url, write=False)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextlib.contextmanager
def looked_into(url: str) -> Iterator[RDBStorage]:
    """A study database to read; where there is none yet, a temporary empty one.

    So a study that is refused before its search begins leaves no database behind.

    Raises:
        StudyStoreError: one line that says why it cannot be opened, or made.
    """
    file = sqlite_file(parse_url(url))
    if file is not None:
        _check_sqlite_file(file, write=True)
    with tempfile.TemporaryDirectory() as folder:
        if file is not None and not (file.exists() and _holds_studies(file)):
            url = f"sqlite:///{folder}/empty.db"
            open_storage(url, write=True).engine.dispose()
        with reading(url) as storage:
            yield storage


def _connect_args(url: sa.URL) -> dict[str, Any]:
    """The driver's arguments: wait for a lock, but not for ever for a server that is gone. The URL's settings win."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": BUSY_SECONDS}
    if url.drivername not in {"postgresql+psycopg", "postgresql+psycopg2"}:
        return {}
    patience = {"connect_timeout": 10, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    return {name: value for name, value in patience.items() if name not in url.query}


def _connect(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Connect, and create Optuna's missing tables; try again when another process creates them at the same time."""
    escaped = url.replace("{", "{{").replace("}", "}}")  # since Optuna formats the URL
    pauses = iter(_CREATION_SECONDS)
    with quiet_optuna():
        while True:
            try:
                return RDBStorage(escaped, engine_kwargs=dict(engine_kwargs))
            except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
                message, pause = str(error).lower(), next(pauses, None)
                raced = any(part in message for part in ("already exists", "unique constraint", "duplicate key"))
                if not raced or pause is None:
                    raise
            time.sleep(pause)


def _begin_immediate(engine: sa.Engine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions, and begin them with the write lock."""

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the listeners were there


def _past_optuna(context: sa.engine.ExceptionContext) -> None:
    """Take errors of the driver past Optuna, which would try again what may have been committed."""
    error = context.sqlalchemy_exception
    if isinstance(error, sa.exc.DBAPIError) and not (isinstance(error, sa.exc.IntegrityError) or context.is_pre_ping):
        raise ConnectionError(error)


def _check_sqlite_file(file: Path, *, write: bool) -> None:
    folder = file.absolute().parent
    if file.exists():
        try:
            with file.open("r+b" if write else "rb") as opened:
                head = opened.read(16)
        except OSError as error:
            raise StudyStoreError(f"{file}: {error.strerror}; give another --storage") from error
        if head and head != b"SQLite format 3\x00":
            raise StudyStoreError(f"{file}: is not an SQLite database; give another --storage")
        if not write and not _holds_studies(file):
            raise StudyStoreError(f"{file}: holds no studies; start one with `lcsc run`, or give another --storage")
    elif not write:
        raise StudyStoreError(f"{file}: no such database; start a study with `lcsc run`, or give its --storage")
    elif not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise StudyStoreError(f"{file}: the folder {folder} does not exist, or cannot be written")


def _holds_studies(file: Path) -> bool:
    """Whether Optuna's tables are there; a reader must not make them in somebody else's database."""
    wanted = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'studies'"
    try:
        name = f"{file.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(name, uri=True, timeout=0)) as connection:
            return connection.execute(wanted).fetchone() is not None
    except sqlite3.Error:
        return True  # locked, or damaged: opening it says so


def _first_line(error: BaseException, url: str) -> str:
    """The cause, without SQL, links and passwords."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(getattr(cause, "orig", None) or cause).splitlines() if line.strip()]
    return without_secrets(lines[0] if lines else type(cause).__name__, url)


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its messages about studies and trials; warnings still show."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _when_unlocked(url: str, work: Callable[[], T]) -> T:
    """Call ``work``, and call it again as long as another process holds the lock of an SQLite file."""
    said = False
    while True:
        try:
            return work()
        except Exception as error:
            if not _is_locked(error):
                raise
        if not said:
            notice(f"{masked(url)}: is locked by another process; waiting", every_time=True)
        said = True


def _is_locked(error: BaseException | None) -> bool:
    while error is not None:
        if any(text in str(error) for text in LOCKED):
            return True
        error = error.__cause__
    return False


def in_database(storage: RDBStorage, work: Callable[[], T]) -> T:
    """Call ``work``, and call it again after a lost connection or a lock that was not free in time.

    A connection may be lost after a commit, but before its acknowledgement: ``work`` itself must find out whether an
    earlier attempt was committed.

    Raises:
        StudyStoreError: one line that says what to do.
    """
    pauses = iter(RETRY_SECONDS)
    while True:
        try:
            return _when_unlocked(storage.url, work)
        except (ConnectionError, sa.exc.SQLAlchemyError, StorageInternalError) as error:
            problem = f"{masked(storage.url)}: {_first_line(error, storage.url)}"
            pause = next(pauses, None)
            if pause is None or not _is_transient(error):
                advice = "what was committed is safe, run the same command to continue"
                if READ_ONLY in problem:
                    advice = "SQLite writes next to it, too: let this user write its folder, or give another --storage"
                raise StudyStoreError(f"{problem}; {advice}") from error
        notice(f"{problem}; trying again in {pause:g} s", every_time=True)
        time.sleep(pause)


def _is_transient(error: Exception) -> bool:
    """Whether the same work may succeed a moment later: a lost connection, or a server that is starting."""
    found = error.args[0] if isinstance(error, ConnectionError) else error  # see _past_optuna
    if not isinstance(found, sa.exc.DBAPIError):
        return False
    if found.connection_invalidated:
        return True
    state = getattr(found.orig, "sqlstate", getattr(found.orig, "pgcode", ""))
    unreachable_or_passing = state is None or str(state).startswith(_TRANSIENT_SQLSTATES)
    return isinstance(found, sa.exc.OperationalError) and unreachable_or_passing
