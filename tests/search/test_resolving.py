"""What a study is and what running it will do, decided from data alone: nothing is read, loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.search.plan import Plan, plans
from lcsc_opt.search.resolving import Evidence, Resolved, StoredStudies, StoredTrials, resolve
from tests.commands import Typed

ENVIRONMENT = {"packages": {"numpy": "2"}, "blas": ["a"], "machine": "m"}
STUDY: dict[str, Any] = {
    "name": "e",
    "objective": {"file": "function.py", "settings": {"callable": "m:f", "steps": [1, 2, 3]}},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 4},
}


def plan(**changes: Any) -> Plan:
    [made] = plans(parse_studies({**STUDY, **changes}, source="test"), None)
    return made


def by_code(**digests: str) -> Evidence:
    return Evidence({"environment": ENVIRONMENT, "code": digests})


def by_objective(**digests: str) -> Evidence:
    objective = CoefficientFunction(lambda c: float((c**2).sum()), (1, 2, 3), name="f")
    fingerprint = {"environment": ENVIRONMENT, "code": digests, "objective": objective.describe()}
    return Evidence(fingerprint, objective.why_no_gradient, objective=objective)


SUCCEEDED = StoredTrials(4, succeeded=True)


def studies(trials: StoredTrials = SUCCEEDED, **stored: Any) -> StoredStudies:
    return StoredStudies({name.replace("_", "/"): attributes for name, attributes in stored.items()}, lambda _: trials)


def begun(**digests: str) -> dict[str, Any]:
    return resolve(plan(), studies(), by_objective(**digests)).attributes


def test_a_new_study_begins_with_what_the_objective_tells() -> None:
    before_loading = resolve(plan(), studies(), by_code(m="1"))
    assert (before_loading.state, dict(before_loading.initial_attributes)) == ("new", {})
    resolved = resolve(plan(), studies(), by_objective(m="1"))
    assert resolved.state == "new"
    assert resolved.attributes["steps"] == [1, 2, 3]
    assert resolved.attributes["fingerprint"]["code"] == {"m": "1"}


def test_code_that_is_not_loaded_yet_counts_as_unchanged() -> None:
    stored = begun(m="1", helper="1")
    unchanged = resolve(plan(), studies(e_LCSC_0=stored), by_code(m="1"))
    assert (unchanged.state, unchanged.notices) == ("unfinished", ())
    assert "changes" not in unchanged.updated_attributes
    with pytest.raises(StudyStoreError, match=r"e/LCSC/0: changed since it began: helper gone\. Put it back"):
        resolve(plan(), studies(e_LCSC_0=stored), by_objective(m="1"))


@pytest.mark.parametrize("evidence", [by_code(m="2"), by_objective(m="2")])
def test_changed_code_is_accepted_by_request_or_before_the_first_success(evidence: Evidence) -> None:
    stored = begun(m="1")
    with pytest.raises(StudyStoreError, match="m changed"):
        resolve(plan(), studies(e_LCSC_0=stored), evidence)

    def check(resolved: Resolved) -> None:
        assert resolved.updated_attributes["changes"] == [{"before_trial": 4, "changed": "m changed"}]
        assert resolved.attributes["fingerprint"]["code"] == {"m": "2"}
        assert resolved.notices == ("e/LCSC/0: continues with changes: m changed",)

    check(resolve(plan(), studies(e_LCSC_0=stored), evidence, accept_changes=True))
    check(resolve(plan(), studies(StoredTrials(4, succeeded=False), e_LCSC_0=stored), evidence))


FAILED = StoredTrials(4, succeeded=False)


def test_settings_may_change_before_the_first_success() -> None:
    stored = begun(m="1")
    corrected = {"file": "function.py", "settings": {"callable": "m:g", "steps": [1, 2, 3]}}
    with pytest.raises(StudyStoreError, match=r'the stored study differs: .*callable was "m:f", is now "m:g"'):
        resolve(plan(objective=corrected), studies(e_LCSC_0=stored), by_code(m="1"))
    assert resolve(plan(objective=corrected), studies(FAILED, e_LCSC_0=stored), by_code(m="1")).starts_over
    assert not resolve(plan(), studies(FAILED, e_LCSC_0=stored), by_code(m="2")).starts_over
    with pytest.raises(StudyStoreError, match=r"specification\.space\.kind was"):
        resolve(plan(objective=corrected, space="convex"), studies(FAILED, e_LCSC_0=stored), by_code(m="1"))


def test_a_finished_study_needs_no_code_and_says_that_it_changed() -> None:
    finished = {**begun(m="1"), "search_ended": {"evaluations": 4, "exhausted": False}}
    gone = Evidence({"environment": ENVIRONMENT, "code": {}}, refusal=ObjectiveError("the file is gone"))
    assert resolve(plan(), studies(e_LCSC_0=finished), gone).state == "finished"
    changed = resolve(plan(), studies(e_LCSC_0=finished), by_code(m="2"))
    assert "finished before this changed: m changed" in changed.notices[0]
    moved = resolve(plan(), studies(e_LCSC_0=finished), by_objective(m="2"), measures=False)
    assert "fingerprint" not in moved.updated_attributes
    with pytest.raises(ObjectiveError, match="the file is gone"):
        resolve(plan(budget={"evaluations": 5}), studies(e_LCSC_0=finished), gone)


def test_an_open_number_of_workers_is_that_of_the_stored_study() -> None:
    stored = resolve(plan(workers=3), studies(), by_objective()).attributes
    assert resolve(plan(workers="auto"), studies(e_LCSC_0=stored), by_code()).plan.workers == 3
    with pytest.raises(StudyStoreError, match=r"specification\.workers was 3, is now 2"):
        resolve(plan(workers=2), studies(e_LCSC_0=stored), by_code())


PARTS = """
from pathlib import Path
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

