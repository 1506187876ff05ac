"""Several studies of one file: each runs for itself, budgets are raised, and their losses have to mean the same."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from tests.commands import Typed
from tests.study_examples import stored_report

MODULE = """
def loss(coefficients):
    return float((coefficients ** 2).sum())

def doubled(coefficients):
    return 2 * loss(coefficients)
"""
STORAGE = "sqlite:///studies.db"
HELD_OUT = "losses_of_several:loss"
STUDY: dict[str, Any] = {
    "name": "several",
    "objective": {"file": "function.py", "settings": {"callable": "losses_of_several:loss", "steps": [10, 20, 30]}},
    "optimizers": ["LCSC", "CMA", "DE"],
    "budget": {"evaluations": 4},
    "failures": {"retries": 0},
}


@pytest.fixture
def study_file(workplace: Path) -> str:
    (workplace / "losses_of_several.py").write_text(MODULE)
    (workplace / "several.yaml").write_text(yaml.safe_dump(STUDY))
    return "several.yaml"


@contextlib.contextmanager
def nothing_can_be_loaded() -> Iterator[None]:
    """The user's module is gone, also from this process."""
    module = Path("losses_of_several.py").rename("moved_away")
    del sys.modules["losses_of_several"]
    yield
    module.rename("losses_of_several.py")
    importlib.invalidate_caches()


def states(typed: Typed) -> dict[str, tuple[str, int]]:
    return {row["optimizer"]: (row["state"], row["evaluations"]) for row in typed.json("list")}


def names(typed: Typed) -> set[str]:
    return {row["study"] for row in typed.json("list")}


@pytest.mark.usefixtures("impatient")
def test_a_search_that_another_process_runs_stops_no_others_and_leaves_the_report_to_that_process(
    study_file: str, typed: Typed
) -> None:
    run = ["run", study_file, f"objective.settings.held_out={HELD_OUT}", "held_out={top: 2}"]
    assert lcsc([*run, "--optimizer", "CMA", "--budget", "2"]) == 0
    held = StoredStudy.open(open_storage(STORAGE, write=True), "several/CMA/0")
    with held.hold():
        said = typed(*run, status=1).err
        with nothing_can_be_loaded():
            at_once = typed(*run, status=1).err
    for lines in (said, at_once):
        assert "\nseveral/CMA/0: is being run" in lines
        assert "lcsc: 1 of 3 studies did not succeed: several/CMA/0" in lines
        assert "The report is left to the process that runs several/CMA/0" in lines
        assert "The answer is" not in lines
    assert states(typed) == {"LCSC": ("finished", 4), "CMA": ("finished", 2), "DE": ("finished", 4)}
    assert stored_report("several").found.keys() == {"several/CMA/0"}, "that of before"
    assert lcsc(run) == 0
    assert states(typed)["CMA"] == ("finished", 4)
    assert stored_report("several").found.keys() == {"several/LCSC/0", "several/DE/0", "several/CMA/0"}


@pytest.mark.usefixtures("impatient")
def test_what_waits_for_a_grid_of_another_process_is_said_before_anything_is_loaded(
    study_file: str, typed: Typed
) -> None:
    run = ["run", study_file, "optimizers=[EMAGrid, CMA]"]
    assert lcsc([*run, "--optimizer", "EMAGrid"]) == 0
    grid = StoredStudy.open(open_storage(STORAGE, write=True), "several/EMAGrid/0")
    grid.set_attribute("search_ended", None)  # as of one that has not ended
    with grid.hold(), nothing_can_be_loaded():
        said = typed(*run, status=1).err
    assert "several/EMAGrid/0: is being run" in said
    assert "\nseveral/CMA/0: begins at the best of several/EMAGrid/0, which is being run; wait for it" in said


def test_a_grid_is_evaluated_once_for_all_seeds(study_file: str, typed: Typed) -> None:
    run = ["run", study_file, "optimizers=[EMAGrid, LCSC]"]
    typed(*run, "seeds=[3,4]")
    assert names(typed) == {"several/EMAGrid/3", "several/LCSC/3", "several/LCSC/4"}
    evaluated = states(typed)["EMAGrid"]
    said = typed(*run, "seeds=[5]").err
    assert "several/EMAGrid/3: finished already" in said
    assert names(typed) == {"several/EMAGrid/3", "several/LCSC/3", "several/LCSC/4", "several/LCSC/5"}
    assert states(typed)["EMAGrid"] == evaluated


def test_a_search_that_is_refused_stops_neither_the_others_nor_their_report(study_file: str, typed: Typed) -> None:
    run = ["run", study_file, f"objective.settings.held_out={HELD_OUT}", "held_out={top: 2}"]
    assert lcsc([*run, "--optimizer", "CMA"]) == 0
    said = typed(*run, "optimizers=[CMA: {popsize: 5}, DE]", status=1).err
    assert "lcsc: 1 of 2 studies did not succeed: several/CMA/0: differs from the stored several/CMA/0: " in said
    assert "no new report" not in said
    assert stored_report("several").found.keys() == {"several/CMA/0", "several/DE/0"}


def test_a_held_out_plan_that_is_edited_counts_from_then_on(study_file: str) -> None:
    settings = {**STUDY["objective"]["settings"], "held_out": HELD_OUT}
    content = {**STUDY, "objective": {"file": "function.py", "settings": settings}, "optimizers": ["LCSC"]}
    for top, budget in ((2, 5), (4, 6)):
        edited = {**content, "held_out": {"top": top}, "budget": {"evaluations": budget}}
        Path(study_file).write_text(yaml.safe_dump(edited))
        assert lcsc(["run", study_file]) == 0
    assert lcsc(["run", "several/LCSC/0", "--budget", "7"]) == 0
    assert len([name for name in stored_report("several").selection if name.startswith("LCSC, trial")]) == 4


def test_another_seed_with_other_settings_is_refused(study_file: str, typed: Typed) -> None:
    assert lcsc(["run", study_file, "optimizers=[EMAGrid,LCSC]"]) == 0
    other = ["run", study_file, "optimizers=[LCSC]", "seeds=[1]"]
    before = list(read_contents(open_storage(STORAGE, write=False)).studies)
    for override, said in (
        (
            "objective.settings.callable=losses_of_several:doubled",
            'callable was "losses_of_several:loss", is now "loss',
        ),
        ('optimizers=[{"LCSC": {"mutation": 0.5}}]', 'optimizer.options was {}, is now {"mutation": 0.5}'),
        ("space=convex", 'space.kind was "affine", is now "convex"'),
    ):
        line = typed.refused(*other, override)
        assert "differs from the stored " in line
        assert said in line
    assert typed.refused(*other, override, "--dry-run") == line
    assert lcsc([*other, override, "name=b", "--dry-run"]) == 0
    assert list(read_contents(open_storage(STORAGE, write=False)).studies) == before, (
        "and what changes no loss is allowed"
    )
    assert lcsc([*other, "budget.evaluations=3"]) == 0
    assert lcsc(["run", study_file, "optimizers=[CMA]", "space=convex"]) == 0
