"""Opening a study database, an SQLite file or PostgreSQL.

After a lost connection, work is tried again for about a minute. Locks of other processes on an SQLite file are waited
for, with a notice. All other errors of a database become one line that says what to do, without the password.
"""

from __future__ import annotations

import contextlib
import os
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
from lcsc_opt.base.paths import from_here
from lcsc_opt.base.progress import notice
from lcsc_opt.database.urls import is_there, masked, parse_url, sqlite_file, without_secrets

BUSY_SECONDS = 3.0  # how long SQLite waits for a lock before a notice
_FIRST_TABLE = "version_info"  # that Optuna looks for
_TABLE_OF_STUDIES = "studies"  # that Optuna creates first; another program may have one, too
RETRY_SECONDS = (0.1, 1.0, 4.0, 10.0, 20.0, 20.0)  # between attempts; a server needs some seconds to restart
_CREATION_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6)  # between attempts to create the tables at the same time as others

_TRANSIENT_SQLSTATES = (
    "08",  # connection lost
    "40",  # rolled back to end a deadlock
    "53300",  # too many connections
    "55P03",  # lock timeout
    "25P03",  # idle for too long
    "57P01",  # shutdown
    "57P02",  # crash of another backend
    "57P03",  # starting up
)
LOCKED = ("database is locked", "database table is locked")
_TABLE_EXISTS = ("already exists", "unique constraint", "duplicate key")  # of SQLite or PostgreSQL
T = TypeVar("T")


def open_storage(url: str, *, write: bool) -> RDBStorage:
    """Open a study database.

    Args:
        url: of SQLAlchemy, such as ``sqlite:///studies.db`` or ``postgresql://me:p%40ss@host/studies``, with the
            password percent-encoded.
        write: create a missing database, and take SQLite's write lock when a transaction begins, so that two writers
            can never deadlock half-way; a reader never takes it.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    parsed = parse_url(url)
    file = sqlite_file(parsed)
    url_with_driver = url  # as it was given: rendering percent-encodes the name of an SQLite file
    if sa.make_url(url).drivername != parsed.drivername:  # an installed driver was chosen
        url_with_driver = parsed.render_as_string(hide_password=False)
    engine_kwargs: dict[str, Any] = {"pool_pre_ping": True, "connect_args": _connect_args(parsed)}
    if file is not None and not write:
        _check_is_there(file)
        engine_kwargs["poolclass"] = sa.NullPool  # a connection that stays would read on in a deleted file
    try:
        storage = _when_unlocked(url, lambda: _connect(url_with_driver, engine_kwargs, write=write))
    except ImportError as error:
        advice = ""
        if parsed.get_backend_name() == "postgresql":
            advice = ": pip install 'psycopg[binary]'"
        raise StudyStoreError(f"{masked(url)}: its driver is not installed{advice}") from error
    except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        # Optuna raises RuntimeError for the tables of another version
        problem = _first_line(error, url)
        if _FIRST_TABLE in problem:
            problem = "holds no studies; start one with `lcsc run`, or give another --storage"
        raise StudyStoreError(f"{masked(url)}: {problem}") from error
    if file is not None and not write:
        sa.event.listen(storage.engine, "do_connect", lambda *_: _check_is_there(file))  # it may be deleted later
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


def open_existing(url: str) -> RDBStorage | None:
    """Open a study database to write; ``None`` if it is a file that does not exist yet.

    So a study that is refused before its search begins leaves no file behind. A server is always opened, and gets
    Optuna's tables.

    Raises:
        StudyStoreError: one line that says why it cannot be opened, or created.
    """
    if is_there(url):
        return open_storage(url, write=True)
    file = Path(str(parse_url(url).database))
    folder = file.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise StudyStoreError(
            f"{from_here(file)}: its folder does not exist, or cannot be written; give another --storage"
        )
    return None


def _connect_args(url: sa.URL) -> dict[str, Any]:
    """The driver's arguments: wait for a lock, but not forever for a server that is gone. The URL's settings win."""
    defaults: dict[str, Any] = {"timeout": BUSY_SECONDS}
    if url.get_backend_name() == "postgresql":
        defaults = {"connect_timeout": 10, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    return {name: value for name, value in defaults.items() if name not in url.query}


def _connect(url: str, engine_kwargs: dict[str, Any], *, write: bool) -> RDBStorage:
    """Connect; who writes creates Optuna's missing tables, again when another process creates them at the same time.

    Raises:
        StudyStoreError: the tables that are there are another program's.
    """
    if write:  # asked with an engine of our own: Optuna's storage creates its tables at once
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=engine_kwargs["connect_args"])
        if not _may_be_ours(engine):
            raise StudyStoreError(f"{masked(url)}: holds the tables of another program; give another --storage")
    escaped = url.replace("{", "{{").replace("}", "}}")  # since Optuna formats the URL
    with quiet_optuna():
        for pause in _CREATION_SECONDS:
            try:
                return RDBStorage(escaped, engine_kwargs=engine_kwargs, skip_table_creation=not write)
            except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
                message = str(error).lower()
                if not any(part in message for part in _TABLE_EXISTS):
                    raise
            time.sleep(pause)
        # the last attempt, whose error is raised whatever it is
        return RDBStorage(escaped, engine_kwargs=engine_kwargs, skip_table_creation=not write)


def _may_be_ours(engine: sa.Engine) -> bool:
    """Whether a database is empty or has Optuna's tables, perhaps not all of them yet.

    Another program may have a table of studies, too, but hardly one with Optuna's column.
    """
    inspector = sa.inspect(engine)
    tables = inspector.get_table_names()
    if _TABLE_OF_STUDIES not in tables:
        return not tables
    return any(column["name"] == "study_name" for column in inspector.get_columns(_TABLE_OF_STUDIES))


def _begin_immediate(engine: sa.Engine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions, and begin them with the write lock.

    A transaction that reads first may be refused the lock later, at once and without waiting, if another one has it.
    """

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the listeners were added


