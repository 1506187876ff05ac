"""The names that ``import lcsc_opt`` gives, and a whole search with them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lcsc_opt
from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from tests.model_studies import write_model_study
from tests.processes import script_process

NAMES = {"Objective", "Study", "Trajectory", "TrajectoryWriter"} | {"compare", "load_objective", "load_study", "run"}
NAMES |= {"Candidate", "Evaluation", "search", "__version__"}
ERRORS = {"LcscError", "MetricError", "MissingPackageError", "ObjectiveError", "SearchFailedError", "StudySpecError"}
ERRORS |= {"StudyStoreError", "TrainingError", "TrajectoryError"}
PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_these_names_and_no_others_are_given() -> None:
    assert set(lcsc_opt.__all__) == NAMES | ERRORS
    assert set(dir(lcsc_opt)) >= NAMES | ERRORS
    for name in NAMES | ERRORS:
        assert name == "__version__" or getattr(lcsc_opt, name).__doc__
    with pytest.raises(AttributeError, match=r"it has .*Objective, "):
        _ = lcsc_opt.nothing


def kept_names() -> dict[str, set[str]]:
    """Module → names of the page's table of names that are kept."""
    table = PAGE.read_text().partition("## Which names are kept")[2].partition("\nSo do the keys")[0]
    kept: dict[str, set[str]] = {}
    for line in table.splitlines():
        if not line.startswith("| `"):
            continue
        _, modules, names, _ = line.split("|")
        lists = [re.findall(r"`(\w+)`", part) for part in names.split(";")]
        kept |= {module: set(listed) for module, listed in zip(re.findall(r"`([\w.]+)`", modules), lists, strict=True)}
    return kept


def test_the_page_and_the_modules_have_the_same_names() -> None:
    kept = kept_names()
    assert len(kept) == 11
    assert kept["lcsc_opt"] == NAMES
    for module_name, names in kept.items():
        module = importlib.import_module(module_name)
        assert {name for name in names if not hasattr(module, name)} == set(), module_name
    whole = ("lcsc_opt.objective", "lcsc_opt.coefficients", "lcsc_opt.metrics")
    for module_name in whole:
        assert kept[module_name] == set(importlib.import_module(module_name).__all__), module_name
    errors = importlib.import_module("lcsc_opt.base.errors")
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    of_module = {value.__name__ for value in classes if value.__module__ == errors.__name__}
    assert kept["lcsc_opt.base.errors"] == ERRORS == of_module


def test_the_changelog_and_the_citation_are_of_this_version() -> None:
    root, version = Path(__file__).parents[1], lcsc_opt.__version__
    assert re.search(rf"\n## \[{re.escape(version)}\] - (20\d\d-|unreleased\n)", (root / "CHANGELOG.md").read_text())
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()


def test_a_whole_search(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_file = write_model_study(workplace, optimizers=["LCSC", "CMA"], budget={"evaluations": 6})
    found = lcsc_opt.run(study_file, seeds=[0, 1])
    assert [study.name.split("/", 1)[1] for study in found] == ["LCSC/0", "CMA/0", "LCSC/1", "CMA/1"]
    study = found[0]
    assert study.state == "finished"
    assert len(study.steps) == len(study.coefficients)
    assert study.coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert [trial["number"] for trial in study.trials] == list(range(6))
    complete = [trial for trial in study.trials if trial["state"] == "COMPLETE"]
    assert min(trial["loss"] for trial in complete) == study.searched
    assert lcsc_opt.load_objective(study_file)(study.trials[0]["coefficients"]) == study.trials[0]["loss"]
    merged, expected = study.merge(), study.objective.trajectory.merge(study.coefficients)  # type: ignore[attr-defined]
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    last = np.eye(len(study.steps))[-1]
    checkpoint = study.objective.trajectory.checkpoint(-1)  # type: ignore[attr-defined]
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in study.merge(last).items())
    with pytest.raises(StudySpecError):
        study.merge(last * 2)
    rows = lcsc_opt.compare(study.name.split("/")[0])
    assert [row["study"] for row in rows] == [study.name for study in found]
    assert lcsc_opt.load_study(study.name) == study
    capsys.readouterr()
    assert lcsc_opt.run(study_file, optimizers=["LCSC"], seeds=[0]) == [study]  # finished: nothing is evaluated again
    assert len(study.trials) == 6


def functional(**changes: Any) -> dict[str, Any]:
    settings = {"callable": "numpy.linalg:norm", "steps": [1, 2, 3, 4]}
    study = {"name": "plain", "objective": {"file": "function.py", "settings": settings}, "optimizers": ["CMA"]}
    return {**study, "budget": {"evaluations": 3}, **changes}


def test_a_study_may_be_given_as_a_mapping_and_its_budget_raised(workplace: Path) -> None:
    (study,) = lcsc_opt.run(functional(), storage="sqlite:///here.db")
    assert study.storage == f"sqlite:///{Path.cwd() / 'here.db'}"
    assert study.held_out is None
    (more,) = lcsc_opt.run(functional(), budget=5, storage="sqlite:///here.db")
    assert len(more.trials) == 5
    with pytest.raises(ObjectiveError, match="combines no weights"):
        study.merge()
    with pytest.raises(StudyStoreError, match="no/such/0"):
        lcsc_opt.load_study("no/such/0", "sqlite:///here.db")
    with pytest.raises(StudySpecError, match=r"budgte: unknown key"):
        lcsc_opt.run(functional(budgte=1))


def test_every_example_of_the_page_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code, in order, on small checkpoints under the names that the page uses."""
    study = write_model_study(workplace, optimizers=["LCSC"], budget={"evaluations": 6}, held_out={"top": 2})
    study.rename("my_model.yaml")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 3
    known: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), known)


SCRIPT = """
import lcsc_opt

def lose(coefficients):
    return float((coefficients**2).sum())

if {guard}:
    print("once")
    (study,) = lcsc_opt.run({{
        "name": "script",
        "objective": {{"file": "function.py", "settings": {{"callable": "{module}:lose", "steps": [100, 200, 300]}}}},
        "optimizers": ["LCSC"],
        "budget": {{"evaluations": 4}},
        "workers": 2,
    }})
    print(len(study.trials), flush=True)
"""


@pytest.mark.parametrize(("guard", "module"), [("True", "face_losses"), ('__name__ == "__main__"', "__main__")])
def test_a_script_runs_once_and_its_workers_call_its_function(workplace: Path, guard: str, module: str) -> None:
    Path("face_losses.py").write_text("def lose(coefficients):\n    return float((coefficients**2).sum())\n")
    script = workplace / "script.py"
    script.write_text(SCRIPT.format(guard=guard, module=module))
    found = script_process(script)
    assert (found.status, found.out) == (0, "once\n4\n"), found.err
