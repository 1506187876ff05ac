"""Reading the next file into the system's cache while the checkpoint before it is written and synced."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType

BUFFER = 2**20  # bytes; all the memory that it takes
MOST_WASTE = 1.25  # how much larger than its weights a file may be


class ReadAhead:
    """One thread that reads one file at a time, and whose result is only that the file is cached.

    Nothing is kept and nothing is parsed: whoever reads the file next finds it in memory where there was room, and
    reads it from the disk where there was not.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, path: Path, *, like: Path, used: int) -> None:
        """Begin to read ``path``, unless it is a folder or holds much that is no weights.

        Args:
            path: the next file.
            like: the one before it.
            used: bytes of weights that were taken from that one.
        """
        if self._thread is not None:
            self._thread.join()
        if not path.is_file() or like.stat().st_size > MOST_WASTE * used:
            return
        self._thread = threading.Thread(target=self._read, args=(path,), daemon=True)
        self._thread.start()

    def _read(self, path: Path) -> None:
        buffer = bytearray(BUFFER)
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:  # the reader complains
            while not self._stopped.is_set() and file.readinto(buffer):
                pass
