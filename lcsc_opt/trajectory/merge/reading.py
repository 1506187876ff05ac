"""Parts of files read by threads into memory that is used again, beside whoever works on what was read before."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.merge.memory import PAGE

READERS = 4  # threads; a disk has work while one of them waits for the other
AT_ONCE = 4 * 2**20  # bytes that a thread asks for


class Extent(NamedTuple):
    """``size`` bytes of a file from ``offset``, and where they go in the buffer.

    Whole pages are read, so that up to a page before and behind is overwritten, too, with what the file has there.
    """

    file: int
    offset: int
    size: int
    target: int


class Reader:
    """A context in which files are read.

    Args:
        paths: of the files.
        around_cache: the system shall not keep what is read. Disks read straight into the buffer where they can,
            which leaves the cores to others; elsewhere the system is told to forget it.

    Raises:
        TrajectoryError: a file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], *, around_cache: bool = False) -> None:
        self._paths, self._around_cache = paths, around_cache
        self._exit = contextlib.ExitStack()
        self._seeking = threading.Lock()

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as opened:
            self._files = [opened.enter_context(_open(path)) for path in self._paths]
            self._direct = [self._open_direct(path, opened) for path in self._paths]
            self._pool = opened.enter_context(ThreadPoolExecutor(READERS, thread_name_prefix="lcsc-read"))
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._exit.close()  # waits for what is being read

    def begin(self, extents: Sequence[Extent], buffer: Tensor) -> Reading:
        """Begin to read into ``buffer``, which nobody else may use until it is there.

        Args:
            extents: with targets that have the place in their page that the offset has in its.
            buffer: ``[bytes]`` uint8 on the CPU, its first byte that of a page.
        """
        content, queue, lock = memoryview(buffer.numpy().data), iter(list(_jobs(extents))), threading.Lock()
        return Reading([self._pool.submit(self._read_all, queue, lock, content) for _ in range(READERS)])

    def _open_direct(self, path: Path, opened: contextlib.ExitStack) -> int | None:
        """A descriptor that reads around the cache; ``None`` where it is not wanted, or not to be had."""
        if not self._around_cache or not hasattr(os, "O_DIRECT"):
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return None
        opened.callback(os.close, descriptor)
        return descriptor

    def _read_all(self, queue: Iterator[_Job], lock: threading.Lock, content: memoryview) -> None:
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            self._read(job, content[job.target : job.target + job.size])

    def _read(self, job: _Job, target: memoryview) -> None:
        done = 0
        while done < job.needed:
            try:
                count = self._read_some(job.file, job.offset + done, target[done:])
            except OSError as error:
                raise TrajectoryError(f"Cannot read {self._paths[job.file]}: {error.strerror}.") from error
            if not count:
                raise TrajectoryError(f"{self._paths[job.file]} is truncated. Copy it or pack again.")
            done += count

    def _read_some(self, index: int, offset: int, target: memoryview) -> int:
        descriptor = self._direct[index]
        if descriptor is not None:
            try:
                return os.preadv(descriptor, [target], offset)
            except OSError:  # this disk has other pages, or this memory is none that it can write to
                self._direct[index] = None
        count = self._read_cached(self._files[index], offset, target)
        if self._around_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._files[index].fileno(), offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _read_cached(self, file: BinaryIO, offset: int, target: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [target], offset)
        with self._seeking:
            file.seek(offset)
            return file.readinto(target)  # type: ignore[attr-defined,no-any-return]


class Reading:
    """What is being read."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = futures

    def wait(self) -> None:
        """Until all of it is there.

        Raises:
            TrajectoryError: a file is truncated or cannot be read.
        """
        for future in self._futures:
            future.result()


class _Job(NamedTuple):
    """Whole pages that one call reads, the first ``needed`` bytes of which the file must have."""

    file: int
    offset: int
    size: int
    target: int
    needed: int


def _jobs(extents: Sequence[Extent]) -> Iterator[_Job]:
    for extent in extents:
        before, end = extent.offset % PAGE, extent.offset + extent.size
        for first in range(extent.offset - before, end, AT_ONCE):
            size = min(AT_ONCE, -(-(end - first) // PAGE) * PAGE)
            yield _Job(extent.file, first, size, extent.target + first - extent.offset, min(size, end - first))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise TrajectoryError(f"Cannot read {path}: {error.strerror}.") from error
