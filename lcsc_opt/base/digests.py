"""Digests of what was read, by its content: each file is read once for its path, size and time.

A file with another time is read again, and the same bytes have the same digest: a copy is no other input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.files import write_atomically

_TABLE = "digests.json"
_BLOCK = 2**20  # bytes that are read at once


class Digests:
    """A table of digests in a folder. Processes that write it at the same time lose entries, which are made again.

    Args:
        folder: that beside the database; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _TABLE
        self._known: dict[str, list[str]] = {}  # path and kind → stamp, digest
        try:
            self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # there is none yet, or it is damaged
            return

    def of(self, path: Path, read: Callable[[Path], str] | None = None, *, kind: str = "bytes") -> str:
        """The digest of a file's content, in hex.

        Args:
            path: of the file.
            read: computes it; ``None`` takes the SHA-256 of the bytes.
            kind: names what ``read`` computes.

        Raises:
            OSError: the file cannot be read.
            Exception: what ``read`` raises.
        """
        stamp = stamp_of(path)
        key = f"{kind} {path.resolve()}"
        if self._known.get(key, [""])[0] == stamp:
            return self._known[key][1]
        digest = sha256_of(path) if read is None else read(path)
        self._known[key] = [stamp, digest]
        write_atomically(self._path, json.dumps(self._known).encode(), error=LcscError)
        return digest


def stamp_of(path: Path) -> str:
    """What changes when a file, or one in a folder, is written again: sizes and times. Raises OSError without one."""
    if not path.is_dir():
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    listing = hashlib.sha256()
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            line = f"{entry.relative_to(path)}\t{stamp_of(entry)}\n"
            listing.update(line.encode(errors="replace"))
    return listing.hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of the bytes of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()
