"""Opening a study database: SQLite, PostgreSQL, or whatever else SQLAlchemy and Optuna can use.

After a lost connection, work is tried again for about a minute. Locks of other processes are waited for; after some
seconds a line says who holds them. All other errors of a database become one line that says what to do, without the
password.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.database import locks
from lcsc_opt.database.locks import TRANSIENT_MESSAGES, is_patient, sqlite_file, when_unlocked
from lcsc_opt.database.urls import is_there, masked, parse_url, url_for_driver, without_secrets

BUSY_SECONDS = 3.0  # how long SQLite waits before a notice says who holds the lock
RETRY_SECONDS = (0.1, 1.0, 4.0, 10.0, 20.0, 20.0)  # between attempts; a server needs some seconds to restart
PATIENCE_SECONDS = 60.0  # no attempt begins later than this
CREATION_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6)  # between attempts to create the tables at the same time as others

# PostgreSQL: connection lost, rolled back to end a deadlock, too many connections, lock timeout, idle for too long,
# shutdown, crash of another backend, starting up
TRANSIENT_SQLSTATES = ("08", "40", "53300", "55P03", "25P03", "57P01", "57P02", "57P03")

NETWORK_FILE_SYSTEMS = (
    *("afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "fuse.ceph", "fuse.glusterfs", "glusterfs", "gpfs"),
    *("lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"),
)

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
    try:
        how = {"pool_pre_ping": True, "connect_args": _connect_args(parsed)}
        if file is not None and not write:  # a connection that stays would read on in a file that was deleted
            how["poolclass"] = sa.NullPool
        storage = when_unlocked(url, lambda: _connect(url_for_driver(url, parsed), how))
    except ImportError as error:
        raise StudyStoreError(f"{masked(url)}: no driver for it{_driver_advice(parsed)}") from error
    except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise StudyStoreError(f"{masked(url)}: {_first_line(error, url)}") from error
    if file is not None and not write:
        sa.event.listen(storage.engine, "do_connect", lambda *_: _check_sqlite_file(file, write=False))
    weakref.finalize(storage, storage.engine.dispose)  # no connection outlives what it was opened for
    if write and parsed.get_backend_name() == "sqlite":
        _begin_immediate(storage.engine)
    if write and parsed.get_backend_name() == "postgresql":
        _limit_waiting(storage.engine)
    return storage


@contextlib.contextmanager
def reading(url: str) -> Iterator[RDBStorage]:
    """A study database that is open to read; no connection to it stays.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    with _closing(open_storage(url, write=False)) as storage:
        yield storage


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
        there = file is None or (file.exists() and _holds_studies(file))
        opened = open_storage(url if there else f"sqlite:///{folder}/empty.db", write=not there)
        with _closing(opened) as storage:
            yield storage


@contextlib.contextmanager
def _closing(storage: RDBStorage) -> Iterator[RDBStorage]:
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def open_existing(url: str) -> RDBStorage:
    """Open a study database to change what it holds; a missing one is not created.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    return open_storage(url, write=is_there(url))  # opening to read reports a missing one


def open_even_empty(url: str) -> RDBStorage:
    """Open a study database to read it; a missing SQLite file is created, without studies.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    file = sqlite_file(parse_url(url))
    if file is not None and not file.exists():
        open_storage(url, write=True).engine.dispose()
    return open_storage(url, write=False)


def shrink(url: str) -> bool:
    """Give the space of deleted rows in an SQLite file back to the disk. Returns whether that was possible now."""
    file = sqlite_file(parse_url(url))
    if file is None:
        return True
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("VACUUM")
    except sqlite3.Error:
        return False
    return True


def _connect_args(url: sa.URL) -> dict[str, Any]:
    """The driver's arguments: wait for a lock, but not for ever for a server that is gone. The URL's settings win."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": BUSY_SECONDS}
    if url.drivername not in {"postgresql+psycopg", "postgresql+psycopg2"}:
        return {}
    patience = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return {name: value for name, value in patience.items() if name not in url.query}


def _driver_advice(url: sa.URL) -> str:
    return ": pip install 'psycopg[binary]'" if url.get_backend_name() == "postgresql" else "; install its driver"


def _connect(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Connect, and create Optuna's missing tables; try again when another process creates them at the same time."""
    escaped = url.replace("{", "{{").replace("}", "}}")  # since Optuna formats the URL
    with quiet_optuna():
        return created_once(lambda: RDBStorage(escaped, engine_kwargs=engine_kwargs))


