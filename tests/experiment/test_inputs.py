"""What ``search``, ``run`` and ``lcsc run`` take, by one set of rules: storages, budgets, seeds, optimizers."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lcsc_opt
from lcsc_opt.base.study_file import StudyFile, parse_study_file
from lcsc_opt.base.study_spec import BudgetSpec
from tests.commands import Typed

NORM = {"file": "function.py", "settings": {"callable": "numpy.linalg:norm", "steps": [100, 200, 300]}}
STUDY: dict[str, Any] = {"name": "norm", "objective": NORM, "optimizers": ["LCSC"], "budget": {"evaluations": 2}}
STATES = {step: {"weight": torch.tensor([[0.0, step]])} for step in (1, 2, 3)}


@pytest.fixture
def run(workplace: Path) -> Any:
    return functools.partial(lcsc_opt.run, STUDY)


@pytest.fixture
def search(workplace: Path) -> Any:
    return functools.partial(
        lcsc_opt.search,
        STATES,
        build=lambda: nn.Linear(2, 1, bias=False),
        score=lambda net: float(net.weight[0, 1] - 5) ** 2,
        optimizers="LCSC",
        name="tried",
        budget=2,
        storage=None,
    )


def study_file(**changes: Any) -> StudyFile:
    return parse_study_file({**STUDY, **changes}, source="test")


# storages


@pytest.mark.parametrize("storage", [Path("some.db"), "sqlite:///some.db"])
def test_a_storage_is_a_file_or_a_url_everywhere(run: Any, search: Any, typed: Typed, storage: str | Path) -> None:
    run(storage=storage)
    assert lcsc_opt.load_study("norm/LCSC/0", storage).state == "finished"
    assert [row["study"] for row in lcsc_opt.compare("norm", storage)] == ["norm/LCSC/0"]
    search(storage=storage)
    assert [row["study"] for row in typed.json("list", "--storage", str(storage))] == ["norm/LCSC/0", "tried/LCSC/0"]
    assert [path.name for path in Path().glob("*.db")] == ["some.db"]


# budgets


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, {"evaluations": 7}),
        (np.int64(7), {"evaluations": 7}),
        (np.array(7), {"evaluations": 7}),
        ("1.5min", {"seconds": 90}),
        ("2 hours", {"seconds": 7200}),
        (datetime.timedelta(minutes=2), {"seconds": 120}),
    ],
)
def test_a_budget_is_a_number_or_a_time(given: Any, expected: dict[str, int]) -> None:
    assert BudgetSpec.of(given) == BudgetSpec(**expected)
    assert study_file().with_choices(budget=given).budget == BudgetSpec(**expected)


@pytest.mark.parametrize("budget", [{"images": 200}, {"seconds": 60}])
def test_a_number_has_the_unit_of_the_study_file_and_a_time_replaces_it(budget: dict[str, int]) -> None:
    [unit] = budget
    assert study_file(budget=budget).with_choices(budget=9).budget == BudgetSpec(**{unit: 9})
    assert study_file(budget=budget).with_choices(budget="2 min").budget == BudgetSpec(seconds=120)
    with pytest.raises(lcsc_opt.LcscError, match=f"budget: expected a whole number of {unit}, or a time such as"):
        study_file(budget=budget).with_choices(budget=0)


def test_the_command_line_takes_the_same_budgets(typed: Typed, workplace: Path) -> None:
    Path("norm.yaml").write_text(
        "name: norm\nobjective: {file: function.py, settings: {callable: 'numpy.linalg:norm', steps: [100, 200]}}\n"
        "optimizers: [LCSC]\nbudget: {evaluations: 2}\n"
    )
    for budget, shown in (("3", "3 evaluations"), ("5 min", "300 seconds")):
        assert shown in typed("run", "norm.yaml", "--budget", budget, "--dry-run").out
    for wrong in ("2.5", "5 s min"):
        said = typed.refused("run", "norm.yaml", "--budget", wrong, "--dry-run")
        assert f'expected a whole number of evaluations, or a time such as "5 min", got {wrong!r}' in said


@pytest.mark.parametrize(("budget", "usable"), [("100", "9 evaluations"), ("5 min", "300 seconds")])
def test_a_dry_run_shows_no_larger_budget_of_a_grid_than_it_has_candidates(
    typed: Typed, workplace: Path, budget: str, usable: str
) -> None:
    Path("norm.yaml").write_text(
        "name: norm\nobjective: {file: function.py, settings: {callable: 'numpy.linalg:norm', steps: [100, 200]}}\n"
        "optimizers: [EMAGrid]\nbudget: {evaluations: 2}\n"
    )
    dry = ("run", "norm.yaml", "--budget", budget, "--dry-run")
    new = typed(*dry).out
    typed("run", "norm.yaml")  # which the budget cuts
    continued = typed(*dry).out
    typed(*dry[:-1])
    [study] = typed.json("list")
    assert study["evaluations"] == 9
    for shown in (new, continued, typed(*dry).out):
        planned, *bought = [line for line in shown.splitlines() if line.startswith("norm/EMAGrid/0 ")]
        assert f" {usable} " in planned
        for row in bought:  # in ten minutes, an hour and a night, where nothing was evaluated before
            assert row.split()[1:] == ["9"] * 3
    assert "a night" in new


# seeds and optimizers


@pytest.mark.parametrize(
    ("seeds", "expected"), [((0, np.int64(1)), (0, 1)), (torch.arange(2), (0, 1)), (1, (1,)), (np.uint8(1), (1,))]
)
def test_seeds_are_a_number_or_any_sequence(seeds: Any, expected: tuple[int, ...]) -> None:
    assert study_file().with_choices(seeds=seeds).seeds == expected
    assert study_file(seeds=seeds).seeds == expected


@pytest.mark.parametrize(
    ("optimizers", "expected"),
    [
        ("CMA", {"CMA": {}}),
        (np.str_("CMA"), {"CMA": {}}),
        (["CMA", "LCSC"], {"CMA": {}, "LCSC": {"mutation": 0.5}}),
        (("LCSC",), {"LCSC": {"mutation": 0.5}}),
        ({"LCSC": {"mutation": np.float64(0.1)}, "CMA": None}, {"LCSC": {"mutation": 0.1}, "CMA": {}}),
        ([{"LCSC": {"mutation": 0.1}}, "CMA"], {"LCSC": {"mutation": 0.1}, "CMA": {}}),
        (None, {"LCSC": {"mutation": 0.5}, "DE": {}}),
    ],
)
def test_optimizers_have_the_options_that_are_given_else_those_of_the_file(
    optimizers: Any, expected: dict[str, Any]
) -> None:
    listed = study_file(optimizers=[{"LCSC": {"mutation": 0.5}}, "DE"])
    chosen = listed.with_choices(optimizers=optimizers).optimizers
    assert {optimizer.name: optimizer.options for optimizer in chosen} == expected
    if optimizers is not None:
        read = study_file(optimizers=optimizers).optimizers
        assert [optimizer.name for optimizer in read] == list(expected)


# what is given twice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"settings": {"model": "a:b"}}, "settings.model: already given by the argument build"),
        ({"settings": {"score": "a:b"}}, "settings.score: already given by the argument score"),
        ({"settings": {"checkpoints": "*.pt"}}, "settings.checkpoints: already given by the argument checkpoints"),
        (
            {"settings": {"held_out": "a:b"}, "held_out": lambda net: 0.0},
            "settings.held_out: already given by the argument held_out",
        ),
        ({"maximize": False, "settings": {"maximize": True}}, "settings.maximize: already given by the argument"),
        ({"size": 20, "settings": {"size": 20}}, "settings.size: already given by the argument size"),
        ({"rows": None, "space": {"rows": "layers"}}, "rows: already given by the argument space"),
        ({"rows": "layers", "space": {"kind": "convex", "rows": None}}, "rows: already given by the argument space"),
    ],
)
def test_what_a_score_is_given_twice_is_refused(search: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(lcsc_opt.LcscError, match=f"^{said}.*; leave one of them out$"):
        search(**arguments)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("images", 40), ("image_shape", [1, 8, 8]), ("loss", "fid@pixels"), ("sampler", "a:b"), ("reference", "real")],
)
def test_what_images_are_given_twice_is_refused(search: Any, setting: str, value: Any) -> None:
    arguments = {"images": 200, "image_shape": (1, 8, 8), "loss": "fid@pixels", "reference": "real"}
    with pytest.raises(lcsc_opt.LcscError, match=f"^settings.{setting}: already given by the argument "):
        search(score=None, sample=lambda net, noise: net(noise), **arguments, settings={setting: value})


# what is wrong


WRONG = (-1, 1.5, "", [], {}, np.nan, object(), Path("nowhere/x"), b"bytes", [3.5], np.zeros(2), np.zeros((2, 2)))
RUN = ("study_file", "optimizers", "seeds", "budget", "storage", "accept_changes", "callbacks")
SEARCH = (
    *("checkpoints", "build", "score", "held_out", "sample", "reference", "name", "optimizers", "space", "rows"),
    *("budget", "storage", "seed", "jobs", "resume", "accept_changes", "callbacks", "maximize"),
    *("size", "image_shape", "images", "loss", "settings"),
)
TAKEN = {("callbacks", "[]"), ("settings", "{}"), ("rows", "{}"), ("space", "{}"), ("storage", repr(Path("nowhere/x")))}


def refused(call: Any, argument: str, *, but: Any = TAKEN) -> None:
    for value in WRONG:
        if (argument, repr(value)) in but:
            continue
        with pytest.raises(lcsc_opt.LcscError) as caught:
            call(**{argument: value})
        assert "\n" not in str(caught.value)
        assert "pydantic" not in str(caught.value)
    assert not list(Path().glob("*.db")), "refused before anything was run"


@pytest.mark.parametrize("argument", RUN)
def test_run_refuses_in_one_line(workplace: Path, argument: str) -> None:
    refused(lambda **given: lcsc_opt.run(**{"study_file": STUDY, **given}), argument)


@pytest.mark.parametrize("argument", SEARCH)
def test_search_refuses_in_one_line(search: Any, argument: str) -> None:
    """And before the score is called, which may take minutes."""
    called: list[nn.Module] = []
    call = functools.partial(lcsc_opt.search, **{**search.keywords, "score": called.append, "storage": "studies.db"})
    refused(lambda **given: call(**{"checkpoints": STATES, **given}), argument)
    assert called == []
    assert argument in ("build", "score", "held_out") or not Path("studies.files").exists(), "nothing was packed"


def test_what_reads_refuses_in_one_line(workplace: Path) -> None:
    refused(lambda **given: lcsc_opt.load_study(**{"name": "norm/LCSC/0", **given}), "name")
    refused(lambda **given: lcsc_opt.load_study(**{"name": "norm/LCSC/0", **given}), "storage", but=())
    refused(lambda **given: lcsc_opt.compare(**{"experiment": "norm", **given}), "experiment")
    refused(lambda **given: lcsc_opt.compare(**{"experiment": "norm", **given}), "storage", but=())
    refused(lcsc_opt.load_objective, "study_file")


@pytest.mark.parametrize("storage", ["x" * 300, "sqlite:///" + "x" * 300, "no/such/folder/x.db"])
def test_a_file_that_the_system_refuses_is_one_line(run: Any, search: Any, storage: str) -> None:
    for call in (run, search):
        with pytest.raises(lcsc_opt.StudyStoreError) as caught:
            call(storage=storage)
        assert "\n" not in str(caught.value)


def test_a_value_of_several_forms_is_refused_in_one_sentence(search: Any) -> None:
    with pytest.raises(
        lcsc_opt.LcscError, match=r": loss: Input should be a valid string or a valid dictionary, got 3$"
    ):
        search(score=None, sample=lambda net, noise: noise, image_shape=(1, 8, 8), loss=3)
    with pytest.raises(
        lcsc_opt.LcscError, match=r"; loss\.fid: Input should be a valid number or a valid list, got {}$"
    ):
        search(score=None, sample=lambda net, noise: noise, image_shape=(1, 8, 8), loss={"fid": {}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": [0, 0]}, "is given twice"),
        ({"optimizers": ["CMA", "CMA"]}, "is given twice"),
        ({"seeds": [-1]}, r"seeds\[0\]: Input should be "),
    ],
)
def test_a_callers_choices_are_checked_as_the_files_are(run: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(lcsc_opt.StudySpecError, match=said):
        run(**given)