def score(model, draw):
    return float(Path(f"{draw.group}.txt").read_text())

def broken(model, draw):
    raise KeyError("los")
"""


@pytest.fixture
def scored(workplace: Path) -> Path:
    (workplace / "scored_parts.py").write_text(PARTS)
    for step in (10, 20, 30):
        torch.save({"weight": torch.full((4,), float(step))}, workplace / f"model{step}.pt")
    for group in ("search", "held-out"):
        (workplace / f"{group}.txt").write_text("0.5")
    settings = {
        "checkpoints": "model*.pt",
        "model": "scored_parts:Net",
        "score": "scored_parts:score",
    }
    study = {
        "name": "scored",
        "objective": {"file": "score.py", "settings": settings},
        "optimizers": ["LCSC"],
        "budget": {"evaluations": 3},
        "failures": {"retries": 0},
        "held_out": {"images": 2},
    }
    (workplace / "scored.yaml").write_text(yaml.safe_dump(study))
    return workplace


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_data_that_only_the_report_needs_are_asked_for_before_the_search(
    scored: Path, typed: Typed, options: list[str]
) -> None:
    said = typed("run", "scored.yaml", *options, status=2).err
    assert "scored/LCSC/0: held_out: nothing can be measured on selection noise: " in said
    assert "selection.txt" in said
    assert not (scored / "studies.db").exists()
    assert not (scored / "studies.files").exists()
    (scored / "selection.txt").write_text("0.5")
    said = typed("run", "scored.yaml", *options).err
    assert ("packing" in said) == (options == []), "a dry run packs nothing, and does not say so"
    assert "held-out 0.5 after 3 evaluations" in typed("run", "scored.yaml").err


def test_a_typo_in_the_settings_is_corrected_in_the_study_file(scored: Path, typed: Typed) -> None:
    run = ("run", "scored.yaml", "~held_out")
    said = typed(*run, "objective.settings.score=scored_parts:broken", status=1).err
    assert "after a correction of the objective's settings in the study file: lcsc run FILE" in said
    said = typed(*run).err
    assert "continues with changes: objective.score was" in said
    assert "after 3 evaluations" in said


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_advice_about_rows_needs_no_objective(scored: Path, typed: Typed, options: list[str]) -> None:
    command = ("run", "scored.yaml", "space.rows=layers", "held_out=null", *options)
    assert typed(*command).err.count("scored/LCSC/0: without a gradient, more rows do not help") == 1
