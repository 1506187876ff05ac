"""Finds objectives, studies and dashboards: files that a user may add to, replace, or leave as shipped.

A name is looked for next to the study file, then in the working directory, then among the files that ship with the
library. An objective or a dashboard is a Python file with a function ``build``; it runs when it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import near_miss

Kind = Literal["objectives", "studies", "dashboards"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {"objectives": (".py",), "studies": (".yaml", ".yml"), "dashboards": (".py",)}

_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent
"""The folder around the folders that ship with the library: inside the wheel, or the top of a checkout."""


def entries(kind: Kind, *, beside: Path | None = None) -> dict[str, Path]:
    """Name → file of everything that can be found. Of several files with one name, the nearest counts."""
    found: dict[str, Path] = {}
    for folder in _own_folders(kind, beside):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.suffix in SUFFIXES[kind] and not path.name.startswith(("_", ".")):
                found.setdefault(path.stem, path)
    return found


def find(kind: Kind, name: str, *, beside: Path | None = None) -> Path:
    """The file of that name, given with or without its suffix, or as a path.

    Args:
        kind: which folder of the catalog.
        name: a name or a path.
        beside: the folder of the study file that asks.

    Raises:
        StudySpecError: it is not found; the message says where it was looked for and which names are known.
    """
    wanted, suffixes = Path(name).expanduser(), SUFFIXES[kind]
    # a given name may also lie directly in the study's folder and in the working directory
    folders = [*([] if beside is None else [beside]), Path(), *_own_folders(kind, beside)]
    for file in [wanted] if wanted.suffix in suffixes else [wanted.with_name(wanted.name + end) for end in suffixes]:
        for folder in folders:
            if (folder / file).is_file():
                return (folder / file).resolve()
    known = list(entries(kind, beside=beside))
    where = ", ".join(map(str, folders))
    raise StudySpecError(
        f"{name}: no such file in {kind}{near_miss(wanted.stem, known)}; looked in {where}; "
        f"known names: {', '.join(known) or 'none'}"
    )


def _own_folders(kind: Kind, beside: Path | None) -> list[Path]:
    """Folders that hold nothing but this kind of file."""
    near = [] if beside is None else [beside / kind]
    return [*near, Path(kind), SHIPPED / kind]


ORIGINALS: dict[Path, Path] = {}
"""Copy → original, which is on another machine. A copy is loaded under the module name of its original, so that its
classes can be pickled between the two machines."""


def load_file(path: Path) -> ModuleType:
    """Run a catalog file as a module of its own.

    Raises:
        StudySpecError: the file raises an error, or defines no ``build``.
    """
    original = ORIGINALS.get(path, path)
    name = f"_lcsc_{path.stem}_{hashlib.sha256(str(original).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StudySpecError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise StudySpecError(f"{path}: {type(error).__name__} while loading it: {error}") from error
    if not callable(getattr(module, "build", None)):
        del sys.modules[name]
        raise StudySpecError(f"{path}: defines no function build")
    return module
