"""The study's own files on another machine: its objective, the modules that it imports, files that its settings name.

On a shared file system, that machine sees the same files at the same paths and uses them. Elsewhere it uses copies that
were sent with the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lcsc_opt.base.catalog import find, stands_for
from lcsc_opt.base.code import module_file
from lcsc_opt.base.paths import given_path, study_directory
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.contract import Objective

MOST_BYTES = 100 * 2**20  # of data that settings name; larger data has to be on every machine
CHECKPOINTS = "checkpoints"  # the setting whose files are sent in another way
STUDY, HERE, MODULES = "lcsc-study", "lcsc-here", "lcsc-modules"  # folders of the copies


@dataclasses.dataclass(frozen=True)
class Travelling:
    """The files that are sent to other machines.

    Attributes:
        study: the study file's folder on the coordinator.
        here: the working directory of the coordinator.
        files: path among the copies → (path on the coordinator, SHA-256).
        objective: the path of the objective's file among the copies; empty where it belongs to the library.
    """

    study: Path | None
    here: Path
    files: Mapping[str, tuple[Path, str]]
    objective: str = ""

    @contextlib.contextmanager
    def arrived(self) -> Iterator[Path | None]:
        """While this is open, the study's files are found on this machine. Yields the folder in place of the study's.

        Copies are below the working directory that the process was started in.
        """
        before = Path.cwd()
        beside, here = (self.study, self.here) if self._same_here() else self._use_copies(before)
        if here.is_dir():
            os.chdir(here)
        try:
            yield beside
        finally:
            os.chdir(before)

    def _same_here(self) -> bool:
        return all(_sha256(original) == sha256 for original, sha256 in self.files.values())

    def _use_copies(self, copies: Path) -> tuple[Path | None, Path]:
        study = None if self.study is None else copies / STUDY
        here = copies / STUDY if self.study == self.here else copies / HERE
        here.mkdir(exist_ok=True)  # missing if none of its files were sent
        if self.objective:
            stands_for(copies / self.objective, self.files[self.objective][0])
        if str(copies / MODULES) not in sys.path:
            sys.path.append(str(copies / MODULES))
        return study, here


def collect(spec: ObjectiveSpec, study: Path | None, objective: Objective, copies: Path) -> Travelling:
    """Copy the files that other machines need.

    Args:
        spec: of the objective.
        study: the study file's folder.
        objective: as it was loaded here.
        copies: an empty folder.
    """
    study, here = None if study is None else study.resolve(), Path.cwd()
    file = find("objectives", spec.file, beside=study)
    found: dict[str, Path] = {}
    own = ""
    for name in objective.code:
        path = file if name == file.name else module_file(name)
        if path is not None and (place := _place(path.resolve(), study, here) or _module_place(name, path)):
            found[place] = path
            own = place if path == file else own
    with study_directory(study):
        data = [
            given_path(text) for name, value in spec.settings.items() if name != CHECKPOINTS for text in _texts(value)
        ]
    for path in _small(data):
        if place := _place(path.resolve(), study, here):
            found[place] = path
    for place, path in found.items():
        (copies / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copies / place)
    files = {place: (path.resolve(), _sha256(path)) for place, path in found.items()}
    return Travelling(study, here, files, own)


def _place(path: Path, study: Path | None, here: Path) -> str:
    """A file's path among the copies; empty where it is neither beside the study file nor in the working directory."""
    for folder, copies in ((study, STUDY), (here, HERE)):
        if folder is not None and path.is_relative_to(folder):
            return str(PurePosixPath(copies, *path.relative_to(folder).parts))
    return ""


def _module_place(name: str, path: Path) -> str:
    """The path among the copies of a module from elsewhere, such as ``PYTHONPATH``."""
    parts = [*name.split("."), "__init__"] if path.name == "__init__.py" else name.split(".")
    return str(PurePosixPath(MODULES, *parts).with_suffix(".py"))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _small(paths: Iterable[Path]) -> Iterator[Path]:
    """These files and the files in these folders, up to a total size."""
    left = MOST_BYTES
    for path in paths:
        try:
            files = [path] if path.is_file() else _files_in(path)
            size = sum(file.stat().st_size for file in files)
        except (OSError, ValueError):  # the text is no path
            continue
        if size <= left:
            left -= size
            yield from files


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder; none where the folder contains all others."""
    if not folder.is_dir() or Path.cwd().is_relative_to(folder.resolve()):
        return []
    return [file for file in folder.rglob("*") if file.is_file()]


def _sha256(path: Path) -> str:
    """In hex; empty where the file cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
