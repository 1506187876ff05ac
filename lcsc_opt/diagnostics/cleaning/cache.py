"""Lists what lies in the cache and which studies use it, and removes it.

Only files and folders whose names lcsc_opt gives are listed and removed: the cache may hold other files, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import PENDING, remove, try_lock, unlock
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.trajectory.manifest import LOCK, Manifest

FOLDERS = ("", "trajectories", "references", "datasets", "batch-sizes")
KINDS = {
    "trajectory": r"(trajectories/[0-9a-f]{24}|[\w-]+-[0-9a-f]{16})\.trajectory",
    "feature network": r"[\w-]+-network-[0-9a-f]{16}\.safetensors",
    "reference": r"references/([0-9a-f]{32}\.np[yz]|images-[0-9a-f]{32}\.json)",
    "dataset": r"datasets/(cifar-100?-(batches-py|python(\.tar\.gz)?)|(Fashion|K)?MNIST|stl10_binary(\.tar\.gz)?)",
    "batch size": r"batch-sizes/[0-9a-f]{16}\.json",
}
UNFINISHED = "unfinished"
PENDING_NAME = r"((?:.*/)?)\.(.*)\.[0-9a-f]{32}(?:\.old)?\.partial"  # of lcsc_opt.base.files.replacing
SETTLED_SECONDS = 600.0  # a file that is being written was changed more recently


@dataclasses.dataclass(frozen=True)
class Cached:
    """One thing in the cache.

    Attributes:
        path: a file or a folder.
        kind: one of :data:`KINDS`, or ``unfinished``: a process is making it, or was killed while it made it.
        bytes: on the disk.
        used_at: when it was last read or written, in seconds since 1970; many systems update this only once a day.
        studies: the names of those that use it, or ``None`` if this cannot be told.
        in_use: whether a living process writes it, or runs a study that uses it.
    """

    path: Path
    kind: str
    bytes: int
    used_at: float
    studies: tuple[str, ...] | None
    in_use: bool

    @property
    def unused(self) -> bool:
        """Whether no study uses it, for certain."""
        return self.studies == () and not self.in_use

    def remove(self) -> bool:
        """Remove it, and return whether it is gone: it stays where a process makes it, or this user may not."""
        with _nobody_makes(self.path, self.kind) as nobody:
            if nobody:
                remove(self.path)
        return not self.path.exists()


def contents(cache: Path, storage: RDBStorage | None) -> list[Cached]:
    """What is in the cache, the largest first.

    Args:
        cache: the folder; it may not be there yet.
        storage: the database whose studies use it, or ``None`` if it is not known.
    """
    studies = None if storage is None else _studies(storage)
    found = [_cached(path, kind, studies) for path, kind in _ours(cache)]
    return sorted(found, key=lambda entry: (-entry.bytes, entry.path))


def _ours(cache: Path) -> Iterator[tuple[Path, str]]:
    for folder in (cache / name for name in FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (kind := kind_of(path.relative_to(cache).as_posix())) is not None:
                yield path, kind


def kind_of(name: str) -> str | None:
    """What a path in the cache is, told by its name, or ``None`` if it is none of ours.

    Args:
        name: relative to the cache, with slashes.
    """
    if pending := re.fullmatch(PENDING_NAME, name):
        return UNFINISHED if kind_of(pending[1] + pending[2]) else None
    if name.endswith(PENDING):
        return UNFINISHED if kind_of(name.removesuffix(PENDING)) == "trajectory" else None
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


@dataclasses.dataclass(frozen=True)
class _Study:
    """What a study uses: its checkpoints by hash and steps, everything else by its name in the fingerprint."""

    name: str
    running: bool
    checkpoints: str | None
    steps: tuple[int, ...]
    fingerprint: str


def _studies(storage: RDBStorage) -> list[_Study]:
    reader = HistoryReader(storage)
    found = []
    for history in reader.read_studies(reader.names()):
        known = StoredStudy.open(storage, history.study).attributes
        fingerprint = json.dumps(known.get("fingerprint"))
        found.append(_Study(history.study, history.running, known.get("checkpoints"), history.steps, fingerprint))
    return found


def _cached(path: Path, kind: str, studies: Sequence[_Study] | None) -> Cached:
    size, used_at = _status(path)
    using = None if studies is None else _using(path, kind, studies)
    with _nobody_makes(path, kind) as nobody:
        in_use = not nobody or any(study.running for study in using or ())
    names = None if using is None else tuple(study.name for study in using)
    return Cached(path, kind, size, used_at, names, in_use)


def _status(path: Path) -> tuple[int, float]:
    """Bytes, and when the largest file was last read or written; smaller files are read even for a list."""
    found = []
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # it has just been renamed
            found.append(file.stat())
    largest = max(found, key=lambda status: status.st_size, default=None)
    used_at = 0.0 if largest is None else max(largest.st_atime, largest.st_mtime)
    return sum(status.st_size for status in found), used_at


def _using(path: Path, kind: str, studies: Sequence[_Study]) -> list[_Study] | None:
    """The studies that use it, or ``None`` if this cannot be told."""
    if kind == UNFINISHED:
        return []
    if kind == "trajectory":
        return _of_trajectory(path, studies)
    if kind == "feature network":  # extractors are called NAME-D-HASH
        extractor = re.compile(rf'"{re.escape(path.name.rpartition("-network-")[0])}-\d+-')
        return [study for study in studies if extractor.search(study.fingerprint)]
    if kind == "reference" and path.suffix != ".json":
        return [study for study in studies if path.stem in study.fingerprint]
    return None


def _of_trajectory(path: Path, studies: Sequence[_Study]) -> list[_Study]:
    """The studies whose checkpoints are in the trajectory, perhaps among others."""
    try:
        manifest = Manifest.load(path)
    except TrajectoryError:  # broken: nobody can use it
        return []
    hashes = {steps: manifest.sha256_of(steps) for steps in {study.steps for study in studies}}
    return [study for study in studies if study.checkpoints == hashes[study.steps]]


def _try_lock(path: Path) -> FileLock | None:
    try:
        return try_lock(path)
    except OSError:  # in a folder that is only read here
        return None


@contextlib.contextmanager
def _nobody_makes(path: Path, kind: str) -> Iterator[bool]:
    """Whether no living process makes it. Until the block ends, none can begin to make a trajectory's folder."""
    if kind != UNFINISHED:
        yield True
        return
    if path.name.startswith("."):
        yield _status(path)[1] < time.time() - SETTLED_SECONDS
        return
    held = [path.with_name(f".{path.name.removesuffix(PENDING)}.lock"), path / LOCK]
    with contextlib.ExitStack() as locks:
        taken = [_try_lock(file) for file in held]
        for lock in taken:
            if lock is not None:
                locks.callback(unlock, lock)
        yield None not in taken
