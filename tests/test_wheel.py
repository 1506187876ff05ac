"""The built wheel, installed outside of the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("objectives", "studies", "dashboards")
OURS = ("LCSC_", "OPTUNA_", "PYTHON", "COV_")  # variables that would let this session leak into the new environment
SHORTER = {  # of the notebook's study
    # one more image than features
    '"images": 500': '"images": 65, "nfe": 2, "select": {"last": 3}, "held_out_metrics": []',
    '"evaluations": 40': '"evaluations": 3',
    '"images": 2000, "top": 2': '"images": 65, "top": 1',
}
FIRST = """
import lcsc_opt.exports.images
import lcsc_opt.sampling.layout

lcsc_opt.exports.images.PAIRS = 40
lcsc_opt.sampling.layout.SECONDS_TO_SHORTEN = 1e9  # as in conftest.py
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
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lcsc_opt").rglob("*.py") if path.is_file()}
    assert shipped | modules | {"lcsc_opt/py.typed", "lcsc_opt/cli/__init__.py"} <= names
    assert {name for name in names if not name.startswith("lcsc_opt/") or name.endswith(".pyc")} == set()


def test_catalog_of_an_installed_wheel_is_its_own(installed, tmp_path):
    printed = "print(*(file for kind in SUFFIXES for file in entries(kind).values()), sep='\\n')"
    code = f"from lcsc_opt.base.catalog import *; {printed}"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert {"trained.py", "function.py", "digits.yaml"} <= {Path(path).name for path in files}
    assert all(Path(path).is_relative_to(installed) for path in files)
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_runs_where_only_the_wheel_is(installed, tmp_path):
    """Its cells, one after the other, with a shorter search; ``%pip`` is left out, as outside of Colab."""
    notebook = json.loads((ROOT / "docs" / "tutorials" / "mnist.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join([FIRST, *cells]).replace("%pip install", "pass  #")
    for setting, shorter in SHORTER.items():
        assert setting in code
        code = code.replace(setting, shorter)
    (tmp_path / "cells.py").write_text(code + "\nprint(lcsc_opt.__file__)\n", encoding="utf-8")
    variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    said = run(sys.executable, "cells.py", cwd=tmp_path, **variables)
    assert re.search(r"^EMA\*   [0-9.]+\nfound  [0-9.]+\n[0-9]+ tensors, [0-9]+ numbers\n", said)
    assert Path(said.splitlines()[-1]).is_relative_to(installed)
