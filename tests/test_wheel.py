"""The built wheel, alone in an environment of its own, outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("objectives", "studies", "dashboards")
OURS = (
    "LCSC_",
    "OPTUNA_",
    "PYTHON",
    "COV_",
)  # variables that would let this session leak into the new environment

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

pytestmark = pytest.mark.slow


def run(*command, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
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
def scripts(wheel, tmp_path_factory) -> Path:
    """Where the commands of an environment are that has the wheel, and sees the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    run(folder / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=environment)
    # After the installation: pip would take the editable lcsc_opt of this environment for the wheel's.
    (site_packages,) = environment.glob("**/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(outer)) + "\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    assert not tmp_path.is_relative_to(ROOT)
    return tmp_path


def test_wheel_holds_the_library_and_the_files_of_the_catalog(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = {
        f"lcsc_opt/_shipped/{path.relative_to(ROOT).as_posix()}"
        for kind in SHIPPED
        for path in (ROOT / kind).rglob("*")
        if path.suffix in {".py", ".yaml"}
    }
    assert {f"lcsc_opt/_shipped/{kind}" for kind in SHIPPED} <= {str(Path(name).parent) for name in shipped}
    assert shipped | {"lcsc_opt/py.typed", "lcsc_opt/cli/__init__.py"} <= names
    assert {name for name in names if not name.startswith("lcsc_opt/") or name.endswith(".pyc")} == set()


def test_wheel_carries_its_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_catalog_of_an_installed_wheel_is_its_own(scripts, elsewhere):
    imported = run(scripts / "python", "-c", "import lcsc_opt; print(lcsc_opt.__file__)", cwd=elsewhere)
    assert Path(imported.strip()).is_relative_to(scripts.parent)
    catalog = json.loads(run(scripts / "lcsc", "list", "--catalog", "--format", "json", cwd=elsewhere))
    assert {"digits", "function"} <= set(catalog["objectives"])
    assert "digits" in catalog["studies"]
    for files in catalog.values():
        assert all(Path(path).is_relative_to(scripts.parent) for path in files.values())
    assert list(elsewhere.iterdir()) == []


def test_installed_wheel_runs_and_compares_a_study(scripts, elsewhere):
    study = elsewhere / "mine" / "tiny.yaml"
    study.parent.mkdir()
    study.write_text(STUDY)
    study.with_name("myfunc.py").write_text(FUNCTION)
    run(scripts / "lcsc", "run", "mine/tiny.yaml", cwd=elsewhere)
    compared = json.loads(run(scripts / "lcsc", "compare", "tiny", "--format", "json", cwd=elsewhere))
    assert {row["study"] for row in compared} == {"tiny/LCSC/0", "tiny/EMAGrid/0"}
    for row in compared:
        assert row["state"] == "finished"
        assert row["searched"] < 1
        assert 0 < row["evaluations"] <= 12