def created_once(create: Callable[[], T]) -> T:
    """Call ``create``, which creates missing tables; again when another process creates them at the same time."""
    for patience in CREATION_SECONDS:
        try:
            return create()
        except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            if not _is_creation_race(error):
                raise
            time.sleep(patience)
    return create()


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

    @sa.event.listens_for(engine, "handle_error")
    def _let_go(context: sa.engine.ExceptionContext) -> None:
        statement = context.execution_context
        if statement is not None and statement.cursor is not None:  # Ctrl-C stopped it: it would keep the lock
            statement.cursor.close()

    engine.dispose()  # connections made before the listeners were there


def _limit_waiting(engine: sa.Engine) -> None:
    """Let PostgreSQL give up waiting for a lock, but end a transaction of a process that hangs before that."""
    milliseconds = int(locks.LOCK_SECONDS * 1000)

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = {milliseconds // 2}")
            cursor.execute(f"SET lock_timeout = {milliseconds}")
        connection.commit()

    engine.dispose()  # connections made before the listener was there


def _check_sqlite_file(file: Path, *, write: bool) -> None:
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
    elif not file.absolute().parent.is_dir():
        raise StudyStoreError(f"{file}: the folder {file.absolute().parent} does not exist")
    elif not os.access(file.absolute().parent, os.W_OK):
        raise StudyStoreError(f"{file}: the folder {file.absolute().parent} cannot be written; give another --storage")
    if write:
        _warn_of_network(file)


def _warn_of_network(file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        kind = network_file_system(file.resolve(), Path("/proc/mounts").read_text(errors="surrogateescape"))
        if kind is not None:
            notice(
                f"{file}: lies on a network file system ({kind}), where SQLite's locks may fail and damage it; "
                "put it on a local disk, or use PostgreSQL"
            )


def network_file_system(path: Path, mounts: str) -> str | None:
    """The kind of network file system that an absolute path lies on; ``None`` for a local one.

    Args:
        path: absolute, links followed.
        mounts: the text of ``/proc/mounts``; of two mounts on one point the later one counts.
    """
    found, kind = Path("/"), ""
    for line in mounts.splitlines():
        _, point, this_kind, *_ = line.split(" ")
        folder = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if path.is_relative_to(folder) and len(folder.parts) >= len(found.parts):
            found, kind = folder, this_kind
    return kind if kind in NETWORK_FILE_SYSTEMS else None


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


def in_database(storage: RDBStorage, work: Callable[[], T]) -> T:
    """Call ``work``, and call it again after a lost connection or a lock that was not free in time.

    A connection may be lost after a commit, but before its acknowledgement: ``work`` itself must find out whether an
    earlier attempt was committed.

    Raises:
        StudyStoreError: one line that says what to do.
    """
    start, pauses = time.monotonic(), iter(RETRY_SECONDS)
    while True:
        try:
            return when_unlocked(storage.url, work, for_ever=lambda: is_patient(storage))
        except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            problem = f"{masked(storage.url)}: {_first_line(error, storage.url)}"
            pause = next(pauses, None)
            if pause is None or time.monotonic() + pause > start + PATIENCE_SECONDS or not is_transient(error):
                advice = "what was committed is safe, run the same command to continue"
                if READ_ONLY in problem:
                    advice = "SQLite writes beside it, too: let this user write its folder, or give another --storage"
                raise StudyStoreError(f"{problem}; {advice}") from error
            notice(f"{problem}; trying again in {pause:g} s", every_time=True)
        time.sleep(pause)


def is_transient(error: BaseException | None) -> bool:
    """Whether the same work may succeed a moment later: a lost connection, a lock, a server that is starting."""
    while error is not None and not isinstance(error, sa.exc.DBAPIError):
        error = error.__cause__
    if error is None:
        return False
    if error.connection_invalidated:
        return True
    if not isinstance(error, sa.exc.OperationalError):
        return False
    state = getattr(error.orig, "sqlstate", getattr(error.orig, "pgcode", ""))
    if state is None:  # of PostgreSQL's client: the server cannot be reached
        return True
    return str(state).startswith(TRANSIENT_SQLSTATES) or any(part in str(error.orig) for part in TRANSIENT_MESSAGES)
