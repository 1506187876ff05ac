"""States between the usual ones: nothing found yet, no report yet, a folder that moved, another process beside."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lcsc_opt
from lcsc_opt.base.errors import SearchFailedError, StudyStoreError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import read_contents
from lcsc_opt.views.answer import first_line
from tests.commands import Typed
from tests.study_examples import stored_report

TARGET = """
calls = []

def norm(c):
    calls.append("searched")
    return float(((c - .1) ** 2).sum()){of_search}

def held_out(c):
    if calls.count("searched") > 6 and "reported" not in calls:  # a rehearsal asks for fewer, a search for as many
        calls.append("reported")
        {in_report}
    return float(((c - .11) ** 2).sum())
"""
Write = Callable[..., Path]


@pytest.fixture
def write(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a study file and its functions into a folder; a report begins with ``in_report``. Gives the file."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # no other test finds these functions

    def written(folder: str = ".", of_search: str = "", in_report: str = "", **changes: Any) -> Path:
        place = workplace / folder
        place.mkdir(exist_ok=True)
        sys.modules.pop("states_target", None)
        importlib.invalidate_caches()
        (place / "states_target.py").write_text(TARGET.format(of_search=of_search, in_report=in_report))
        settings = {"callable": "states_target:norm", "held_out": "states_target:held_out", "steps": [1, 2, 3, 4]}
        settings |= changes.pop("settings", {})
        study = {
            "name": "states",
            "objective": {"file": "function.py", "settings": settings},
            "optimizers": ["LCSC"],
            "budget": {"evaluations": 6},
            "held_out": {"top": 2},
            **changes,
        }
        path = place / "states.yaml"
        path.write_text(json.dumps(study))
        return path

    return written


def test_what_is_stored_once_is_not_mixed_with_other_steps(write: Write, typed: Typed) -> None:
    assert lcsc(["run", str(write(of_search=" * float('nan')"))]) == 1
    other_steps = write(settings={"steps": [1, 2, 3, 4, 5]})
    assert "Give the new one another name" in typed.refused("run", str(other_steps))
    assert lcsc(["run", str(write(settings={"held_out": None}))]) == 0, "what no trial has used may change"


@pytest.mark.usefixtures("workplace")
def test_a_search_that_found_nothing_is_not_continued_with_the_other_sign() -> None:
    search = functools.partial(
        lcsc_opt.search,
        {step: {"weight": torch.eye(2)[:1] * step} for step in (1, 2)},
        build=lambda: torch.nn.Linear(2, 1, bias=False),
        score=lambda _: float("nan"),
        optimizers="LCSC",
        budget=2,
        resume=True,
    )
    with pytest.raises(SearchFailedError):
        search()
    with pytest.raises(StudyStoreError, match="another name"):
        search(maximize=True)


def test_an_experiment_moves_with_its_folder(write: Write, workplace: Path, typed: Typed) -> None:
    write("before")
    database = ["--storage", "sqlite:///states.db"]
    assert "The answer is" in typed("run", "before/states.yaml", *database).err
    (workplace / "before").rename("after")
    sys.modules.pop("states_target")  # as in another process
    assert "continuing after trial 5" in typed("run", "after/states.yaml", "--budget", "8", *database).err
    sys.modules.pop("states_target")
    assert "continuing after trial 7" in typed("run", "states/LCSC/0", "--budget", "10", *database).err


def test_a_report_that_was_forgotten_is_not_printed(write: Write, typed: Typed) -> None:
    assert "The answer is" in typed("run", str(write())).err
    write(of_search=" + 1")
    changed = typed("run", "states.yaml", "~held_out", "--accept-changes", "--budget", "7").err
    assert "the stored report is forgotten" in changed
    assert "The answer is" not in changed


def test_until_there_is_a_report_the_line_names_the_best_trial(write: Write, typed: Typed) -> None:
    searches = {"optimizers": ["RandomSearch", "LCSC"], "seeds": [0, 1]}
    assert lcsc(["run", str(write(in_report="raise KeyboardInterrupt", **searches))]) == 130
    studies = HistoryReader(open_storage("sqlite:///studies.db", write=False)).read("states")
    line = first_line(studies)
    assert line.endswith("its report is not made yet: run the same command again")
    best = min(row["searched"] for row in typed.json("compare", "states"))
    assert f" with {best:.4g};" in line
    assert line in typed("compare", "states").err


def test_a_search_that_another_process_ends_meanwhile_is_in_the_report(write: Write) -> None:
    another = "from lcsc_opt.cli import run; assert run(['run', 'states.yaml', '--optimizer', 'LCSC']) == 0"
    path = str(write(in_report=another, optimizers=["RandomSearch", "LCSC"]))
    assert lcsc(["run", path, "--optimizer", "RandomSearch"]) == 0
    assert stored_report("states").evaluations == {"states/RandomSearch/0": 6, "states/LCSC/0": 6}


def test_a_kill_while_a_study_is_deleted_leaves_no_answer_of_it(
    write: Write, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lcsc(["run", str(write(optimizers=["RandomSearch", "LCSC"]))]) == 0

    def interrupted(text: str) -> None:
        if text.startswith("deleted: "):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sys.stderr, "write", interrupted)
        assert lcsc(["delete", "states/LCSC/0", "--yes"]) == 130
    database = open_storage("sqlite:///studies.db", write=False)
    assert list(read_contents(database).studies) == ["states/RandomSearch/0"]
    assert StoredExperiment.open(database, "states").report is None
    assert "The answer is" in typed("run", "states.yaml").err
