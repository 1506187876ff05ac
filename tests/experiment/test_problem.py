"""A study compared with what is stored, from data alone; and what a rehearsal finds before the first trial."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lcsc_opt.study.comparison import Continuation, changed_since_finished, compare
from lcsc_opt.experiment.running import listed
from lcsc_opt.study.searching import Search
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, StoredTrials
from lcsc_opt.evaluation.base import InProcessEvaluator
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.objective.merge_sample_score import FEWEST_REHEARSED
from tests.commands import Typed

ENVIRONMENT = {"packages": {"numpy": "2"}, "blas": ["a"], "machine": "m"}
OBJECTIVE = CoefficientFunction(lambda c: float((c**2).sum()), (1, 2, 3), name="f")
STUDY: dict[str, Any] = {
    "name": "e",
    "objective": {"file": "function.py", "settings": {"callable": "m:f", "steps": [1, 2, 3]}},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 4},
}
SUCCEEDED = StoredTrials(4, succeeded=True)
FAILED = StoredTrials(4, succeeded=False)


def spec(**changes: Any) -> StudySpec:
    [made] = listed(parse_studies({**STUDY, **changes}, source="test"))
    return made


def fingerprint(code: dict[str, str]) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "code": code, "objective": OBJECTIVE.describe()}


def opened(
    made: StudySpec, code: dict[str, str], *, stored: dict[str, Any] | None = None, accept_changes: bool = False
) -> Search:
    studies = {} if stored is None else {"e/LCSC/0": stored}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcsc_opt.study.searching.fingerprint_of", lambda _: fingerprint(code))
        with Search.open(
            made,
            OBJECTIVE,
            studies,
            context=BuildContext(None),
            trials=lambda _: SUCCEEDED,
            accept_changes=accept_changes,
        ) as search:
            return search


def begun(**code: str) -> dict[str, Any]:
    return opened(spec(), code).attributes


def compared(
    made: StudySpec,
    code: dict[str, str],
    *,
    stored: dict[str, Any],
    trials: StoredTrials = SUCCEEDED,
    **options: Any,
) -> Continuation:
    return compare(made, stored, fingerprint(code), lambda _: trials, **options)


def test_a_new_study_begins_with_what_the_objective_tells() -> None:
    attributes = begun(m="1")
    assert attributes["steps"] == [1, 2, 3]
    assert attributes["fingerprint"]["code"] == {"m": "1"}


def test_changed_code_is_accepted_by_request_or_before_the_first_success() -> None:
    stored = begun(m="1", helper="1")
    with pytest.raises(StudyStoreError, match=r"e/LCSC/0: changed since it began: m changed; helper gone\. Undo"):
        compared(spec(), {"m": "2"}, stored=stored)
    stored = begun(m="1")
    accepted = compared(spec(), {"m": "2"}, stored=stored, accept_changes=True)
    before_success = compared(spec(), {"m": "2"}, stored=stored, trials=FAILED)
    for study in (accepted, before_success):
        assert study.changed["changes"] == [{"before_trial": 4, "changed": "m changed"}]
        assert study.changed["fingerprint"]["code"] == {"m": "2"}
        assert study.notices == ("e/LCSC/0: continues with changes: m changed",)


def test_settings_may_change_before_the_first_success() -> None:
    stored = begun(m="1")
    corrected = {"file": "function.py", "settings": {"callable": "m:g", "steps": [1, 2, 3]}}
    with pytest.raises(StudyStoreError, match=r'the stored study differs: .*callable was "m:f", is now "m:g"'):
        compared(spec(objective=corrected), {"m": "1"}, stored=stored)
    assert compared(spec(objective=corrected), {"m": "1"}, stored=stored, trials=FAILED).starts_over
    assert not compared(spec(), {"m": "2"}, stored=stored, trials=FAILED).starts_over
    with pytest.raises(StudyStoreError, match=r"specification\.space\.kind was"):
        compared(spec(objective=corrected, space="convex"), {"m": "1"}, stored=stored, trials=FAILED)


def test_whether_anything_is_held_out_is_asked_again_in_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = begun(m="1")
    assert not stored["holds_out"]
    monkeypatch.setattr(CoefficientFunction, "why_nothing_held_out", lambda _: None)
    assert opened(spec(), {"m": "1"}, stored=stored).attributes["holds_out"]


def test_a_finished_study_says_that_its_code_changed() -> None:
    finished = {**begun(m="1", helper="1"), "search_ended": {"evaluations": 4, "exhausted": False}}
    assert "finished before this changed: m changed" in str(changed_since_finished(spec().name, finished, {"m": "2"}))
    assert changed_since_finished(spec().name, finished, {"m": "1"}) is None
    assert changed_since_finished(spec().name, finished, {}) is None, "its code may be gone"
    moved = compared(spec(), {"m": "2"}, stored=finished, measures=False)
    assert moved.changed == {}


def test_an_open_number_of_workers_is_that_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    stored = opened(spec(workers=3), {}).attributes
    capsys.readouterr()
    assert opened(spec(workers="auto"), {}, stored=stored).spec.workers == 1
    assert "workers was 3, is now 1 (candidates are still asked 5 at a time)" in capsys.readouterr().err


def with_settings(**settings: Any) -> dict[str, Any]:
    return {"file": "function.py", "settings": {**STUDY["objective"]["settings"], **settings}}


def test_what_changes_no_loss_may_change_and_is_said_in_one_line() -> None:
    begun_on_three = spec(workers=3, objective=with_settings(batch_size=8))
    stored = opened(begun_on_three, {}).attributes
    objective = with_settings(batch_size=4, device="cuda:1")
    changed = spec(workers=1, objective=objective)
    [line] = compared(changed, {}, stored=stored).notices
    for part in ("batch_size was 8, is now 4", 'device was null, is now "cuda:1"', "workers was 3, is now 1"):
        assert part in line
    assert line.endswith("(candidates are still asked 5 at a time)")
    continued = opened(changed, {}, stored=stored).attributes
    assert continued["specification"]["workers"] == 1
    assert continued["specification"]["objective"] == objective
    assert continued["parallelism"] == {"in_flight": 5, "spread_images": False, "workers": 3}
    assert "changes" not in continued
    with pytest.raises(
        StudyStoreError, match=r"the stored study differs: specification\.objective\.settings\.callable"
    ):
        compared(spec(objective=with_settings(callable="m:g", batch_size=4)), {}, stored=stored)
    with pytest.raises(StudyStoreError, match=r"settings\.checkpoints was null"):
        compared(spec(objective=with_settings(checkpoints="*.pt")), {}, stored=stored)


def test_a_study_that_another_process_changed_meanwhile_is_refused(storage: RDBStorage) -> None:
    new = opened(spec(), {"m": "1"})
    with new.held(storage):
        pass
    stored = StoredStudy.open(storage, "e/LCSC/0")
    with opened(spec(), {"m": "1"}).held(storage):  # another process has created the same
        pass
    with pytest.raises(StudyStoreError, match="another process has just changed it"), opened(spec(), {}).held(storage):
        pass
    continued = opened(spec(), {"m": "2"}, stored=stored.attributes, accept_changes=True)
    with continued.held(storage):
        pass
    with pytest.raises(StudyStoreError, match="another process has just changed it"), continued.held(storage):
        pass  # it is compared with what it was


PARTS = """
import importlib
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


