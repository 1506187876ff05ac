"""Deletes studies, and lists what lies in the cache, with the studies that use it, and removes it.

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
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError, TrajectoryError
from lcsc_opt.base.files import PENDING, remove, try_lock
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.lock import locked
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.trajectory.manifest import LOCK, Manifest
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
_SETTLED_SECONDS = 600.0  # a file that is being written was changed more recently

_Study = tuple[StudyHistory, dict[str, Any]]
"""A study and its attributes in the database."""


def deletable(storage: RDBStorage, name: str) -> tuple[StoredStudy, list[Path]]:
    """A study that nobody is running, and its files in the folder of artifacts, some of which may be missing.

    Raises:
        StudyStoreError: a living process runs it.
        StudyStoreError: there is no such study, or it is not one of ours.
    """
    study = StoredStudy.open(storage, name)
    if in_database(storage, lambda: locked(storage, [name])):
        raise StudyStoreError(f"{name}: is being run, so it is not deleted; stop it first")
    folder = artifact_directory(storage.url)
    named = (artifact_path(folder, one.get("artifact_id")) for one in study.artifacts())
    return study, [path for path in named if path is not None]


def delete_study(study: StoredStudy, files: Sequence[Path]) -> None:
    """Delete its rows in the database, then its files.

    Raises:
        StudyStoreError: somebody has begun to run it, or the database refused.
    """
    with study.hold():
        study.delete()
    for file in files:
        file.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Cached:
    """One thing in the cache.

    Attributes:
        path: a file or a folder.
        kind: such as ``trajectory``, or ``unfinished``: a process is making it, or was killed while it made it.
        bytes: on the disk.
        used_at: when it was last read or written, in seconds since 1970; many systems update this only once a day.
        studies: the names of those that use it; ``None`` if this cannot be told.
        in_use: whether a living process writes it, or runs a study that uses it.
    """

    path: Path
    kind: str
    bytes: int
    used_at: float
    studies: tuple[str, ...] | None
    in_use: bool

    @staticmethod
    def all_in(cache: Path, storage: RDBStorage | None) -> list[Cached]:
        """What is in the cache, the largest first.

        Args:
            cache: the folder; it may not be there yet.
            storage: the database whose studies use it; ``None`` if it is not known.
        """
        studies = None
        if storage is not None:
            reader = HistoryReader(storage)
            histories = reader.read_studies(reader.names())
            studies = [(history, StoredStudy.open(storage, history.study).attributes) for history in histories]
        paths = [path for name in _FOLDERS if (cache / name).is_dir() for path in sorted((cache / name).iterdir())]
        kinds = [(path, _kind_of(path.relative_to(cache).as_posix())) for path in paths]
        found = []
        for path, kind in kinds:
            if kind is not None:
                size, used_at = _status(path)
                using = None if studies is None else _using(path, kind, studies)
                with _nobody_makes(path, kind) as nobody:
                    in_use = not nobody or any(study.running for study in using or ())
                names = None if using is None else tuple(study.study for study in using)
                found.append(Cached(path, kind, size, used_at, names, in_use))
        return sorted(found, key=lambda entry: (-entry.bytes, entry.path))

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


def _using(path: Path, kind: str, studies: Sequence[_Study]) -> list[StudyHistory] | None:
    """The studies that use it; ``None`` if this cannot be told."""
    if kind == UNFINISHED:
        return []
    if kind == "trajectory":
        try:
            manifest = Manifest.load(path)
        except TrajectoryError:  # broken: nobody can use it
            return []
        hashes = {steps: manifest.sha256_of(steps) for steps in {study.steps for study, _ in studies}}
        return [study for study, known in studies if known.get("checkpoints") == hashes[study.steps]]
    if kind == "feature network":  # extractors are called NAME-D-HASH
        named = rf'"{re.escape(path.name.rpartition("-network-")[0])}-\d+-'
    elif kind == "reference" and path.suffix != ".json":
        named = re.escape(path.stem)
    else:
        return None
    return [study for study, known in studies if re.search(named, json.dumps(known.get("fingerprint")))]


@contextlib.contextmanager
def _nobody_makes(path: Path, kind: str) -> Iterator[bool]:
    """Whether no living process makes it. Until the block ends, none can begin to make a trajectory's folder."""
    if kind != UNFINISHED:
        yield True
        return
    if path.name.startswith("."):
        yield _status(path)[1] < time.time() - _SETTLED_SECONDS
        return
    with contextlib.ExitStack() as locks:
        free = True
        for file in (path.with_name(f".{path.name.removesuffix(PENDING)}.lock"), path / LOCK):
            try:
                lock = try_lock(file)
            except OSError:  # in a folder that is only read here
                lock = None
            if lock is not None:
                locks.callback(lock)
            free &= lock is not None
        yield free
