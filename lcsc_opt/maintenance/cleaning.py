"""Lists and removes the entries of the cache.

Only files and folders whose names lcsc_opt chooses are listed and removed: the cache may hold other files, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import PENDING, remove
from lcsc_opt.trajectory.manifest import Manifest

TRAJECTORY = "trajectory"
TRAINED_MODEL = "trained model"
UNFINISHED = "unfinished"

_FOLDERS = ("", "trajectories", "references", "datasets")
_PATTERNS = {
    TRAJECTORY: r"trajectories/[0-9a-f]{24}\.trajectory",
    TRAINED_MODEL: r"[\w-]+-[0-9a-f]{16}(-\w+)?\.(trajectory|state|model|jsonl|yaml|samples)",
    "feature network": r"[\w-]+-network-[0-9a-f]{16}\.safetensors",
    "reference": r"references/([0-9a-f]{32}\.np[yz]|images-[0-9a-f]{32}\.json)",
    "dataset": r"datasets/(cifar-100?-(batches-py|python(\.tar\.gz)?)|(Fashion|K)?MNIST)",
}
_PENDING_NAME = re.compile(r"((?:.*/)?)\.(.*)\.[0-9a-f]{32}(?:\.old)?\.partial")  # of lcsc_opt.base.files.replacing
_SETTLED_SECONDS = 600.0  # an entry that was changed more recently may still be written


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One file or folder of the cache.

    Attributes:
        name: its path, relative to the cache.
        path: its whole path.
        kind: such as :data:`TRAJECTORY`; :data:`UNFINISHED` is still being written, or was left by a killed process.
        bytes: its size on the disk.
        used_at: when it was last read or written, in seconds since 1970; many systems update this only once a day.
        studies: the names of the studies that use it, if it is a trajectory.
    """

    name: str
    path: Path
    kind: str
    bytes: int
    used_at: float
    studies: tuple[str, ...]

    @property
    def is_replaceable(self) -> bool:
        """Whether it is quickly computed or downloaded again when it is needed.

        Trajectories and trained models are not: their checkpoints may be gone, training takes long, and studies of
        other databases may need them.
        """
        return self.kind not in (TRAJECTORY, TRAINED_MODEL)

    def remove(self) -> bool:
        """Remove it, and return whether it is gone: it stays if a process may be writing it, or permissions forbid."""
        if self.kind == UNFINISHED and _last_use(_file_statuses(self.path)) >= time.time() - _SETTLED_SECONDS:
            return False
        remove(self.path)
        return not self.path.exists()


def cache_entries(cache: Path, studies: Mapping[str, Mapping[str, Any]]) -> list[CacheEntry]:
    """The entries of the cache, the largest first. The folder need not exist.

    Args:
        cache: the folder of the cache.
        studies: name → attributes of the studies of a database; they say who uses a trajectory.
    """
    entries = []
    for folder in _FOLDERS:
        if not (cache / folder).is_dir():
            continue
        for path in sorted((cache / folder).iterdir()):
            name = path.relative_to(cache).as_posix()
            kind = _kind_of(name)
            if kind is None:
                continue
            statuses = _file_statuses(path)
            size = sum(status.st_size for status in statuses)
            entries.append(CacheEntry(name, path, kind, size, _last_use(statuses), _users(path, kind, studies)))
    return sorted(entries, key=lambda entry: (-entry.bytes, entry.path))


def _kind_of(name: str) -> str | None:
    """The kind of a path, by its name relative to the cache; ``None`` if lcsc_opt chooses no such names."""
    pending = _PENDING_NAME.fullmatch(name)
    if pending is not None:
        final_name = pending[1] + pending[2]
        return UNFINISHED if _kind_of(final_name) else None
    if name.endswith(PENDING):
        final_name = name.removesuffix(PENDING)
        is_trajectory = final_name.endswith(".trajectory") and _kind_of(final_name) is not None
        return UNFINISHED if is_trajectory else None
    for kind, pattern in _PATTERNS.items():
        if re.fullmatch(pattern, name):
            return kind
    return None


def _file_statuses(path: Path) -> list[os.stat_result]:
    """Those of a file, or of all files in a folder."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    statuses = []
    for file in files:
        with contextlib.suppress(OSError):  # it has just been renamed
            statuses.append(file.stat())
    return statuses


def _last_use(statuses: Iterable[os.stat_result]) -> float:
    """When the largest file was last read or written; smaller files are read even for a list."""
    largest = max(statuses, key=lambda status: status.st_size, default=None)
    if largest is None:
        return 0.0
    return max(largest.st_atime, largest.st_mtime)


def _users(path: Path, kind: str, studies: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The studies whose checkpoints are those of a trajectory, or of the first of them."""
    if kind not in (TRAJECTORY, TRAINED_MODEL) or path.suffix != ".trajectory":
        return ()
    try:
        manifest = Manifest.load(path)
    except TrajectoryError:  # broken: nobody can use it
        return ()
    hashes: dict[tuple[int, ...], str] = {}  # of the checkpoints of these steps
    users = []
    for name, attributes in studies.items():
        steps = tuple(attributes.get("steps") or ())
        if steps not in hashes:
            hashes[steps] = manifest.sha256_of(steps)
        if attributes.get("checkpoints") == hashes[steps]:
            users.append(name)
    return tuple(users)
