"""Reading the next file into the system's cache while the previous checkpoint is written and synced."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType

BUFFER = 2**20  # bytes; no other memory is taken
MOST_WASTE = 1.25  # how much larger than its weights a file may be


class ReadAhead:
    """Reads one file at a time in a thread, only to put it into the system's cache.

    Nothing is kept or parsed. The next reader of the file finds it in memory, or reads it from the disk if memory was
    short.
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
        """Begin to read ``path``, unless it is a folder, or ``like`` shows that files hold much besides weights.

        Args:
            path: the next file.
            like: the file before it.
            used: bytes of weights that were taken from ``like``.
        """
        if self._thread is not None:
            self._thread.join()
        if not path.is_file() or like.stat().st_size > MOST_WASTE * used:
            return
        self._thread = threading.Thread(target=self._read, args=(path,), daemon=True)
        self._thread.start()

    def _read(self, path: Path) -> None:
        buffer = bytearray(BUFFER)
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:  # the file's real reader raises
            while not self._stopped.is_set() and file.readinto(buffer):
                pass
