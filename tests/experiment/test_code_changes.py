"""An experiment goes on only with the code that it was begun with, or where somebody says so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt import load_study
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment, sample_of, valid_trials
from lcsc_opt.database.measurement import Sample
from lcsc_opt.metrics.extractors.by_name import find_extractor
from tests.commands import Typed
from tests.study_examples import stored_report

LOSS = """
import functools
from edited_helper import SCALE

def traced(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)
    return call

@traced
def lose(coefficients):
    return SCALE * float((coefficients ** 2).sum())
"""
STUDY = """
name: edited
objective:
  file: function.py
  settings: {callable: "edited_loss:lose", held_out: "edited_loss:lose", steps: [100, 200, 300]}
optimizers: [LCSC]
budget: {evaluations: 4}
"""
NAME = "edited/LCSC/0"


def write(name: str, text: str) -> None:
    """A module as a new process would find it."""
    Path(f"{name}.py").write_text(text)
    for loaded in ("edited_loss", "edited_helper", "edited_extractor"):
        sys.modules.pop(loaded, None)
    importlib.invalidate_caches()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("edited.yaml").write_text(STUDY)
    write("edited_helper", "SCALE = 1\n")
    write("edited_loss", LOSS)
    assert lcsc(["run", "edited.yaml"]) == 0
    return tmp_path


CHANGES = [
    (["run", "edited.yaml", "--budget", "6"], "edited_helper", "SCALE = 32\n"),
    (["run", NAME, "--budget", "6"], "edited_loss", LOSS.replace("** 2", "** 4")),
    (["evaluate", "edited", "--images", "20"], "edited_loss", LOSS.replace("SCALE *", "1 + SCALE *")),
]


@pytest.mark.parametrize(("command", "module", "text"), CHANGES)
def test_other_code_is_refused_and_named_until_it_is_accepted(
    place: Path, typed: Typed, command: list[str], module: str, text: str
) -> None:
    write(module, text)
    assert f"changed since it began: {module} changed" in typed.refused(*command)
    assert len(load_study(NAME).trials) == 4
    assert f"continues with changes: {module} changed" in typed(*command, "--accept-changes").err
    assert [change["changed"] for change in stored()["changes"]] == [f"{module} changed"]
    assert lcsc(command) == 0, "it is the experiment's code now"


def stored() -> dict[str, Any]:
    return StoredExperiment.open(open_storage("sqlite:///studies.db", write=False), "edited").attributes


def measured() -> dict[tuple[str, Sample], Any]:
    """Each model and sample → its loss, under today's key."""
    experiment = StoredExperiment.open(open_storage("sqlite:///studies.db", write=False), "edited")
    trials = valid_trials(experiment.attributes, experiment.trials)
    return {(trial.user_attrs["model"]["key"], sample_of(trial)): trial.value for trial in trials}


def test_what_other_code_has_measured_is_measured_again(place: Path, typed: Typed) -> None:
    before = measured()
    write("edited_helper", "SCALE = 32\n")
    typed("run", "edited.yaml", "--budget", "6", "--accept-changes")
    now = measured()
    assert before.keys() & now.keys()
    assert all(now[name] == 32 * before[name] for name in before.keys() & now.keys())


def answer_in(said: str) -> str:
    """The line that says what the answer is."""
    [line] = [line for line in said.splitlines() if "The answer is" in line]
    return line


def test_what_finished_with_other_code_is_reported_by_the_accepted_one(place: Path, typed: Typed) -> None:
    run = ("run", "edited.yaml", "name=reported", "held_out={images: 20}")
    before = answer_in(typed(*run).err)
    write("edited_helper", "SCALE = 32\n")
    assert answer_in(typed(*run, "--accept-changes").err) != before


def test_a_report_whose_own_code_changed_is_made_again(place: Path, typed: Typed) -> None:
    study = STUDY.replace('held_out: "edited_loss:lose"', 'held_out: "edited_extractor:test"')
    Path("edited.yaml").write_text(f"{study}held_out: {{images: 20}}\n")
    test = "def test(coefficients):\n    return FACTOR * float((coefficients ** 2).sum())\n"
    answers = []
    for factor in (1, 1, 4):
        write("edited_extractor", test.replace("FACTOR", str(factor)))
        answers.append(answer_in(typed("run", "edited.yaml", "name=reported").err))
    assert answers[0] == answers[1] != answers[2]
    assert f"with loss {stored_report('reported').of_answer.loss:.4g}" in answers[2]


@pytest.mark.parametrize("command", [["run", "edited.yaml"], ["run", "edited.yaml", "seeds=[1]"]])
def test_what_finished_with_other_code_is_not_returned_and_no_seed_is_added(
    place: Path, typed: Typed, command: list[str]
) -> None:
    assert "changed" not in typed("run", "edited.yaml").err
    write("edited_helper", "SCALE = 32\n")
    assert "edited_helper changed" in typed.refused(*command)
    assert lcsc([*command, "--accept-changes"]) == 0
    assert lcsc(command) == 0, "it was accepted once"


EXTRACTOR = """
import torch

class Features:
    name, dimension = "mine", 2

    def __init__(self):
        self.network = torch.nn.Linear(4, 2)
        torch.nn.init.ones_(self.network.weight)
        torch.nn.init.zeros_(self.network.bias)

    def __call__(self, images):
        return self.network(images.flatten(1))
"""


def test_an_extractor_has_another_name_when_its_code_changes(place: Path) -> None:
    names = []
    for text in (EXTRACTOR, EXTRACTOR, EXTRACTOR.replace("flatten(1))", "flatten(1)) + 1")):
        write("edited_extractor", text)
        names.append(find_extractor("edited_extractor:Features", weights=None)("cpu").name)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("mine-")
