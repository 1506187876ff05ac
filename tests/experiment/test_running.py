"""One study file stands for several experiments, by overrides in a loop; each loads its objective once."""

from __future__ import annotations

from pathlib import Path

import pytest

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import read_contents
from lcsc_opt.study.ending import BROUGHT_NOTHING
from tests.commands import Typed

OBJECTIVE = """
from pathlib import Path

import numpy as np

from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.objective.contract import Objective


class Settings(FrozenModel):
    images: int = 5
    shift: float = 0.0


class Shifted(Objective):
    steps = (1, 2, 3, 4)

    def __init__(self, settings):
        self.settings = settings

    def evaluate(self, candidate):
        loss = float(np.square(candidate.coefficients - self.settings.shift).sum())
        return Evaluation(loss, {}, Cost(images=self.settings.images, seconds=0.1))

    def describe(self):
        return self.settings.model_dump()


def build(settings):
    checked = parse_settings(Settings, settings, source="objective.settings")
    with Path("built.txt").open("a") as file:
        file.write(f"{checked.images} {checked.shift}\\n")
    return Shifted(checked)
"""
STUDY = """
name: shifted
objective: {file: shifted.py, settings: {shift: 0.1}}
optimizers: [EMAGrid, LCSC]
budget: {evaluations: 2}
"""


@pytest.fixture(autouse=True)
def place(workplace: Path) -> Path:
    (workplace / "shifted.py").write_text(OBJECTIVE)
    (workplace / "shifted.yaml").write_text(STUDY)
    return workplace


def built() -> list[str]:
    return Path("built.txt").read_text().splitlines() if Path("built.txt").exists() else []


def studies() -> list[str]:
    return sorted(read_contents(open_storage("sqlite:///studies.db", write=False)).studies)


def test_a_loop_over_values_makes_experiments_that_continue(typed: Typed) -> None:
    every = []
    for images in (2, 3):
        name = f"shifted-{images}"
        change = [f"name={name}", f"objective.settings.images={images}"]
        assert lcsc(["run", "shifted.yaml", *change]) == 0
        assert typed("run", "shifted.yaml", *change).err.count("finished already") == 2
        assert {row["study"] for row in typed.json("compare", name)} == {f"{name}/EMAGrid/0", f"{name}/LCSC/0"}
        every += [f"{name}/EMAGrid/0", f"{name}/LCSC/0"]
    assert studies() == every
    assert built() == ["2 0.1", "3 0.1"]


def test_the_objective_is_loaded_once_for_what_is_left_open_and_for_the_searches() -> None:
    assert lcsc(["run", "shifted.yaml", "~optimizers", "budget.evaluations=2"]) == 0
    assert [name.split("/")[1] for name in studies()] == ["EMAGrid", "LCSCQuadratic"]
    assert built() == ["5 0.1"]


def test_no_search_goes_on_without_the_workers_that_it_cannot_have(typed: Typed) -> None:
    said = typed("run", "shifted.yaml", "workers=[cuda:17, cuda:18]", status=1).err
    assert said.count("cuda:17 is not available") == 3, "each search says it, and the end"
    assert not Path("studies.db").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("(1, 2, 3, 4)", "(1, 2, 3)"), "steps was [1, 2, 3, 4], is now [1, 2, 3]"),
        (("(1, 2, 3, 4)", "(1, 2, 3, 4)\n    maximizes = True"), "maximizes was false, is now true"),
    ],
)
def test_steps_and_sign_never_change_also_before_any_trial_has_a_loss(
    place: Path, typed: Typed, change: tuple[str, str], reason: str
) -> None:
    file = place / "shifted.py"
    file.write_text(OBJECTIVE.replace("loss = float", "loss = float('nan') if not candidate.rehearsal else float"))
    assert "all 2 trials failed" in typed("run", "shifted.yaml", status=1).err
    file.write_text(OBJECTIVE.replace(*change))
    run = ("run", "shifted.yaml", "--accept-changes")
    said = "differs from the stored experiment, so losses would not be comparable"
    assert f"{said}: {reason}; shifted.py changed. Give" in typed.refused(*run)
    file.write_text(OBJECTIVE)
    assert "continues with changes: shifted.py changed" in typed(*run).err


def test_the_last_line_says_what_was_cut_and_the_command_that_goes_on(typed: Typed) -> None:
    said = typed("run", "shifted.yaml", "budget.evaluations=12").err
    goes_on = (
        "LCSC was cut after 12 evaluations: lcsc run shifted/LCSC/0 --budget 24 goes on (as much again, about 1.2 s)."
    )
    assert f"shifted: {goes_on}" in said
    assert "EMAGrid was cut" not in said, "a grid that is through has nothing to go on with"
    continued = typed("run", "shifted/LCSC/0", "--budget", "24").err
    assert "continuing after trial 11" in continued
    assert "LCSC was cut after 24 evaluations" in continued


def test_a_search_whose_last_evaluations_brought_nothing_is_not_praised_for_going_on(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = f"cut by its budget; the last 20 evaluations {BROUGHT_NOTHING}"
    monkeypatch.setattr("lcsc_opt.study.opening.how_it_ended", lambda *_, **__: how)
    said = typed("run", "shifted.yaml", "budget.evaluations=12").err
    assert "goes on (as much again, about 1.2 s), and may bring little, since its last evaluations have not." in said


def test_a_run_from_python_says_which_call_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lcsc_opt.run("shifted.yaml", optimizers="LCSC", budget=12)
    said = capsys.readouterr().err
    assert (
        "lcsc: shifted: LCSC was cut after 12 evaluations: the same call with budget=24 goes on (as much again, about "
        in said
    )
    lcsc_opt.run("shifted.yaml", optimizers="LCSC", budget=24)
    assert "LCSC was cut after 24 evaluations" in capsys.readouterr().err


def test_a_grid_that_a_time_has_cut_says_so_and_goes_on(typed: Typed) -> None:
    said = typed("run", "shifted.yaml", "--budget", "0.001 s", "--optimizer", "EMAGrid").err
    assert "cut by its budget: 1 of" in said
    assert "EMAGrid was cut after 1 evaluation: lcsc run shifted/EMAGrid/0 --budget '2 s' goes on" in said
    assert "every search has ended by itself" in typed("run", "shifted/EMAGrid/0", "--budget", "20 s").err.lower()
