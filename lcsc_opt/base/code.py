"""The user's own code that a study calls: its modules, and whether they changed.

A study continues only where this code is unchanged. Installed packages and this library are left out: their versions
are known.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from lcsc_opt.base.catalog import shipped_directory


def local_code(sources: Mapping[str, Path]) -> dict[str, str]:
    """Digests of the user's own modules, and of all such modules that they import anywhere in their text.

    Comments, docstrings and line breaks do not count.

    Args:
        sources: name → file; the name is the one by which other modules import it, where there is one.

    Returns:
        Name → SHA-256 in hex, sorted by name. Modules that are installed, built in or unreadable are left out.
    """
    found: dict[str, str] = {}
    waiting = dict(sources)
    while waiting:
        name, path = waiting.popitem()
        if name in found or not _is_local(path):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        found[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        files = {imported: module_file(imported) for imported in _imports(tree, package) if imported not in found}
        waiting.update({imported: file for imported, file in files.items() if file is not None})
    return dict(sorted(found.items()))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest
    return tree


@functools.cache
def library_sha256() -> str:
    """One digest of all modules of this library; it changes with the code even where the version does not."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The changed modules, in words; empty where there is none."""
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    kinds = {"changed": changed, "new": sorted(now.keys() - before.keys()), "gone": sorted(before.keys() - now.keys())}
    return "; ".join(f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names)


def module_file(name: str) -> Path | None:
    """The file of a module, found without importing it; ``None`` where it has none, or there is no such module."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    else:
        spec = _spec(name)
        file = None if spec is None else spec.origin
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
            base = _absolute(node, package)
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return {".".join(name.split(".")[: end + 1]) for name in names if name for end in range(name.count(".") + 1)}


def _absolute(node: ast.ImportFrom, package: str) -> str:
    try:
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    except ImportError:  # it goes beyond the top package
        return ""


def _is_local(path: Path) -> bool:
    resolved = path.resolve()
    if {"site-packages", "dist-packages"}.intersection(resolved.parts):
        return False
    return not any(folder in resolved.parents for folder in _folders_of_others())


@functools.cache
def _folders_of_others() -> tuple[Path, ...]:
    """Of this library, of the shipped objectives, and of Python."""
    standard = (Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib"))
    folders = (Path(__file__).parents[1], shipped_directory("objectives"), *standard)
    return tuple(folder.resolve() for folder in folders)
