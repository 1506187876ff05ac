"""Replacing files so that readers see them whole, and locks so that one process at a time makes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lcsc_opt.base.errors import LcscError, TrajectoryError
from lcsc_opt.base.progress import notice

PENDING = ".partial"  # how the names of unfinished files and folders end
POLL_SECONDS = 0.5
ANOTHER_FOLDER = "choose another folder, or a database on another disk if this folder is beside it"
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


@contextlib.contextmanager
def same_working_folder() -> Iterator[None]:
    """The user's code that runs while this is open may go to another working folder; afterwards it is as before."""
    before = os.getcwd()  # noqa: PTH109 - Path.cwd() is the same
    try:
        yield
    finally:
        os.chdir(before)


def shown_size(count: float) -> str:
    """A number of bytes for people, with three digits: ``320 B``, ``6.91 KB``, ``8 GB``; a KB is 1,000 bytes."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:  # which three digits would round to 1,000
        count /= 1000
        unit += 1
    return f"{count:.3g} {_UNITS[unit]}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new path to write a file or a folder to; at the end, what was written replaces ``path``.

    Readers see the old content or all of the new content, also after a power cut; only a folder is missing for a moment
    while it is replaced. No two writers share the new path. Where writing fails, ``path`` stays as it was, and what was
    written is removed. Of a link, what it leads to is replaced.

    Args:
        path: the file or folder to replace; the folder around it must exist.

    Raises:
        OSError: the disk refused.
    """
    path = Path(os.path.realpath(path))
    unique_name = f".{path.name}.{uuid.uuid4().hex}"
    pending = path.with_name(unique_name + PENDING)
    old = path.with_name(f"{unique_name}.old{PENDING}")
    try:
        yield pending
        _sync_tree(pending)
        if path.is_dir():
            path.replace(old)  # a folder cannot be replaced at once
        pending.replace(path)
        sync(path.absolute().parent)  # which has the new name
    finally:
        remove(pending)
        if path.exists():  # else the old one is all there is
            remove(old)


def write_atomically(path: Path, *content: str | bytes | memoryview, error: type[LcscError]) -> None:
    """Write the parts of ``content`` to the file ``path``, as :func:`replacing` does; its folder is created.

    Text becomes UTF-8. Surrogates, which stand for the bytes of a name that is not UTF-8, are escaped.

    Raises:
        error: the disk refused.
    """
    parts = [part.encode(errors="backslashreplace") if isinstance(part, str) else part for part in content]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as pending, pending.open("xb") as file:
            file.writelines(parts)
    except OSError as refused:
        raise error(f"{path}: cannot be written ({refused.strerror or refused})") from refused


def is_pending(name: str) -> bool:
    """Whether this is the name of an unfinished file or folder, such as a killed process leaves."""
    return name.startswith(".") and name.endswith(PENDING)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link that may not be there; a folder that cannot be removed stays.

    Raises:
        OSError: a file or a link cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Make a file, or a folder with all that it holds, survive a power cut, but for its own name."""
    for entry in (path, *path.rglob("*")):
        if entry.is_dir() or entry.is_file():
            sync(entry)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LockedFile:
    """A file that this process has locked; :func:`try_lock` makes it."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self._path = path
        self._lock = lock
        self._file = path.stat()  # FileNotFoundError if somebody has removed it meanwhile

    @property
    def is_in_place(self) -> bool:
        """Whether the file still has its name; if somebody has removed it, another process may lock a new one."""
        try:
            return os.path.samestat(self._file, self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock, and remove the file if it is still the one with this name. A second call does nothing."""
        if self._lock.is_locked:
            if self.is_in_place:
                with contextlib.suppress(OSError):  # its folder cannot be written any more
                    self._path.unlink()  # still locked: a process that opened it meanwhile makes a new one
            self._lock.release()


def try_lock(path: Path) -> LockedFile | None:
    """Create the file ``path`` and lock it. The lock ends with the process; forked processes do not have it.

    Where the file system has no locks, the file itself is the lock, which a killed process leaves behind.

    Returns:
        The lock, or ``None`` if another process, or another lock of this process, has the file locked, or has just
        removed it.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)  # another thread may release it
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    try:
        return LockedFile(path, lock)
    except FileNotFoundError:  # whoever had it has just removed it
        lock.release()
        return None


@contextlib.contextmanager
def only_process(out: Path, *, busy: LcscError | str) -> Iterator[None]:
    """Keep other processes from making ``out`` while this is open; the lock ends with the process.

    Args:
        out: what is made; the lock is the file ``.NAME.lock`` next to it, which is removed at the end.
        busy: where another process holds the lock, an error to raise, or a notice to give before waiting.

    Raises:
        TrajectoryError: the folder around ``out`` cannot be written to.
        LcscError: ``busy``.
    """
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path)
    except OSError as error:
        raise TrajectoryError(f"Cannot write to {path.parent}: {error.strerror}; {ANOTHER_FOLDER}.") from error
    if lock is None:
        if isinstance(busy, LcscError):
            raise busy
        notice(busy)
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = try_lock(path)
    try:
        yield
    finally:
        lock.release()
