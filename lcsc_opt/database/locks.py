"""Who holds the lock of an SQLite file: a process of this machine, as far as its kernel tells."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def lock_holder(file: Path) -> str | None:
    """The process that holds the write lock, in words; ``None`` where nobody does, or this system does not tell.

    A process that is stopped holds what it has until it goes on.
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
