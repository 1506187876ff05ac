from __future__ import annotations

import ast
import graphlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lcsc_opt

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "lcsc_opt").rglob("*.py")
    if "_shipped" not in path.parts
}
PAGES = [f"dashboards.{path.stem}" for path in (ROOT / "dashboards").glob("*.py")]
HEAVY = {"torch", "torchvision", "diffusers", "sklearn", "plotly", "nevergrad"}
HEAVIER = HEAVY | {"optuna", "sqlalchemy", "scipy", "pandas"}

IMPORT_IN_TURN = """
import json, logging, os, pkgutil, sys
def state():
    log = logging.getLogger("lcsc_opt")
    return dict(os.environ), sys.path[:], sys.meta_path[:], log.level, [type(handler) for handler in log.handlers]
before = state()
found = []
for names in json.loads(sys.argv[1]):
    for name in names:
        pkgutil.resolve_name(name)
    found.append(sorted(sys.modules))
*after, handlers = state()
changes = after != [*before[:-1]] or handlers not in ([], [logging.NullHandler])
print(json.dumps([changes, found]))
"""
LIGHT = {
    ("lcsc_opt.cli", "lcsc_opt.base.catalog"): HEAVIER,
    ("lcsc_opt.evaluation.process", "lcsc_opt.evaluation.ray"): HEAVIER,  # which are there before a worker's variables
    ("lcsc_opt.database.store", "lcsc_opt.database.history"): HEAVY,
    ("lcsc_opt.views.report", "lcsc_opt.cli.results", "lcsc_opt.views.dashboard.server", *PAGES): {"torch"},
}
LIGHT_IN_PYTHON = {
    ("lcsc_opt.LcscError", "lcsc_opt.SearchFailedError"): HEAVIER,
    ("lcsc_opt.search", "lcsc_opt.run"): {"plotly", "dash"},  # until something is drawn
    tuple(f"lcsc_opt.{name}" for name in lcsc_opt.__all__): set(),
}


@pytest.mark.parametrize("light", [LIGHT, LIGHT_IN_PYTHON])
def test_commands_and_workers_import_nothing_heavy_and_the_dashboard_no_torch(
    light: Mapping[tuple[str, ...], set[str]],
):
    command = [sys.executable, "-W", "error", "-c", IMPORT_IN_TURN, json.dumps(list(light))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    changes, modules = json.loads(done.stdout)
    for heavy, found in zip(light.values(), modules, strict=True):
        assert heavy.isdisjoint(found)
    assert not changes or light is LIGHT, "an application keeps its environment, its paths and its logging"


def outside_of_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from outside_of_functions(child)


def imported(module: str) -> set[str]:
    """What of ours is imported with a module, and the packages around that which are not around the module."""
    names = set()
    for node in outside_of_functions(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= set(MODULES) else {str(node.module), *inner}
    around = {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}
    return (names | {name for name in around if not module.startswith(f"{name}.")}) & set(MODULES) - {module}


def test_every_module_imports_on_its_own():
    """There is no circle; the layers are checked, but not within a package."""
    assert len(MODULES) > 20
    graphlib.TopologicalSorter({module: imported(module) for module in MODULES}).prepare()


WRITTEN = [
    *ROOT.glob("*.md"),
    *(
        path
        for folder in ("lcsc_opt", "objectives", "studies", "dashboards", "benchmarks", "docs", "tests")
        for suffix in ("py", "md", "yaml", "jinja")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if "_shipped" not in path.parts
    ),
]
NOWHERE = {
    "lcsc_opt.nothing",  # of a test of what happens then
    *("lcsc_opt.checkpoints.npz", "lcsc_opt.metrics.to_mean", "lcsc_opt.optimizers.perturb"),  # of recipes
}
MADE = {"benchmarks/results/optimizers.db", "docs/_build/html/index.html"}  # by `make`, and not kept with the code


def written(pattern: str, suffix: str = "") -> dict[str, str]:
    """What the pattern finds in our files → one of the files."""
    return {
        found: str(path.relative_to(ROOT))
        for path in WRITTEN
        if path.name.endswith(suffix)
        for found in re.findall(pattern, path.read_text())
    }


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {}) and part == parts[-1]
            found = getattr(found, part)
        return True
    return False


def test_every_name_of_ours_that_is_written_somewhere_exists():
    names = written(r"\blcsc_opt(?:\.[A-Za-z_]\w*)+")
    assert len(names) > 100
    assert {name: path for name, path in names.items() if name not in NOWHERE and not exists(name)} == {}
    assert not any(exists(f"lcsc_opt.{place}.nothing") for place in ("search", "base.errors", "base.errors.LcscError"))


def test_every_file_of_ours_that_the_documents_name_exists():
    folders = "lcsc_opt|tests|benchmarks|objectives|studies|dashboards|docs"
    files = written(rf"(?<![\w/.-])(?:{folders})/[\w/-]*(?:\.\w+)*", suffix=".md")
    assert len(files) > 50
    assert {file: path for file, path in files.items() if file not in MADE and not (ROOT / file).exists()} == {}
