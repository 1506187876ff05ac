from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "lcsc_opt").rglob("*.py")
    if "_shipped" not in path.parts
)
LIGHT = ["lcsc_opt.cli", "lcsc_opt.base.catalog", "lcsc_opt.database.store", "lcsc_opt.database.summary"]
HEAVY = ["torch", "torchvision", "diffusers", "sklearn", "plotly", "nevergrad"]

IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""

# Third-party packages stay imported, or this would take minutes; ours are all forgotten before each package, which is
# imported before anything in it is: in the order of the names, and the other way round.
IMPORT_EACH = """
import importlib, json, sys, traceback
failures = {}
for order in json.loads(sys.argv[1]):
    for known in [known for known in sys.modules if known.partition(".")[0] == "lcsc_opt"]:
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


def test_what_the_command_line_starts_with_imports_nothing_heavy():
    assert set(run_python(IMPORT_ALL, *LIGHT)).isdisjoint(HEAVY)


def test_every_module_imports_on_its_own():
    assert len(MODULES) > 20
    packages = {name: [module for module in MODULES if module.rpartition(".")[0] == name] for name in MODULES}
    orders = [[name, *modules[::step]] for name, modules in packages.items() if modules for step in (1, -1)]
    assert {name for order in orders for name in order} == set(MODULES)
    assert run_python(IMPORT_EACH, json.dumps(orders)) == {}


def test_imports_go_downwards_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
