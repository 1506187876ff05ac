"""Waits for the lock of an SQLite file, and finds the process of this machine that holds it, if the kernel tells."""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice

T = TypeVar("T")

# about a lock: of SQLite, of MySQL
TRANSIENT_MESSAGES = ("database is locked", "database table is locked", "try restarting transaction")


LOCK_PAUSE = 0.05  # seconds between two attempts, each of which waits for BUSY_SECONDS
LOCK_SECONDS = 60.0  # how long a command waits for another process's lock; a search that has begun waits for ever

_patient: weakref.WeakSet[RDBStorage] = weakref.WeakSet()


@contextlib.contextmanager
def patient(storage: RDBStorage) -> Iterator[None]:
    """While this is open, wait for locks of other processes as long as they last: a search is running."""
    _patient.add(storage)
    try:
        yield
    finally:
        _patient.discard(storage)


_writing: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)


@contextlib.contextmanager
def in_turn(storage: RDBStorage) -> Iterator[None]:
    """Let threads that write one SQLite file take turns. SQLite itself would poll."""
    if sqlite_file(storage.engine.url) is None:
        yield
        return
    with _writing[storage.url]:
        yield


def when_unlocked(url: str, work: Callable[[], T], *, for_ever: Callable[[], bool] = lambda: False) -> T:
    """Call ``work``, and call it again while another process holds the lock of an SQLite file; say once who holds it.

    Raises:
        StudyStoreError: a process has held it for a minute, and ``for_ever()`` is false.
    """
    start, said = time.monotonic(), False
    while True:
        try:
            return work()
        except (sa.exc.SQLAlchemyError, optuna.exceptions.OptunaError, sqlite3.Error) as error:
            locked = _locked(url, error)
            if locked is None:
                raise
            if not for_ever() and time.monotonic() > start + LOCK_SECONDS:
                raise StudyStoreError(f"{locked}; what was committed is safe, try again") from error
        if not said:
            notice(f"{locked}; waiting", every_time=True)
        said = True
        time.sleep(LOCK_PAUSE)


def is_patient(storage: RDBStorage) -> bool:
    """Whether a search on this storage is running."""
    return storage in _patient


def _locked(url: str, error: BaseException | None) -> str | None:
    """Who holds the lock of an SQLite file, where an error, or one that led to it, says that somebody does."""
    file = sqlite_file(sa.make_url(url))
    while file is not None and error is not None:
        if any(text in str(error) for text in TRANSIENT_MESSAGES):
            return f"{file}: is locked by {lock_holder(file) or 'another process'}"
        error = error.__cause__
    return None


def sqlite_file(url: sa.URL) -> Path | None:
    """The file of a database; ``None`` for a server, and in memory."""
    in_memory = url.database in (None, "", ":memory:")
    return None if url.get_backend_name() != "sqlite" or in_memory else Path(str(url.database))


def lock_holder(file: Path) -> str | None:
    """The process that holds the write lock, in words; ``None`` where nobody does, or this system does not tell.

    A stopped process keeps its locks until it continues.
    """
    for process in _holders(file):
        if process == os.getpid():
            continue
        who = f"process {process} on {platform.node()}"
        return f"{who}, which is stopped; kill -CONT {process} lets it go on" if _is_stopped(process) else who
    return None


def _holders(file: Path) -> Iterator[int]:
    """Processes with a write lock on a file of this inode that have this very file open."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode, path = file.stat().st_ino, str(file.resolve())
        for line in Path("/proc/locks").read_text().splitlines():
            _, _, _, kind, process, place, *_ = line.replace("->", "").split()
            if kind == "WRITE" and int(place.rpartition(":")[2]) == inode and _has_open(int(process), path):
                yield int(process)


def _has_open(process: int, path: str) -> bool:
    """Whether a process has a file open; true where that cannot be seen."""
    try:
        links = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return True
    for link in links:
        with contextlib.suppress(OSError):
            if str(link.readlink()) == path:
                return True
    return False


def _is_stopped(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"
