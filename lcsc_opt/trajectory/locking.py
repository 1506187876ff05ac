"""One process at a time makes a file or folder, where the file system can lock."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lcsc_opt.errors import TrajectoryError

if sys.platform != "win32":
    import fcntl

WAIT_SECONDS = 0.5


@contextlib.contextmanager
def only_process(out: Path, *, busy: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from making ``out`` meanwhile; the lock goes with the process.

    Args:
        out: what is made; the lock is a file beside it, which is removed at the end.
        busy: called once when another process holds the lock; it raises, or returns to wait.

    Raises:
        TrajectoryError: the folder around ``out`` cannot be written to.
    """
    path = out.with_name(f".{out.name}.lock")
    descriptor = _try_lock(path)
    if descriptor is None:
        busy()
    while descriptor is None:
        time.sleep(WAIT_SECONDS)
        descriptor = _try_lock(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()  # while locked: who opened it meanwhile sees that it is gone, and makes a new one
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Make and lock the file at ``path``; gives its descriptor, ``None`` where another process holds it."""
    while True:
        descriptor = _opened(path)
        try:
            locked = _lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if locked and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        if not locked:
            return None


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TrajectoryError(f"Cannot write to {path.parent}: {error.strerror}.") from error


def _lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
