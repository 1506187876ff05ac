"""The user's own code that a study calls: its modules, and whether their bytes changed.

Installed packages, Python and this library are left out: their versions are known.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import logging
import re
import sys
import sysconfig
import tokenize
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base import IMPORTED_AT
from lcsc_opt.base.paths import SHIPPED

_log = logging.getLogger("lcsc_opt")
_STANDARD_LIBRARY = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")]
_NOT_LOCAL = {folder.resolve() for folder in (Path(__file__).parents[1], SHIPPED / "objectives", *_STANDARD_LIBRARY)}
_MODULE_AND_FUNCTION = re.compile(r"\"([^\":/\\]+):[^\W\d]\w*\"")  # a script may be called 01_search
_LAYOUT_TOKENS = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_INSTALLED = {"site-packages", "dist-packages"}

_digests_at_import: dict[str, str] = {}
"""Local module → the digest of its code, and of all local code that it imports, when it was last imported for us."""


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """A file of the user's own code.

    Attributes:
        path: of the file.
        sha256: of its code, in hex, without comments and without what runs only where the file is the script.
        imported_names: of all modules that it may import.
    """

    path: Path
    sha256: str
    imported_names: frozenset[str]


def local_code(sources: Mapping[str, Path]) -> dict[str, str]:
    """Digests of the user's own files, and of all local modules that they import anywhere in their text.

    Args:
        sources: name → file; the name is the one by which other modules import it, if there is one.

    Returns:
        Name → :attr:`CodeFile.sha256`, sorted by name.
    """
    return {name: source.sha256 for name, source in sorted(_local_sources(sources).items())}


def code_of_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, CodeFile]:
    """An objective's file and the modules that its settings name as ``module:function``, with all that these import.

    Returns:
        Name → file; only the user's own. A module has the name by which it is imported, and the objective's file, which
        is not imported by name, its file name: ``score.py``.
    """
    sources = {path.name: path}
    for module in _modules_in(settings):
        file = module_file(module)
        if file is not None:
            sources[module] = file
    return _local_sources(sources)


def _modules_in(settings: Mapping[str, Any]) -> list[str]:
    """The modules of the functions that settings name."""
    named: list[str] = _MODULE_AND_FUNCTION.findall(json.dumps(settings, ensure_ascii=False))
    return named


def code_reached(code: Mapping[str, CodeFile], file: str, settings: Mapping[str, Any]) -> Collection[str]:
    """The names in ``code`` of an objective's file, of the modules that these settings name, and of what they import.

    Args:
        code: as :func:`code_of_settings` gives it.
        file: the file's name.
        settings: those that count.
    """
    return _closure({file, *_modules_in(settings)} & code.keys(), code).keys()


def _local_sources(sources: Mapping[str, Path]) -> dict[str, CodeFile]:
    """The user's own files, and all local modules that they import, in no particular order.

    A file that cannot be read, or is not Python, is left out.

    Args:
        sources: as for :func:`local_code`.
    """
    visited: dict[str, CodeFile] = {}
    waiting = dict(sources)
    while waiting:
        name, path = waiting.popitem()
        if name in visited or not _is_local(path):
            continue
        try:
            content = path.read_bytes()
            imported_names = _imported_names(content, _package_of(name, path))
        except (OSError, SyntaxError, ValueError):
            continue
        visited[name] = CodeFile(path, _sha256_of_code(content), imported_names)
        for imported in imported_names - visited.keys():
            file = module_file(imported)
            if file is not None:
                waiting[imported] = file
    return visited


def _is_local(path: Path) -> bool:
    """Whether a file is the user's own: not of Python, of an installed package or of this library."""
    resolved = path.resolve()
    return _NOT_LOCAL.isdisjoint(resolved.parents) and _INSTALLED.isdisjoint(resolved.parts)


def _package_of(name: str, path: Path) -> str:
    """The package that relative imports of this module start from."""
    if path.name == "__init__.py":
        return name
    return name.rpartition(".")[0]


@functools.lru_cache(maxsize=1024)
def _sha256_of_code(content: bytes) -> str:
    """SHA-256 of what a file does when it is imported: without comments, blank lines and the calls of a script."""
    try:
        code = _code_of(importlib.util.decode_source(content))
    except (SyntaxError, ValueError, tokenize.TokenError):
        code = content  # Python may take it all the same, as with Latin-1 in comments
    return hashlib.sha256(code).hexdigest()


def _code_of(text: str) -> bytes:
    """The lines that have code."""
    lines = text.split("\n")
    rows: set[int] = set()  # that have code, from 1
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif token.type not in _LAYOUT_TOKENS:
            rows.update(range(row, token.end[0] + 1))
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.If) and _is_call_of_script(node, tree):
            rows.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return "\n".join(lines[row - 1] for row in sorted(rows)).encode(errors="surrogatepass")


