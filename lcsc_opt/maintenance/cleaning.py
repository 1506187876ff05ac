"""Deletes studies, and lists and removes what lies in the cache.

Only files and folders whose names lcsc_opt gives are listed and removed: the cache may hold other files, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import PENDING, remove
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.trajectory.manifest import Manifest
from lcsc_opt.views.artifacts import artifact_directory, artifact_path

_FOLDERS = ("", "trajectories", "references", "datasets")
_KINDS = {
    "trajectory": r"(trajectories/[0-9a-f]{24}|[\w-]+-[0-9a-f]{16})\.trajectory",
    "feature network": r"[\w-]+-network-[0-9a-f]{16}\.safetensors",
    "reference": r"references/([0-9a-f]{32}\.np[yz]|images-[0-9a-f]{32}\.json)",
    "dataset": r"datasets/(cifar-100?-(batches-py|python(\.tar\.gz)?)|(Fashion|K)?MNIST)",
}
UNFINISHED = "unfinished"
_PENDING_NAME = r"((?:.*/)?)\.(.*)\.[0-9a-f]{32}(?:\.old)?\.partial"  # of lcsc_opt.base.files.replacing
_SETTLED_SECONDS = 600.0  # what is being made was changed more recently


def files_of(study: StoredStudy) -> list[Path]:
    """The study's files in the folder of artifacts, some of which may be missing."""
    folder = artifact_directory(study.storage.url)
    named = (artifact_path(folder, one.get("artifact_id")) for one in study.artifacts())
    return [path for path in named if path is not None]


@dataclasses.dataclass(frozen=True)
class Cached:
    """One thing in the cache.

    Attributes:
        path: a file or a folder.
        kind: such as ``trajectory``, or ``unfinished``: a process is making it, or was killed while it made it.
        bytes: on the disk.
        used_at: when it was last read or written, in seconds since 1970; many systems update this only once a day.
        studies: the names of those that use a trajectory; other things are made again.
    """

    path: Path
    kind: str
    bytes: int
    used_at: float
    studies: tuple[str, ...]

    @staticmethod
    def all_in(cache: Path, studies: Mapping[str, Mapping[str, Any]]) -> list[Cached]:
        """What is in the cache, which may not be there yet, the largest first; ``studies``: name → attributes."""
        paths = [path for name in _FOLDERS if (cache / name).is_dir() for path in sorted((cache / name).iterdir())]
        kinds = [(path, _kind_of(path.relative_to(cache).as_posix())) for path in paths]
        found = [Cached(path, kind, *_status(path), _using(path, kind, studies)) for path, kind in kinds if kind]
        return sorted(found, key=lambda entry: (-entry.bytes, entry.path))

    def remove(self) -> bool:
        """Remove it, and return whether it is gone: it stays where a process makes it, or this user may not."""
        if self.kind != UNFINISHED or _status(self.path)[1] < time.time() - _SETTLED_SECONDS:
            remove(self.path)
        return not self.path.exists()


def _kind_of(name: str) -> str | None:
    """What a path in the cache is, told by its name relative to the cache; ``None`` if it is none of ours."""
    if pending := re.fullmatch(_PENDING_NAME, name):
        return UNFINISHED if _kind_of(pending[1] + pending[2]) else None
    if name.endswith(PENDING):
        return UNFINISHED if _kind_of(name.removesuffix(PENDING)) == "trajectory" else None
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, name)), None)


def _status(path: Path) -> tuple[int, float]:
    """Bytes, and when the largest file was last read or written; smaller files are read even for a list."""
    found = []
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # it has just been renamed
            found.append(file.stat())
    largest = max(found, key=lambda status: status.st_size, default=None)
    used_at = 0.0 if largest is None else max(largest.st_atime, largest.st_mtime)
    return sum(status.st_size for status in found), used_at


def _using(path: Path, kind: str, studies: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The studies that use a trajectory."""
    if kind != "trajectory":
        return ()
    try:
        manifest = Manifest.load(path)
    except TrajectoryError:  # broken: nobody can use it
        return ()
    steps = {name: tuple(known.get("steps") or ()) for name, known in studies.items()}
    hashes = {of: manifest.sha256_of(of) for of in set(steps.values())}
    return tuple(name for name, known in studies.items() if known.get("checkpoints") == hashes[steps[name]])
