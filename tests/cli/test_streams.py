"""What a command prints, whatever its streams are, its files are called, and the user's code prints."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from optuna.storages import RDBStorage

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.views.report import write_report
from tests import study_examples
from tests.dashboard_site import Site
from tests.processes import lcsc_process

LATIN_1 = os.fsdecode(b"caf\xe9")
SCORE = """
import os

def build():
    import torch  # here, since it would be most of a worker's start
    return torch.nn.Linear(3, 1, bias=False)

calls = 0

def talk():
    print("from the score")
    os.write(1, b"from a library\\n")
    os.system("echo from another process")

def distance(coefficients):
    talk()
    return float((coefficients ** 2).sum())

def loss(model, draw):
    global calls
    calls += 1
    talk()
    if calls == 6:
        raise ValueError("cannot read " + os.fsdecode(b"caf\\xe9.png"))
    return float((model.weight.detach() ** 2).mean())
"""
STUDY = {
    "name": "tiny",
    "objective": {
        "file": "score.py",
        "settings": {"checkpoints": "ck/*.pt", "model": "printing:build", "score": "printing:loss"},
    },
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 4},
}
FUNCTION = {"file": "function.py", "settings": {"callable": "printing:distance", "steps": [100, 200, 300]}}


def write_study(folder: Path) -> None:
    """A study whose score prints, and fails with a name that is not UTF-8."""
    import torch

    (folder / "ck").mkdir(parents=True)
    for step in (100, 200, 300):
        torch.save({"weight": torch.full((1, 3), step / 100)}, folder / f"ck/m-{step}.pt")
    (folder / "printing.py").write_text(SCORE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "function.yaml").write_text(yaml.safe_dump({**STUDY, "name": "function", "objective": FUNCTION}))


@pytest.fixture
def study(workplace: Path) -> Path:
    write_study(workplace)
    return workplace


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is not UTF-8, in which the study has run."""
    folder = tmp_path_factory.mktemp("ran") / LATIN_1
    write_study(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = lcsc_process("run", "tiny.yaml")
    assert ended.status == 0, ended.err
    assert ended.out == ""  # although the score prints
    return folder


@pytest.fixture
def ran(ran_once: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is the working directory."""
    monkeypatch.chdir(ran_once)
    return ran_once


def encoded_in(encoding: str) -> None:
    """As Python opens them where this is the locale's encoding."""
    sys.stdout = Path("/dev/fd/1").open("w", encoding=encoding)  # noqa: SIM115
    sys.stderr = Path("/dev/fd/2").open("w", encoding=encoding, errors="backslashreplace")  # noqa: SIM115


# narrow streams


@pytest.mark.parametrize(
    ("command", "status", "said"), [("compare tiny", 0, r"\u2013"), ("run Σ.yaml", 2, r"\u03a3.yaml: no such file")]
)
def test_what_an_encoding_lacks_is_escaped(ran: Path, command: str, status: int, said: str) -> None:
    found = lcsc_process(*command.split(), first=functools.partial(encoded_in, "latin-1"))
    assert found.status == status
    assert said in found.out + found.err


# what is no result


WORDS = ("from the score", "from a library", "from another process")


def test_what_the_users_code_prints_is_not_in_the_result(ran: Path) -> None:
    found = lcsc_process("evaluate", "tiny", "--format", "json")
    assert json.loads(found.out)["found"].keys() == {"tiny/LCSC/0"}
    for words in WORDS:
        assert words in found.err


def test_what_the_users_code_prints_in_workers_is_no_result_either(study: Path) -> None:
    found = lcsc_process("run", "function.yaml", "workers=2")
    assert found.status == 0
    assert found.out == ""
    for words in WORDS:
        assert words in found.err


# names that are not UTF-8


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "show tiny/LCSC/0 --format json",
        "report tiny",
        "export tiny -o {here}/best.json",
        "apply uniform {here}/ck/*.pt -o {here}/uniform.safetensors --overwrite",
        "trajectory pack {here}/ck -o {here}/packed.trajectory --overwrite",
    ],
)
def test_a_folder_whose_name_is_not_utf_8_is_as_good_as_another(ran: Path, command: str) -> None:
    found = lcsc_process(*command.format(here=ran).split())
    assert (found.status, "Error" in found.err) == (0, False), found.err


def test_the_study_file_that_init_writes_names_such_a_folder(ran: Path) -> None:
    assert lcsc_process("init", "score", f"{ran}/ck", "-o", "found.yaml", "maximize=false", "size=null").status == 0
    settings = parse_yaml(Path("found.yaml").read_text())["objective"]["settings"]
    assert settings["checkpoints"] == f"{ran}/ck"


def test_pages_over_a_database_in_such_a_folder(ran_once: Path, workplace: Path) -> None:
    site = Site(f"sqlite:///{ran_once}/studies.db")
    for page in ("compare", "study", "images", "landscape"):
        assert r"caf\udce9/studies.db" in site.get(f"/lcsc/{page}/")


def test_a_reason_of_an_older_version_can_be_reported(storage: RDBStorage, workplace: Path) -> None:
    """It was stored as it was raised."""
    study = study_examples.write_study(storage, "tiny/LCSC/0", [3.0, 2.0])
    study_examples.add_result(study, 2, None, reason=f"ValueError: {LATIN_1}")
    write_report(storage, "tiny", Path("tiny.html"))
    assert r"caf\udce9" in Path("tiny.html").read_text()
