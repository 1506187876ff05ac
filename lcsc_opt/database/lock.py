"""One coordinator per study: a lock that the system frees when its holder ends.

SQLite: an exclusive lock on a file next to the database. PostgreSQL: an advisory lock of one connection; TCP keepalives
free it about ten seconds after the holder's machine has vanished. A process that is stopped keeps the lock.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.files import LockedFile, try_lock
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.names import HOLDER
from lcsc_opt.database.urls import sqlite_file

RETAKE_SECONDS = 30.0  # until a server has noticed that a connection is lost
WAIT_SECONDS = 2.0  # whoever asks whether a study runs holds its lock for a moment; a server frees one after a moment
_POLL_SECONDS = 0.1
_SESSION_SETTINGS = {
    "tcp_keepalives_idle": 5,  # seconds
    "tcp_keepalives_interval": 2,
    "tcp_keepalives_count": 3,
    "idle_session_timeout": 0,  # none: this connection does nothing but hold the lock
}
# of the locks on one bigint (objsubid 1), those of this database: another one may have studies of the same names
_HELD_LOCKS = (
    "SELECT classid, objid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class _FileLock:
    """``take`` returns whether the lock was free; ``is_held`` whether it still is this object's.

    ``take`` raises StudyStoreError where the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: LockedFile | None = None

    def take(self) -> bool:
        self.free()  # a lock that was lost, since somebody removed its file
        try:
            self._lock = try_lock(self._path)
        except OSError as error:
            raise StudyStoreError(
                f"{self._path}: {error.strerror or error}; a search locks its study with this file beside the "
                "database: let this user write it, or give another --storage"
            ) from error
        return self._lock is not None

    def is_held(self) -> bool:
        return self._lock is not None and self._lock.is_in_place

    def free(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class _AdvisoryLock:
    """The same in a server; a lost connection loses the lock.

    ``take`` raises errors of the connection, which :func:`~lcsc_opt.database.connection.in_database` handles.
    """

    def __init__(self, engine: sa.Engine, study: str) -> None:
        self._engine = engine
        self._key = _key(study)
        self._connection: sa.Connection | None = None

    def take(self) -> bool:
        self.free()  # of a lost connection
        # else it would stay in a transaction as long as the search runs, and servers may end such a connection
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._connection = connection
        for name, value in _SESSION_SETTINGS.items():
            connection.exec_driver_sql(f"SET {name} = {value}")
        if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(self._key))):
            return True
        self.free()
        return False

    def is_held(self) -> bool:
        if self._connection is None:
            return False
        try:
            return self._connection.scalar(sa.select(1)) == 1
        except (ConnectionError, sa.exc.SQLAlchemyError):
            return False

    def free(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(ConnectionError, sa.exc.SQLAlchemyError):
                self._connection.invalidate()  # closes it, which frees the lock whatever state it is in
                self._connection.close()
            self._connection = None


class Coordinator:
    """The process that runs a study: it holds the lock, and the study's attribute ``holder`` names it."""

    def __init__(self, storage: RDBStorage, study: str, study_id: int) -> None:
        self._storage = storage
        self._study = study
        self._study_id = study_id
        self._lock = lock_of(storage, study)
        self._me = {"host": platform.node(), "process": os.getpid(), "since": time.time()}

    def take(self) -> None:
        """Take the lock.

        Raises:
            StudyStoreError: within seconds; the message says who holds it.
        """
        if not self._take(WAIT_SECONDS):
            raise StudyStoreError(f"{self._study}: is being run {self._described_holder()}; wait for it, or end it")

    def begin(self) -> None:
        """Take the lock, and write to the database who holds it. Raises as :meth:`take`."""
        self.take()
        in_database(self._storage, lambda: self._storage.set_study_user_attr(self._study_id, HOLDER, self._me))

    def _described_holder(self) -> str:
        holder = in_database(self._storage, self._stored_holder)
        if holder is None:  # it has taken the lock and not written its name yet
            return "by another process"
        since = datetime.datetime.fromtimestamp(holder["since"])
        return f"on {holder['host']} by process {holder['process']} since {since:%Y-%m-%d %H:%M}"

    def check(self) -> None:
        """Take a lock again that was lost, with its connection or its file, unless somebody ran the study meanwhile.

        Raises:
            StudyStoreError: somebody did.
        """
        if self._lock.is_held():
            return
        if not self._take(RETAKE_SECONDS) or self._stored_holder() != self._me:
            self._lock.free()
            raise StudyStoreError(f"{self._study}: another process runs this study; nothing more was written from here")

    def _take(self, seconds: float) -> bool:
        """Whether the lock could be taken within so many seconds."""
        deadline = time.monotonic() + seconds
        while not in_database(self._storage, self._lock.take):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def end(self) -> None:
        """Give the lock up."""
        self._lock.free()

    def _stored_holder(self) -> Any:
        return self._storage.get_study_user_attrs(self._study_id).get(HOLDER)


def lock_of(storage: RDBStorage, study: str) -> _FileLock | _AdvisoryLock:
    """The lock of a study, not taken yet. The study itself need not exist."""
    file = sqlite_file(storage.engine.url)
    if file is not None:
        return _FileLock(_lock_file(file, study))
    return _AdvisoryLock(storage.engine, study)


def locked(storage: RDBStorage, studies: Collection[str]) -> set[str]:
    """Which of the studies somebody runs now, by their names.

    Raises:
        StudyStoreError: the database cannot be read.
    """
    file = sqlite_file(storage.engine.url)
    if file is not None:
        return {study for study in studies if _is_file_locked(_lock_file(file, study))}
    held_keys = in_database(storage, lambda: _held_keys(storage))
    return {study for study in studies if _key(study) % 2**64 in held_keys}


def _held_keys(storage: RDBStorage) -> set[int]:
    """The keys of all advisory locks of a PostgreSQL database, as unsigned numbers."""
    with storage.engine.connect() as connection:
        # each is stored as its two halves
        return {(int(high) << 32) | int(low) for high, low in connection.exec_driver_sql(_HELD_LOCKS)}


def _is_file_locked(path: Path) -> bool:
    """Whether somebody holds the lock; ``False`` also where this user may not find out."""
    if not path.exists():
        return False
    try:
        lock = try_lock(path)
    except OSError:  # this user may not write there
        return False
    if lock is None:
        return path.exists()  # it may have been released and removed meanwhile
    lock.release()
    return False


def _lock_file(file: Path, study: str) -> Path:
    """Beside the database itself, not beside a link to it, so that all who open it find the same lock."""
    resolved = file.resolve()
    return resolved.with_name(f".{resolved.name}.{_key(study) % 2**64:016x}.lock")


def _key(study: str) -> int:
    """The study's number among PostgreSQL's advisory locks: signed, 64 bits of a hash."""
    return int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big", signed=True)