@pytest.fixture(autouse=True)
def any_duration_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.experiment.rehearsal._NOTICED_SECONDS", 0.0)


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
    assert "scored: the evaluation of one batch failed (selection noise): " in said
    assert "selection.txt" in said
    assert not (scored / "studies.db").exists()
    (scored / "selection.txt").write_text("0.5")
    said = typed("run", "scored.yaml", *options).err
    assert "scored: a trial takes about" in said
    assert (scored / "studies.db").exists() == (options == [])
    assert "held-out 0.5 after 3 evaluations" in typed("run", "scored.yaml").err


def test_a_study_that_another_process_makes_during_the_rehearsal_is_not_run(
    scored: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_late(url: str, *, write: bool) -> RDBStorage:
        storage = open_storage(url, write=write)
        StoredStudy.open_or_create(storage, "scored/LCSC/0", {"specification": {}, "fingerprint": {}})
        return storage

    monkeypatch.setattr("lcsc_opt.experiment.running.open_storage", open_late)
    assert "another process has just changed it" in typed("run", "scored.yaml", "~held_out", status=2).err


def test_what_is_broken_is_refused_before_anything_is_stored(scored: Path, typed: Typed) -> None:
    run = ("run", "scored.yaml", "~held_out")
    said = typed(*run, "objective.settings.score=scored_parts:broken", status=2).err
    assert "database: " not in said, "there is none"
    assert "scored: the evaluation of one batch failed (search noise): KeyError: 'los'" in said
    assert "in broken" in said
    assert not (scored / "studies.db").exists()
    assert "after 3 evaluations" in typed(*run).err


GRADIENTS = """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))

@torch.no_grad()
def without_graph(model, noise):
    return model(noise).tanh()

def of_other_channels(model, noise):
    return model(noise)[:, :2]

class Broken(torch.autograd.Function):
    @staticmethod
    def forward(context, images):
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no way back")

def without_backward(model, noise):
    return Broken.apply(model(noise).tanh())

def sample(model, noise):
    with open("sampled.txt", "a") as file:
        file.write(f"{len(noise)}\\n")
    return model(noise).tanh()
"""


@pytest.fixture
def sampled(workplace: Path) -> Path:
    """A study of EMAGrid, then LCSCGradient, of images."""
    (workplace / "sampled_parts.py").write_text(GRADIENTS)
    images = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(workplace / "real.npz", arr_0=images.numpy())
    for step in (10, 20, 30):
        torch.manual_seed(step)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
        torch.save(network.state_dict(), workplace / f"model{step}.pt")
    settings = {
        "checkpoints": "model*.pt",
        "model": "sampled_parts:net",
        "sampler": "sampled_parts:sample",
        "image_shape": [3, 8, 8],
        "nfe": 1,
        "reference": "real.npz",
        "loss": "fid@pixels",
        "images": 40,
        "held_out_metrics": [],
    }
    study = {
        "name": "sampled",
        "objective": {"file": "torch_module.py", "settings": settings},
        "optimizers": ["EMAGrid", "LCSCGradient"],
        "budget": {"evaluations": 2},
        "held_out": {"images": 40, "top": 1},
    }
    (workplace / "sampled.yaml").write_text(yaml.safe_dump(study))
    return workplace


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sampler=sampled_parts:without_graph", "have no autograd graph"),
        (
            "sampler=sampled_parts:without_backward",
            "the evaluation of one batch failed (search noise, with the gradient)",
        ),
        ("sampler=sampled_parts:of_other_channels", "search noise"),
        ("reference=nowhere.npz", "nowhere.npz"),
    ],
)
def test_what_would_stop_a_later_search_stops_the_run_before_its_first_trial(
    sampled: Path, typed: Typed, change: str, reason: str, options: list[str]
) -> None:
    assert reason in typed("run", "sampled.yaml", f"objective.settings.{change}", *options, status=2).err
    assert not (sampled / "studies.db").exists()


