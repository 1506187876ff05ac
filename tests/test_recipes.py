"""CONTRIBUTING.md is followed: each file of ``docs/recipes/`` in its place, with its lines, keeps its contract."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import script_process

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = {
    "perturb.py": "lcsc_opt/optimizers",
    "to_mean.py": "lcsc_opt/metrics",
    "npz.py": "lcsc_opt/checkpoints",
    "names.py": "dashboards",
}
FILE_OR_LINES = re.compile(r"`(?P<file>lcsc_opt/[\w/]+\.py)`|^```diff\n(?P<lines>.*?)^```$", re.M | re.S)
CHECKS = """
import sys
from pathlib import Path

import nevergrad

for name in [name for name in sys.modules if name.split(".")[0] in ("lcsc_opt", "tests")]:
    del sys.modules[name]  # those of the copy are imported again
for name in [name for name in nevergrad.optimizers.registry if name.startswith("LCSC")]:
    nevergrad.optimizers.registry.unregister(name)

import numpy as np
import torch

import lcsc_opt
from tests.contracts import check_checkpoint, check_optimizer
from tests.dashboard_site import Site, write_study
from tests.metrics.test_fidelity import test_gradient_is_that_of_central_differences as check_gradient

assert Path(lcsc_opt.__file__).parents[1] == Path.cwd()
check_optimizer("Perturb", {"mutation": 0.01})

check_gradient("to_mean", 12, 13)

weights = {"w": torch.randn(40, 30), "n": torch.tensor(3)}
np.savez("model000300.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
check_checkpoint(Path("model000300.npz"), weights, step=300)

write_study("sqlite:///studies.db", "digits/LCSC/0")
site = Site("sqlite:///studies.db")
assert "LCSC" in site.get("/lcsc/names/_dash-layout")
assert 'href="/lcsc/names"' in site.get("/lcsc/names/")
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which a contributor did what the page says."""
    folder = tmp_path_factory.mktemp("contributor")
    shutil.copytree(ROOT / "lcsc_opt", folder / "lcsc_opt", ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    (folder / "dashboards").mkdir()
    assert {path.name for path in (ROOT / "docs" / "recipes").glob("*.py")} == PLACES.keys()
    for name, place in PLACES.items():
        assert f"`docs/recipes/{name}`" in PAGE
        shutil.copy(ROOT / "docs" / "recipes" / name, folder / place)
    file = folder
    for found in FILE_OR_LINES.finditer(PAGE):
        if found["file"]:
            file = folder / found["file"]
            continue
        lines = found["lines"].splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        code = file.read_text(encoding="utf-8")
        assert code.count(before) == 1, f"{file.name}: {before}"
        file.write_text(code.replace(before, after), encoding="utf-8")
    return folder


def test_each_recipe_keeps_its_contract(followed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(followed)
    (followed / "checks.py").write_text(CHECKS)
    ended = script_process(followed / "checks.py")
    assert ended.status == 0, ended.err


def test_ruff_has_no_complaint(followed: Path) -> None:
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff"]
    configuration = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), str(followed / "lcsc_opt")]
    for command in (["check"], ["format", "--check"]):
        ended = subprocess.run([*ruff, *command, *configuration], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout
