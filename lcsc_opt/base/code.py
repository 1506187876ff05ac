"""The user's own code that a study calls: its modules, and whether their bytes changed.

Installed packages, Python and this library are left out: their versions are known.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from lcsc_opt.base.catalog import SHIPPED


def local_code(sources: Mapping[str, Path]) -> dict[str, str]:
    """Digests of the user's own files, and of all local modules that they import anywhere in their text.

    Args:
        sources: name → file; the name is the one by which other modules import it, if there is one.

    Returns:
        Name → SHA-256 of the file's bytes in hex, sorted by name.
    """
    found: dict[str, str] = {}
    waiting = dict(sources)
    while waiting:
        name, path = waiting.popitem()
        resolved = path.resolve()
        local = _OTHERS.isdisjoint(resolved.parents) and _INSTALLED.isdisjoint(resolved.parts)
        if name in found or not local:
            continue
        try:
            content = path.read_bytes()
            tree = ast.parse(content)
        except (OSError, SyntaxError, ValueError):
            continue
        found[name] = hashlib.sha256(content).hexdigest()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        files = {imported: module_file(imported) for imported in _imports(tree, package) if imported not in found}
        waiting.update({imported: file for imported, file in files.items() if file is not None})
    return dict(sorted(found.items()))


def module_file(name: str) -> Path | None:
    """The file of a module, found without importing it, or ``None`` if it has none, or there is no such module."""
    file = getattr(sys.modules[name], "__file__", None) if name in sys.modules else getattr(_spec(name), "origin", None)
    return None if file is None else Path(file)


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    parent = name.rpartition(".")[0]
    try:
        if not parent:
            return importlib.util.find_spec(name)
        package = _spec(parent)
        if package is None or package.submodule_search_locations is None:
            return None
        return importlib.machinery.PathFinder.find_spec(name, package.submodule_search_locations)
    except (ImportError, ValueError, AttributeError):  # a parent that is no package, a module without a spec
        return None


def _imports(tree: ast.AST, package: str) -> set[str]:
    """Every module that an import may mean: for ``from a.b import c``, these are ``a``, ``a.b`` and ``a.b.c``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{'.' * node.level}{node.module or ''}"
            try:
                base = importlib.util.resolve_name(base, package)
            except ImportError:  # it goes beyond the top package
                continue
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return {".".join(name.split(".")[: end + 1]) for name in names if name for end in range(name.count(".") + 1)}


_STANDARD = (Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib"))
_OTHERS = {folder.resolve() for folder in (Path(__file__).parents[1], SHIPPED / "objectives", *_STANDARD)}
_INSTALLED = {"site-packages", "dist-packages"}