def test_a_later_search_is_rehearsed_in_its_own_rows(
    sampled: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    submit = InProcessEvaluator.submit

    def noted(self: InProcessEvaluator, candidate: Candidate) -> Any:
        shapes.append(candidate.coefficients.shape)
        return submit(self, candidate)

    monkeypatch.setattr(InProcessEvaluator, "submit", noted)
    rows = {"weight": "*weight", "bias": "*bias"}
    typed("run", "sampled.yaml", "--dry-run", f"space.rows={rows}", "~held_out")
    assert shapes[0] == (2, 3)


def test_a_search_that_cannot_run_does_not_stop_one_that_continues(sampled: Path, typed: Typed) -> None:
    begin = ("run", "sampled.yaml", "objective.settings.sampler=sampled_parts:without_graph", "~held_out")
    typed(*begin, "--optimizer", "EMAGrid", "budget.evaluations=2")
    said = typed(*begin, "budget.evaluations=4", status=1).err
    assert "after 4 evaluations" in said
    assert "1 of 2 studies did not finish: sampled/LCSCGradient/0: " in said
    assert "have no autograd graph" in said


def test_a_dry_run_says_how_long_a_trial_takes_and_a_second_run_does_not_rehearse(sampled: Path, typed: Typed) -> None:
    said = typed("run", "sampled.yaml", "--dry-run")
    assert "sampled: a trial with its gradient takes about" in said.err
    assert re.search(
        r"sampled: the whole run takes up to about [0-9.]+ s, of which reports take about [0-9.]+ s\n", said.err
    )
    assert "sampled/LCSCGradient/0" in said.out
    assert not (sampled / "studies.db").exists()
    assert "takes about" in typed("run", "sampled.yaml").err
    again = typed("run", "sampled.yaml", "--budget", "3").err
    assert "takes about" not in again
    assert "after 3 evaluations" in again


def test_a_rehearsal_samples_one_batch_and_measures_no_units_of_the_loss(sampled: Path, typed: Typed) -> None:
    changes = ["objective.settings.loss={fdr: [pixels]}", "objective.settings.batch_size=8", "~held_out"]
    typed("run", "sampled.yaml", "--optimizer", "EMAGrid", "--dry-run", "objective.settings.images=40", *changes)
    batches = [int(line) for line in (sampled / "sampled.txt").read_text().split()]
    assert sum(batches) == 3 * FEWEST_REHEARSED < 120, "one model twice, since the first time takes longer, and another"
    assert max(batches) == 8


def test_a_search_goes_on_with_another_batch_size_and_device_as_if_it_had_not_ended(
    sampled: Path, typed: Typed
) -> None:
    run = ("run", "sampled.yaml", "~held_out")
    begin = (*run, "budget.evaluations=4", "objective.settings.batch_size=16")
    for name in ("name=sampled", "name=whole"):
        typed(*begin, name)
    typed(*begin, "name=whole", "--budget", "8")
    changed = ("objective.settings.batch_size=7", "objective.settings.device=cpu")
    said = typed(*run, "budget.evaluations=8", *changed).err
    assert "continues with changes that do not affect the loss: objective.settings.batch_size" in said
    storage = open_storage("sqlite:///studies.db", write=False)
    found, whole = (StoredStudy.open(storage, f"{name}/LCSCGradient/0") for name in ("sampled", "whole"))
    assert found.attributes["specification"]["objective"]["settings"]["batch_size"] == 7
    asked = [[coefficients_of(trial) for trial in study.trials()] for study in (found, whole)]
    assert len(asked[0]) == 8
    np.testing.assert_allclose(asked[0], asked[1], atol=1e-6)  # losses are single precision


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_advice_about_rows_is_given_once(scored: Path, typed: Typed, options: list[str]) -> None:
    command = ("run", "scored.yaml", "space.rows=layers", "held_out=null", *options)
    assert typed(*command).err.count("scored/LCSC/0: without a gradient, more rows do not help") == 1


def test_one_start_parses_compares_and_configures_once(
    scored: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}

    def counted(module: str, name: str) -> None:
        original = getattr(importlib.import_module(module), name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*arguments, **options)

        monkeypatch.setattr(f"{module}.{name}", call)

    counted("lcsc_opt.study.searching", "compare")
    counted("lcsc_opt.study.searching", "check_siblings")
    counted("lcsc_opt.experiment.running", "our_studies")
    counted("lcsc_opt.base.study_file", "parse_studies")
    counted("lcsc_opt.objective.loading", "load_file")
    typed("run", "scored.yaml", "~held_out")
    assert calls == {"check_siblings": 1, "parse_studies": 1, "load_file": 1}
    calls.clear()
    typed("run", "scored.yaml", "~held_out", "--budget", "4")
    assert calls == {"compare": 1, "parse_studies": 1, "load_file": 1, "our_studies": 1}
