"""Where files that a study names are looked for, and where what can be made again is kept."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

_study_directory: contextvars.ContextVar[Path | None] = contextvars.ContextVar("study_directory", default=None)


def cache_directory() -> Path:
    """Where trained models and statistics are kept: ``LCSC_CACHE``, else ``lcsc_opt`` in the user's cache folder."""
    chosen = os.environ.get("LCSC_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcsc_opt"


@dataclasses.dataclass(frozen=True)
class KnownCheckpoints:
    """The checkpoints that a study was begun with.

    Attributes:
        sha256: of the packed trajectory.
        steps: ``[K]`` of training.
        moved: whether the study file names another place now, where they have to be.
        selected: whether they were chosen among more.
        packed: where they lie packed on this machine, where that is known.
    """

    sha256: str
    steps: tuple[int, ...]
    moved: bool = False
    selected: bool = False
    packed: Path | None = None


_known_checkpoints: contextvars.ContextVar[KnownCheckpoints | None] = contextvars.ContextVar(
    "known_checkpoints", default=None
)


@contextlib.contextmanager
def study_checkpoints(known: KnownCheckpoints | None) -> Iterator[None]:
    """While this is open, :func:`known_checkpoints` are these."""
    token = _known_checkpoints.set(known)
    try:
        yield
    finally:
        _known_checkpoints.reset(token)


def known_checkpoints() -> KnownCheckpoints | None:
    """Those of the study whose objective is being loaded; ``None`` where it is new."""
    return _known_checkpoints.get()


@contextlib.contextmanager
def study_directory(directory: Path | None) -> Iterator[None]:
    """While this is open, :func:`given_path` looks beside the study file in ``directory`` first."""
    token = _study_directory.set(directory)
    try:
        yield
    finally:
        _study_directory.reset(token)


def given_path(path: str) -> Path:
    """A path or glob of a study file: relative ones are taken from beside the study file, else from where we are.

    Nothing has to be there: what is there beside the study file comes first, and whoever opens the path complains.
    """
    given = Path(path).expanduser()
    directory = _study_directory.get()
    if directory is None or given.is_absolute():
        return given
    beside = directory / given
    return beside if _is_there(directory, given) else given


def _is_there(directory: Path, path: Path) -> bool:
    """Whether a path or a glob finds anything; what can be neither finds nothing."""
    try:
        return (directory / path).exists() or next(directory.glob(str(path)), None) is not None
    except (ValueError, NotImplementedError, OSError):
        return False
