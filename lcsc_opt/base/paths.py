"""Finds the files that a study names."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import LcscError, StudySpecError

_PACKAGE = Path(__file__).parents[1]
_IN_THE_WHEEL = _PACKAGE / "_shipped"
SHIPPED = _IN_THE_WHEEL if _IN_THE_WHEEL.is_dir() else _PACKAGE.parent
"""The folder around the folders that ship with the library: inside the wheel, or the top of a checkout."""

BUNDLED_WEIGHTS = SHIPPED / "objectives" / "weights"
"""Trained weights that ship with the library: those of ``objectives/mnist.py``, and its images."""

MANIFEST = "manifest.json"  # of a packed trajectory
WEIGHTS = "weights.bin"


def expanded_path(path: str | Path, *, error: type[LcscError]) -> Path:
    """The path with the home folder for ``~``; it need not exist.

    Raises:
        error: ``~name`` is no user's, or the system refuses the name, as one that is too long.
    """
    try:
        expanded = Path(path).expanduser()
        expanded.exists()  # raises if the system refuses the name
    except RuntimeError as unknown_home:
        raise error(f"{path}: there is no such home folder; write the whole path") from unknown_home
    except OSError as refused:
        raise error(f"{path}: cannot be read ({refused.strerror}); check the path") from refused
    return expanded


def natural_order(name: str | Path) -> list[object]:
    """The key that sorts ``model2.pt`` before ``model10.pt``, and layer.9 before layer.10."""
    texts_and_numbers = re.split("([0-9]+)", str(name))  # text, number, text, …: numbers are at odd places
    return [int(part) if index % 2 else part for index, part in enumerate(texts_and_numbers)]


def from_here(path: Path) -> Path:
    """The path as people read it: from the working folder, if it is in that."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


DEFAULT_FILES = Path("studies.files")
"""The folder of :attr:`BuildContext.files` beside the database that is used where none is named."""


@dataclasses.dataclass(frozen=True)
class KnownCheckpoints:
    """The checkpoints that a study was begun with.

    Attributes:
        sha256: of the packed trajectory.
        steps: ``[K]`` of training.
        moved: whether the study file now names another path; then the checkpoints must be at that path.
        packed: the packed trajectory on this machine, or ``None`` if it must be searched for.
    """

    sha256: str
    steps: tuple[int, ...]
    moved: bool = False
    packed: Path | None = None


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """What an objective is built with besides its settings.

    Attributes:
        directory: the study file's folder; ``None`` without a study file.
        checkpoints: the ones that the study was begun with; ``None`` for a new study.
        functions: name in the settings → function that the caller handed over, which no process can import.
        files: the folder beside the database for what is made once for its studies, and can be made again: packed
            checkpoints, statistics and features of references, data sets.
        places: text of a setting → the whole path that a stored study found there.
        samples_alone: whether models are only to be looked at, so that real images and metrics are not needed.
        found: as ``places``, of each path that was asked for.
    """

    directory: Path | None = None
    checkpoints: KnownCheckpoints | None = None
    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    files: Path = DEFAULT_FILES
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)
    samples_alone: bool = False
    found: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def path(self, path: str) -> Path:
        """A path or glob of the settings, from the root; it is noted in :attr:`found`.

        It is the one in :attr:`places`, as long as something is there. Otherwise a relative one is looked for next to
        the study file, then in the working directory. It need not exist; opening it gives the error.

        Raises:
            StudySpecError: it is no path.
        """
        absolute = self._looked_for(path).absolute()
        self.found[path] = str(absolute)
        return absolute

    def _looked_for(self, path: str) -> Path:
        """The first of its places where something is, else as it was found before or is; raises as :meth:`path`."""
        expanded = expanded_path(path, error=StudySpecError)
        stored = None
        if path in self.places:
            stored = Path(self.places[path])
            if _is_there(stored):
                return stored
        if expanded.is_absolute():
            return expanded
        folders = [Path.cwd()]
        if self.directory is not None:
            folders.insert(0, self.directory)
        places = (_place_in(folder, expanded) for folder in folders)
        return next((place for place in places if place is not None), stored or expanded)


def _is_there(path: Path) -> bool:
    """Whether something is at a whole path, or matches it as a glob."""
    return _place_in(Path(path.anchor), path.relative_to(path.anchor)) is not None


def _place_in(folder: Path, path: Path) -> Path | None:
    """A path or glob of the settings inside a folder; ``None`` if nothing is there.

    Of a glob the folder is escaped: brackets in its name are no pattern.
    """
    try:
        if (folder / path).exists():
            return folder / path
        if any(True for _ in folder.glob(str(path))):
            return glob.escape(str(folder)) / path
    except (ValueError, NotImplementedError, OSError):  # a text that is neither a path nor a glob
        return None
    return None