def _is_call_of_script(block: ast.If, tree: ast.Module) -> bool:
    """Whether it is ``if __name__ == "__main__":``, and gives the rest of the file nothing that may decide a loss."""
    if ast.unparse(block.test) != "__name__ == '__main__'" or block.orelse:
        return False
    bound = set()
    for node in ast.walk(block):
        is_stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            return False
        if is_stored and isinstance(node, ast.Attribute | ast.Subscript):
            return False
        if is_stored and isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    outside = itertools.chain.from_iterable(ast.walk(node) for node in tree.body if node is not block)
    return bound.isdisjoint(node.id for node in outside if isinstance(node, ast.Name))


@functools.lru_cache(maxsize=1024)
def _imported_names(content: bytes, package: str) -> frozenset[str]:
    """Every module that the imports in a file may run: ``from a.b import c`` runs ``a``, ``a.b`` and perhaps ``a.b.c``.

    Args:
        content: of the file.
        package: that relative imports start from.

    Raises:
        SyntaxError, ValueError: the content is not Python.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative_name = "." * node.level + (node.module or "")
            try:
                base = importlib.util.resolve_name(relative_name, package)
            except ImportError:  # it goes beyond the top package
                continue
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    with_packages: set[str] = set()  # each package around a module runs, too
    for name in names:
        while name:
            with_packages.add(name)
            name = name.rpartition(".")[0]
    return frozenset(with_packages)


def module_file(name: str) -> Path | None:
    """The file of a module, without importing it; ``None`` if it has none, or there is no such module."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        if file is None:
            return None
        return Path(file)
    spec = _spec(name)
    if spec is None or spec.origin is None or not spec.has_location:  # the origin of a built-in module is no file
        return None
    return Path(spec.origin)


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module would be loaded from, or ``None``; no package around it is imported."""
    parent, _, last_part = name.rpartition(".")
    try:
        if not parent:
            return importlib.util.find_spec(name)
        package = _spec(parent)
        if package is None or package.submodule_search_locations is None:
            return None
        # by the last part: with its whole name, a folder without __init__.py is looked up in its parent, which may not
        # be imported
        return importlib.machinery.PathFinder.find_spec(last_part, package.submodule_search_locations)
    except (ImportError, ValueError, AttributeError):  # a parent that is no package, a module without a spec
        return None


def forget_changed_modules(sources: Mapping[str, Path]) -> str:
    """Call this before user code is imported: modules that were edited since their import are imported again.

    Without it, the next study in this process would evaluate the old code and store the digest of the new one. A module
    counts as edited if its own bytes have changed, or those of a local module that it imports.

    Args:
        sources: as for :func:`local_code`.

    Returns:
        A digest of all that code.
    """
    importlib.invalidate_caches()  # else Python may miss a module that was written a moment ago
    all_sources = _local_sources(sources)
    for name, source in all_sources.items():
        if name == "__main__" or source.path != module_file(name):  # the script, and files that no module imports
            continue
        closure = _closure({name}, all_sources)
        digest = _digest(closure)
        if name in sys.modules and _was_edited(name, digest, closure):
            _log.debug("%s was edited and is imported again", name)
            _forget(name, source.path)
        _digests_at_import[name] = digest
    return _digest(all_sources)


def _closure(names: Collection[str], all_sources: Mapping[str, CodeFile]) -> dict[str, CodeFile]:
    """Local modules and all that they import."""
    closure: dict[str, CodeFile] = {}
    waiting = set(names)
    while waiting:
        member = waiting.pop()
        closure[member] = all_sources[member]
        waiting |= (closure[member].imported_names & all_sources.keys()) - closure.keys()
    return closure


def _digest(sources: Mapping[str, CodeFile]) -> str:
    digests = {name: source.sha256 for name, source in sources.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _was_edited(name: str, digest: str, closure: Mapping[str, CodeFile]) -> bool:
    """Whether an imported module may be of other code than its files have now."""
    if name in _digests_at_import:
        return _digests_at_import[name] != digest
    # the user's script imported it, and nobody knows which bytes it had then
    return any(source.path.stat().st_mtime > IMPORTED_AT for source in closure.values())


def _forget(name: str, path: Path) -> None:
    """Drop a module from ``sys.modules``, with its submodules and the bytecode on the disk.

    Python compares bytecode with the source's size and its time in whole seconds, so it would miss a quick edit.
    """
    for loaded in list(sys.modules):
        if loaded == name or loaded.startswith(f"{name}."):
            del sys.modules[loaded]
    parent_name, _, last_part = name.rpartition(".")
    parent = sys.modules.get(parent_name)
    if hasattr(parent, last_part):  # where `from parent import name` finds it; a top-level module has no parent
        delattr(parent, last_part)
    with contextlib.suppress(OSError, NotImplementedError):
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
