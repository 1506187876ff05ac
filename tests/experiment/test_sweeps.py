"""A study file that varies settings: refused, rehearsed, run and compared as one."""

from __future__ import annotations

from pathlib import Path

import pytest

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import our_studies
from tests.commands import Typed

OBJECTIVE = """
from pathlib import Path

import numpy as np

from lcsc_opt.base.errors import ObjectiveError
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
    if checked.images > 100:
        raise ObjectiveError("images: more than there are")
    with Path("built.txt").open("a") as file:
        file.write(f"{checked.images} {checked.shift}\\n")
    return Shifted(checked)
"""
STUDY = """
name: sweep
objective: {file: swept_objective.py, settings: {shift: 0.1}}
optimizers: [EMAGrid, LCSC]
budget: {evaluations: 2}
vary: {objective.settings.images: [2, 3]}
"""


@pytest.fixture(autouse=True)
def place(workplace: Path) -> Path:
    (workplace / "swept_objective.py").write_text(OBJECTIVE)
    (workplace / "sweep.yaml").write_text(STUDY)
    return workplace


def built() -> list[str]:
    return Path("built.txt").read_text().splitlines() if Path("built.txt").exists() else []


def studies() -> list[str]:
    return sorted(our_studies(open_storage("sqlite:///studies.db", write=False)))


EVERY = [f"sweep,images={images}/{optimizer}/0" for images in (2, 3) for optimizer in ("EMAGrid", "LCSC")]


def test_a_sweep_is_run_continued_and_compared(typed: Typed) -> None:
    assert lcsc(["run", "sweep.yaml"]) == 0
    assert studies() == EVERY
    assert typed("run", "sweep.yaml").err.count("finished already") == 4
    title, header, *rows = typed("compare", "sweep").out.splitlines()
    assert title.strip() == "sweep"
    assert header.split()[:2] == ["images", "optimizer"]
    assert sorted(row.split()[:2] for row in rows) == [["2", "EMA*"], ["2", "LCSC"], ["3", "EMA*"], ["3", "LCSC"]]
    printed = typed.json("compare", "sweep")
    assert [(row["study"], row["varied"]) for row in printed] == [
        (name, {"images": name.split("=")[1].split("/")[0]}) for name in EVERY
    ]
    assert lcsc_opt.compare("sweep") == printed
    assert lcsc(["compare", "sweep,images=3"]) == 0
    assert lcsc(["compare", "sweep", "--plot", "x.html"]) == 0


def test_an_objective_is_loaded_when_its_turn_comes_and_only_once() -> None:
    assert lcsc(["run", "sweep.yaml", "vary.objective.settings.shift=[0.1,0.2]"]) == 0
    assert built() == ["2 0.1", "2 0.2", "3 0.1", "3 0.2"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("vary.objective.settings.imagez=[1]", "objective.settings: imagez: unknown key (did you mean 'images'?)"),
        ("vary.objective.settings.images=[2,101]", "images: more than there are"),
        ("vary.optimizers=[[LCSC],[LCSCC]]", "LCSCC"),
    ],
)
def test_a_dry_run_finds_what_is_wrong_at_any_point(override: str, said: str, typed: Typed) -> None:
    assert said in typed.refused("run", "sweep.yaml", override, "budget.evaluations=10", "--dry-run")
    assert not Path("studies.db").exists()


def test_a_point_that_is_wrong_does_not_stop_the_others(typed: Typed) -> None:
    run = ("run", "sweep.yaml", "vary.objective.settings.images=[2,101]")
    assert "sweep,images=101/LCSC/0: " in typed(*run, status=1).err
    assert studies() == EVERY[:2]


def test_a_dry_run_shows_every_point_and_runs_none(typed: Typed) -> None:
    shown = typed("run", "sweep.yaml", "vary.budget.evaluations=[4,6]", "--dry-run").out
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert [(row[0], row[-4]) for row in rows] == [
        (f"sweep,images={images},evaluations={budget}/{optimizer}/0", str(budget))
        for images in (2, 3)
        for budget in (4, 6)
        for optimizer in ("EMAGrid", "LCSC")
    ]
    assert built() == ["2 0.1", "3 0.1"]
    assert not Path("studies.db").exists()


def test_another_budget_holds_at_every_point_unless_it_is_varied(typed: Typed) -> None:
    assert typed("run", "sweep.yaml", "--budget", "3", "--dry-run").out.count("3 evaluations") == 4
    said = typed.refused("run", "sweep.yaml", "vary={budget.evaluations: [4, 6]}", "--budget", "3")
    assert "--budget: the study file varies budget.evaluations" in said


def test_from_python_a_sweep_is_run() -> None:
    assert [study.name for study in lcsc_opt.run("sweep.yaml", budget=3)] == EVERY


def test_the_first_point_decides_what_a_sweep_leaves_open(typed: Typed) -> None:
    typed("run", "sweep.yaml", "~optimizers", "budget.evaluations=2")
    assert [name.split("/")[1] for name in studies()] == ["EMAGrid", "LCSCQuadratic"] * 2
    assert built() == ["2 0.1", "3 0.1"], "it is loaded once, for the choice and for its studies"
