"""The built wheel, installed outside of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("objectives", "studies", "dashboards")
OURS = ("LCSC_", "OPTUNA_", "PYTHON", "COV_")  # variables that would let this session leak into the new environment

FUNCTION = """
def loss(coefficients):
    return float(((coefficients - [0.1, -0.3, 0.4, 0.8]) ** 2).sum())
"""
STUDY = """
name: tiny
objective: {file: function.py, settings: {callable: "myfunc:loss", steps: [10, 20, 30, 40]}}
optimizers: [LCSC: {}, EMAGrid: {}]
budget: {evaluations: 12}
"""
RUN_AND_COMPARE = """
from lcsc_opt.cli import run
assert run(["run", "mine/tiny.yaml"]) == 0
print("compared:")
assert run(["compare", "tiny", "--format", "json"]) == 0
"""

pytestmark = pytest.mark.slow


def run(*command, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel, which is found before the editable lcsc_opt, with that one's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder)
    run(*pip, wheel, cwd=folder)
    return folder


def lcsc(installed: Path, *arguments: str, cwd: Path) -> str:
    assert not cwd.is_relative_to(ROOT)
    return run(sys.executable, installed / "bin" / "lcsc", *arguments, cwd=cwd, PYTHONPATH=str(installed))


def test_wheel_holds_the_library_and_the_files_of_the_catalog(wheel):
    every = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in every)
    names = {name for name in every if ".dist-info/" not in name}
    shipped = {
        f"lcsc_opt/_shipped/{path.relative_to(ROOT).as_posix()}"
        for kind in SHIPPED
        for path in (ROOT / kind).rglob("*")
        if path.suffix in {".py", ".yaml"}
    }
    assert {f"lcsc_opt/_shipped/{kind}" for kind in SHIPPED} <= {str(Path(name).parent) for name in shipped}
    assert shipped | {"lcsc_opt/py.typed", "lcsc_opt/cli/__init__.py"} <= names
    assert {name for name in names if not name.startswith("lcsc_opt/") or name.endswith(".pyc")} == set()


def test_catalog_of_an_installed_wheel_is_its_own(installed, tmp_path):
    catalog = json.loads(lcsc(installed, "list", "--catalog", "--format", "json", cwd=tmp_path))
    assert {"digits", "function"} <= set(catalog["objectives"])
    assert "digits" in catalog["studies"]
    for files in catalog.values():
        assert all(Path(path).is_relative_to(installed) for path in files.values())
    assert list(tmp_path.iterdir()) == []


def test_installed_wheel_runs_and_compares_a_study(installed, tmp_path):
    study = tmp_path / "mine" / "tiny.yaml"
    study.parent.mkdir()
    study.write_text(STUDY)
    study.with_name("myfunc.py").write_text(FUNCTION)
    said = run(sys.executable, "-c", RUN_AND_COMPARE, cwd=tmp_path, PYTHONPATH=str(installed))
    compared = json.loads(said.rpartition("compared:")[2])
    assert {row["study"] for row in compared} == {"tiny/LCSC/0", "tiny/EMAGrid/0"}
    for row in compared:
        assert row["state"] == "finished"
        assert row["searched"] < 1
        assert 0 < row["evaluations"] <= 12
