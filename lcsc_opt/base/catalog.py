"""Finds objectives, studies and dashboards: files that a user may add to, replace, or leave as shipped.

A name is searched for next to the study file, then in the working directory, in both also in the folder ``objectives``,
``studies`` or ``dashboards``, then among the files that ship with the library. An objective or a dashboard is a Python
file with a function ``build``; it runs when it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

from lcsc_opt.base.code import forget_changed_modules
from lcsc_opt.base.errors import RAISED_BY_USERS, StudySpecError
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.paths import SHIPPED, expanded_path
from lcsc_opt.base.settings import near_miss

Kind = Literal["objectives", "studies", "dashboards"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "objectives": (".py",),
    "studies": (".yaml", ".yml"),
    "dashboards": (".py",),
}

_loaded: dict[Path, tuple[ModuleType, str]] = {}
"""File → its module, and the digest of all local code that it was loaded with."""


def entries(kind: Kind, *, study_folder: Path | None = None) -> dict[str, Path]:
    """Name → file of every entry. Of several files with one name, the nearest counts."""
    folders = [Path(kind), SHIPPED / kind]
    if study_folder is not None:
        folders.insert(0, study_folder / kind)
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES[kind] and not path.name.startswith(("_", ".")):
                files.setdefault(path.stem, path)
    return files


def find(kind: Kind, name: str, *, study_folder: Path | None = None) -> Path:
    """The file of that name, with any suffix of its kind or without one, or of that path; the nearest of several.

    Args:
        kind: which folder of the catalog.
        name: a name or a path.
        study_folder: the folder of the study file that asks.

    Raises:
        StudySpecError: there is no such file; the message lists the folders that were searched, and all names. Or the
            system refuses the name.
    """
    path = expanded_path(name, error=StudySpecError)
    places = [place for place in (study_folder, Path()) if place is not None]
    folders = [*(folder for place in places for folder in (place, place / kind)), SHIPPED / kind]
    candidates = _candidates(kind, path)
    for folder in folders:
        for candidate in candidates:
            if (folder / candidate).is_file():
                return (folder / candidate).resolve()
    names = list(entries(kind, study_folder=study_folder))
    raise StudySpecError(
        f"{name}: no such file in {kind}{near_miss(path.stem, names)}; looked for {' and '.join(SUFFIXES[kind])} in "
        f"{', '.join(map(str, folders))}; known names: {', '.join(names) or 'none'}"
    )


def _candidates(kind: Kind, path: Path) -> list[Path]:
    """The files that a name may stand for. With a suffix, also one with the other: both of ``.yaml`` and ``.yml`` are
    common.
    """
    suffixes = SUFFIXES[kind]
    if not path.name:  # of `.` and `/`
        return []
    if path.suffix in suffixes:
        return [path, *(path.with_suffix(suffix) for suffix in suffixes)]
    return [path.with_name(path.name + suffix) for suffix in suffixes]


def advice_if_hiding(path: Path) -> str:
    """The end of a message about a file of the user's that stands in the way of one that ships with the library.

    It is empty where none of them has this name.
    """
    shipped = {file for kind in SUFFIXES for file in (SHIPPED / kind).glob(path.name)}
    if not shipped or path.resolve() in {file.resolve() for file in shipped}:
        return ""
    return f"; it hides the {path.name} of lcsc_opt: if that is not meant, rename it"


def load_file(path: Path) -> ModuleType:
    """Run a catalog file as a separate module; a file that has not changed, nor anything that it imports, runs once.

    The module's name is derived from the file's name and content. So its classes can be pickled between processes, and
    between machines that have their own copies of the file.

    Raises:
        StudySpecError: the file cannot be read, raises an error, or defines no ``build``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudySpecError(f"{path}: cannot be read: {error.strerror}") from error
    stem = path.stem.replace(".", "_")  # a dot would make it a module of a package, which pickle imports
    name = f"_lcsc_{stem}_{hashlib.sha256(content).hexdigest()[:16]}"
    digest = forget_changed_modules({path.name: path})
    if path in _loaded:
        module, loaded_digest = _loaded[path]
        if (module.__name__, loaded_digest) == (name, digest):
            sys.modules[name] = module  # a copy of the file may have replaced it under this name
            return module
        sys.modules.pop(module.__name__, None)
    module = _run_as_module(name, path, content)
    _loaded[path] = (module, digest)
    return module


def _run_as_module(name: str, path: Path, content: bytes) -> ModuleType:
    """Run the content of a file as a module, which ``sys.modules`` keeps; raises as :func:`load_file`."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise StudySpecError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    allow_mismatched_torchvision()
    try:
        # not by its loader, which would read a file again that may have changed; and without this file's __future__
        exec(compile(content, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the bytes in its name
    except RAISED_BY_USERS as error:
        del sys.modules[name]
        reason = f"{type(error).__name__} while loading it: {error}"
        raise StudySpecError(f"{path}: {reason}{advice_if_hiding(path)}") from error
    if not callable(getattr(module, "build", None)):
        del sys.modules[name]
        raise StudySpecError(f"{path}: defines no function build{advice_if_hiding(path)}")
    return module