def _past_optuna(context: sa.engine.ExceptionContext) -> None:
    """Take errors of the driver past Optuna, which would try again what may have been committed.

    They become a ``ConnectionError``, since Optuna catches all errors of SQLAlchemy.
    """
    error = context.sqlalchemy_exception
    # Optuna handles the first, as of a name that is taken; the pool connects again after the second
    if isinstance(error, sa.exc.IntegrityError) or context.is_pre_ping:
        return
    if isinstance(error, sa.exc.DBAPIError):
        raise ConnectionError(error)


def _check_is_there(file: Path) -> None:
    """Refuse a missing file, which SQLite would make."""
    if not file.exists():
        raise StudyStoreError(
            f"{from_here(file)}: no such database; start a study with `lcsc run`, or give its --storage"
        )


def _first_line(error: BaseException, url: str) -> str:
    """The first line of what the driver says: SQL and links are on the next ones. Passwords are hidden."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = str(getattr(cause, "orig", None) or cause)
    for line in message.splitlines():
        if line.strip():
            return without_secrets(line, url)
    return type(cause).__name__


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
    """Call ``work``, and call it again after a lost connection or a lock that was not free in time, with a notice.

    A connection may be lost after a commit, but before its acknowledgement: ``work`` itself must find out whether an
    earlier attempt was committed.

    Raises:
        StudyStoreError: one line that says what to do. What ``work`` raises for another reason is raised as it is.
    """
    pauses = iter(RETRY_SECONDS)
    while True:
        try:
            return _when_unlocked(storage.url, work)
        except KeyboardInterrupt:  # in a commit, it leaves the connection in its transaction, which nobody could end
            storage.remove_session()
            storage.engine.dispose()
            raise
        except (ConnectionError, sa.exc.SQLAlchemyError, StorageInternalError) as error:
            problem = f"{masked(storage.url)}: {_first_line(error, storage.url)}"
            pause = next(pauses, None)
            if pause is None or not _is_transient(error):
                advice = "what was committed is safe, run the same command to continue"
                raise StudyStoreError(f"{problem}; {advice}") from error
        notice(f"{problem}; trying again in {pause:g} s", every_time=True)
        time.sleep(pause)


@contextlib.contextmanager
def one_transaction(storage: RDBStorage) -> Iterator[None]:
    """What Optuna writes in this thread while this is open is committed together at the end, or not at all.

    Each of Optuna's calls commits its session. Here the session belongs to a transaction of ours, which its commits
    leave open (SQLAlchemy: "joining a session into an external transaction").
    """
    storage.remove_session()  # a session that is there already takes no other connection
    with storage.engine.begin() as connection:
        storage.scoped_session(bind=connection, join_transaction_mode="rollback_only")
        try:
            yield
        finally:
            storage.remove_session()


def _when_unlocked(url: str, work: Callable[[], T]) -> T:
    """Call ``work``, and again as long as another process locks an SQLite file, for which each call waits by itself."""
    is_announced = False
    while True:
        try:
            return work()
        except Exception as error:
            if not _is_locked(error):
                raise
        if not is_announced:
            notice(f"{masked(url)}: is locked by another process; waiting", every_time=True)
        is_announced = True


def _is_locked(error: BaseException | None) -> bool:
    """Whether another process locks an SQLite file, by the error or any of its causes."""
    while error is not None:
        if any(text in str(error) for text in LOCKED):
            return True
        error = error.__cause__
    return False


def _is_transient(error: Exception) -> bool:
    """Whether the same work may succeed a moment later: a lost connection, or a server that is starting."""
    cause = error
    if isinstance(error, ConnectionError):
        cause = error.args[0]  # see _past_optuna
    if not isinstance(cause, sa.exc.DBAPIError):
        return False
    if cause.connection_invalidated:
        return True
    if not isinstance(cause, sa.exc.OperationalError):
        return False
    sqlstate = getattr(cause.orig, "sqlstate", getattr(cause.orig, "pgcode", ""))  # of psycopg and psycopg2 alone
    if sqlstate is None:  # the server could not be reached
        return True
    return str(sqlstate).startswith(_TRANSIENT_SQLSTATES)
