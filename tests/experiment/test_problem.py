"""Whether an experiment and a search are still the same, from data alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.base.study_spec import ObjectiveSpec, StudySpec
from lcsc_opt.experiment.problem import Changes, Problem, check_search
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.study.opening import Search

ENVIRONMENT = {"packages": {"numpy": "2"}, "blas": ["a"], "machine": "m"}
OBJECTIVE = CoefficientFunction(lambda c: float((c**2).sum()), (1, 2, 3), name="f")
STUDY: dict[str, Any] = {
    "name": "e",
    "objective": {"file": "function.py", "settings": {"callable": "m:f", "steps": [1, 2, 3]}},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 4},
}


def spec(**changes: Any) -> StudySpec:
    [made] = searches_of([parse_study_file({**STUDY, **changes}, source="test")])
    return made


def problem(**settings: Any) -> Problem:
    return Problem.of(ObjectiveSpec(file="function.py", settings={"callable": "m:f", **settings}), OBJECTIVE, None)


BEGUN = problem(steps=[1, 2, 3], metrics=["fid"], batch_size=8, loss={"fid": 1, "also": "x"})


def with_code(**code: str) -> Problem:
    return dataclasses.replace(BEGUN, decides={**BEGUN.decides, "code": code})


def refusal(changes: Changes, *, succeeded: bool = True, accept: bool = False) -> str:
    """Why this is not continued; empty if it is."""
    try:
        changes.check("e", succeeded=succeeded, accept=accept)
    except StudyStoreError as error:
        return str(error)
    return ""


def test_changed_code_is_accepted_by_request_or_before_the_first_success() -> None:
    changes = with_code(m="1", helper="1").changes(with_code(m="2"))
    assert changes.decides == "m changed; helper gone"
    assert refusal(changes).startswith("e: changed since it began: m changed; helper gone. Undo")
    assert not refusal(changes, accept=True)
    assert not refusal(changes, succeeded=False)


def test_settings_that_decide_may_change_before_the_first_success_alone() -> None:
    changes = BEGUN.changes(problem(steps=[1, 2, 3], loss={"fid": 1}, checkpoints="*.pt"))
    for accept in (False, True):
        assert "settings.checkpoints was null, is now" in refusal(changes, accept=accept)
    assert not refusal(changes, succeeded=False)


def test_other_checkpoints_are_refused_whatever_is_accepted() -> None:
    before, now = (
        dataclasses.replace(BEGUN, decides={**BEGUN.decides, "objective": {"trajectory": digest}}) for digest in "ab"
    )
    assert "began with other checkpoints" in refusal(before.changes(now), succeeded=False, accept=True)


def test_what_is_only_reported_and_the_machine_may_change() -> None:
    changes = BEGUN.changes(
        problem(steps=[1, 2, 3], metrics=["kid"], device="cpu", held_out="m:g", loss={"fid": 1, "also": "y"})
    )
    assert not changes.decides
    assert [line.split(" was ")[0] for line in changes.reported] == [
        "settings.held_out",
        "settings.loss.also",
        "settings.metrics",
    ]
    assert not changes.measures_otherwise


@pytest.mark.parametrize(("code", "expected"), [({"m": "1", "new": "1"}, False), ({"m": "2"}, True)])
def test_a_metric_whose_code_changed_measures_otherwise_and_a_new_one_does_not(
    code: dict[str, str], expected: bool
) -> None:
    before, now = (
        dataclasses.replace(BEGUN, reported={**BEGUN.reported, "code": digests}) for digests in ({"m": "1"}, code)
    )
    assert before.changes(now).measures_otherwise is expected


def stored(made: StudySpec, **more: Any) -> dict[str, Any]:
    attributes = Search(made, OBJECTIVE, None, ENVIRONMENT).attributes
    return {made.name: {**attributes, **more}}


def test_a_search_and_its_other_seeds_keep_their_candidates() -> None:
    with pytest.raises(StudyStoreError, match=r'e/LCSC/0: differs from the stored e/LCSC/0: space\.kind was "affine"'):
        check_search(spec(space="convex"), stored(spec()), ENVIRONMENT, accept=True)
    with pytest.raises(StudyStoreError, match=r"e/LCSC/1: differs from the stored e/LCSC/0"):
        check_search(spec(space="convex", seeds=[1]), stored(spec()), ENVIRONMENT, accept=True)
    assert check_search(spec(seeds=[1]), stored(spec()), {}, accept=False) == ""
    assert check_search(spec(optimizers=["CMA"], space="convex"), stored(spec()), {}, accept=False) == ""


def test_other_versions_are_accepted_by_request() -> None:
    now = {**ENVIRONMENT, "packages": {"numpy": "3", "torch": "2"}}
    with pytest.raises(
        StudyStoreError, match=r'changed since it began: environment\.packages\.numpy was "2", is now "3"'
    ):
        check_search(spec(), stored(spec()), now, accept=False)
    assert "numpy" in check_search(spec(), stored(spec()), now, accept=True)


def test_workers_may_change_and_candidates_are_still_asked_so_many_at_a_time() -> None:
    [begun] = stored(spec(workers=3)).values()
    continued = Search(spec(workers="auto"), OBJECTIVE, begun, ENVIRONMENT)
    assert continued.spec.worker_count == 1
    assert continued.attributes["parallelism"] == {"in_flight": 5, "spread_images": False, "workers": 3}


def test_a_study_that_another_process_changed_meanwhile_is_refused(storage: RDBStorage) -> None:
    def hold(made: StudySpec, before: dict[str, Any] | None) -> dict[str, Any]:
        search = Search(made, OBJECTIVE, before, ENVIRONMENT)
        with search.held(storage, before):
            return search.stored.attributes

    begun = hold(spec(), None)
    hold(spec(), None)  # another process has created the same
    with pytest.raises(StudyStoreError, match="another process has just changed it"):
        hold(spec(workers=2), None)
    hold(spec(workers=2), begun)
    with pytest.raises(StudyStoreError, match="another process has just changed it"):
        hold(spec(workers=2), begun)  # it is compared with what it was
