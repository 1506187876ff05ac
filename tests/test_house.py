from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "lcsc_opt").rglob("*.py")
    if "_shipped" not in path.parts
)
HEAVY = {"torch", "torchvision", "diffusers", "sklearn", "plotly", "nevergrad"}
HEAVIER = HEAVY | {"optuna", "sqlalchemy", "scipy", "pandas"}

IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""

# Each package is forgotten with all in it, and imported again before anything in it is: in the order of the names, and
# the other way round. What it uses of others stays imported: the layers are checked, so circles are within a package.
IMPORT_EACH = """
import functools, importlib, json, sys, traceback
from importlib.machinery import SourceFileLoader
SourceFileLoader.get_code = functools.cache(SourceFileLoader.get_code)
failures = {}
for order in json.loads(sys.argv[1]):
    for known in [known for known in sys.modules if f"{known}.".startswith(f"{order[0]}.")]:
        del sys.modules[known]
    for name in order:
        try:
            importlib.import_module(name)
        except BaseException:
            failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


def run_python(code: str, *arguments: str):
    """What the code printed, as JSON, in an interpreter of its own where every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        (["lcsc_opt.cli", "lcsc_opt.base.catalog"], HEAVIER),
        (["lcsc_opt.database.store", "lcsc_opt.database.history"], HEAVY),
    ],
)
def test_what_the_command_line_starts_with_imports_nothing_heavy(names, heavy):
    assert heavy.isdisjoint(run_python(IMPORT_ALL, *names))


@pytest.mark.slow
def test_every_module_imports_on_its_own():
    assert len(MODULES) > 20
    packages = {name: [module for module in MODULES if module.rpartition(".")[0] == name] for name in MODULES}
    orders = [[name, *modules[::step]] for name, modules in packages.items() if modules for step in (1, -1)]
    assert {name for order in orders for name in order} == set(MODULES)
    assert run_python(IMPORT_EACH, json.dumps(orders)) == {}


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
NOWHERE = {"lcsc_opt.nothing"}  # of a test of what happens then
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
