"""Everything evaluated is a trial under a key: what is under another one is named, and stands in no table."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import lcsc_opt
from lcsc_opt.base.errors import LcscError, StudyStoreError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.experiment.result import Result
from tests.commands import Typed

URL = "sqlite:///studies.db"
MY = """
import torch
def build():
    return torch.nn.Linear(4, 1, bias=False)
def loss(net, draw):
    shift = {"search": 1, "selection": 2, "held-out": 3}[draw.group]
    noise = torch.Generator().manual_seed(10 * shift + draw.seed)
    return ((net(torch.randn(draw.size or 40, 4, generator=noise))) ** 2).mean(1)
"""
STUDY = {
    "name": "small",
    "objective": {
        "file": "score.py",
        "settings": {"checkpoints": "runs", "model": "keyed_score:build", "score": "keyed_score:loss", "size": 40},
    },
    "optimizers": ["EMAGrid", "CMA"],
    "budget": {"evaluations": 4},
    "held_out": {"images": 50, "top": 1},
}


def checkpoints(seed: int = 0) -> None:
    drawn = torch.Generator().manual_seed(seed)
    Path("runs").mkdir(exist_ok=True)
    for step in (100, 200, 300):
        torch.save({"weight": torch.randn(1, 4, generator=drawn)}, f"runs/model_{step}.pt")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("keyed_score.py").write_text(MY)
    monkeypatch.delitem(sys.modules, "keyed_score", raising=False)  # that of another test
    importlib.invalidate_caches()
    checkpoints()
    return tmp_path


def run(**changes: Any) -> list[lcsc_opt.Study]:
    return lcsc_opt.run({**STUDY, **changes}, storage=URL)


def own() -> optuna.Study:
    return optuna.load_study(study_name="small", storage=URL)


def roles() -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in own().trials:
        counts[trial.user_attrs["role"]] = counts.get(trial.user_attrs["role"], 0) + 1
    return counts


def test_what_no_search_asked_for_is_a_trial_with_a_role_and_is_measured_once() -> None:
    run()
    first = roles()
    assert first.keys() == {"had", "choice", "report"}
    assert "experiment of lcsc_opt" in own().user_attrs["about"]
    run()
    assert roles() == first
    shutil.rmtree("runs")  # nothing was written: nothing is loaded
    run()
    assert roles() == first
    states = {trial.user_attrs["role"]: trial.state.name for trial in own().trials}
    assert states == {"had": "COMPLETE", "choice": "PRUNED", "report": "COMPLETE"}


def test_plain_optuna_has_the_values_of_the_report() -> None:
    run()
    report = StoredExperiment.open(open_storage(URL, write=False), "small").report
    assert report is not None
    values = {trial.user_attrs["model"]["key"]: trial.value for trial in own().get_trials(states=[COMPLETE])}
    assert {measured.model.key: measured.loss for measured in report.models} == values


COMPLETE = optuna.trial.TrialState.COMPLETE


def test_a_deleted_record_is_measured_again_and_takes_nothing_of_another_problem(typed: Typed) -> None:
    [_, study] = run()
    before = study.held_out
    optuna.delete_study(study_name="small", storage=URL)
    assert "was deleted, which says what its searches are of" in typed.refused("export", study.name, "-o", "x.pt")
    assert "was deleted: run the same command again" in typed("compare", "small").err
    run()
    assert study.held_out == before
    optuna.delete_study(study_name="small", storage=URL)
    checkpoints(seed=1)
    with pytest.raises(LcscError, match="small/CMA/0: is of another problem than small: the checkpoints: "):
        run(optimizers=["CMA"])


def test_a_copy_of_a_search_on_other_checkpoints_is_named_and_is_in_no_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(seeds=[0])
    shutil.move("studies.db", "other.db")
    checkpoints(seed=1)
    run(seeds=[1])
    optuna.copy_study(
        from_study_name="small/CMA/0", from_storage="sqlite:///other.db", to_storage=URL, to_study_name="small/CMA/0"
    )
    with pytest.raises(LcscError, match="small/CMA/0: is of another problem than small: the checkpoints: "):
        run(optimizers=["CMA"], seeds=[0, 1], budget={"evaluations": 6})
    assert "small/CMA/0" not in {study.study for study in HistoryReader(open_storage(URL, write=False)).read("small")}
    assert "of another problem, and in no table: small/CMA/0" in capsys.readouterr().err


def stored() -> StoredExperiment:
    return StoredExperiment.open(open_storage(URL, write=True), "small")


def change_the_key() -> None:
    experiment = stored()
    key = experiment.attributes["key"]
    experiment.set_attribute("key", {**key, "decides": {**key["decides"], "settings.size": 41}})


def delete_the_experiment() -> None:
    optuna.delete_study(study_name="small", storage=URL)


@pytest.mark.parametrize(
    ("accident", "message"),
    [(change_the_key, "another process has continued it with changes: settings.size was 40, is now 41"),
     (delete_the_experiment, "was deleted meanwhile")],
)  # fmt: skip
def test_nothing_is_written_once_the_stored_key_is_another_one(accident: Callable[[], None], message: str) -> None:
    def meanwhile(_: object, trial: Any) -> None:
        if trial.number == 1:
            accident()

    with pytest.raises(StudyStoreError, match=message):
        lcsc_opt.run({**STUDY, "optimizers": ["CMA"]}, storage=URL, callbacks=[meanwhile])
    trials = optuna.load_study(study_name="small/CMA/0", storage=URL).trials
    assert len(trials) == 2


def test_the_problem_may_not_change_while_another_process_searches() -> None:
    def second(_: object, trial: Any) -> None:
        if trial.number == 0 and not Path("tried").exists():
            Path("tried").touch()
            settings = {**STUDY["objective"]["settings"], "size": 41}  # type: ignore[index]
            with pytest.raises(LcscError, match=r"differs from the stored experiment.* settings\.size was 40"):
                run(optimizers=["LCSC"], objective={"file": "score.py", "settings": settings})

    lcsc_opt.run({**STUDY, "optimizers": ["CMA"]}, storage=URL, callbacks=[second])
    assert Path("tried").exists()


def reported() -> dict[str, float]:
    report = stored().report
    assert report is not None
    return {measured.model.name: measured.loss for measured in report.models}


def test_the_trainers_average_is_looked_for_in_each_run() -> None:
    run()
    assert "trainer's EMA" not in reported()
    average = {"weight": torch.full((1, 4), 0.5)}
    torch.save(average, "runs/model_300_ema.pt")
    run()
    first = reported()["trainer's EMA"]
    torch.save({"weight": torch.full((1, 4), 2.0)}, "runs/model_300_ema.pt")  # written again
    run()
    assert reported()["trainer's EMA"] == pytest.approx(16 * first)
    measured = roles()
    torch.save({"weight": torch.full((1, 4), 2.0)}, "runs/model_300_ema.pt")  # the same bytes
    run()
    assert roles() == measured


def test_a_file_that_was_touched_is_the_same_and_held_back_results_are_returned() -> None:
    run()
    measured = roles()
    for path in Path("runs").iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    run()
    assert roles() == measured


def test_resume_evaluates_a_stored_candidate_again_where_functions_cannot_be_compared() -> None:
    states = {step: {"weight": torch.randn(1, 4, generator=torch.Generator().manual_seed(step))} for step in (1, 2, 3)}

    def search(target: float, budget: int) -> Result:
        return lcsc_opt.search(
            states,
            build=lambda: torch.nn.Linear(4, 1, bias=False),
            score=lambda net: ((net.weight - target) ** 2).mean(),
            optimizers="CMA",
            budget=budget,
            storage="studies.db",
            resume=True,
        )

    search(0.0, 4)
    assert len(search(0.0, 6).studies[0].trials) == 6
    for budget in (6, 8):  # also of a search that has ended
        with pytest.raises(StudyStoreError, match=r"trial 5 had the loss .*, and has another one now"):
            search(1.0, budget)


def test_code_that_changes_while_a_search_runs_is_said_and_nothing_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    def edit(_: object, trial: Any) -> None:
        if trial.number == 1:
            Path("keyed_score.py").write_text(MY.replace(".mean(1)", ".mean(1) * 7"))

    lcsc_opt.run({**STUDY, "optimizers": ["CMA"]}, storage=URL, callbacks=[edit])
    said = capsys.readouterr().err
    assert "small: while it ran, there were changes: keyed_score changed" in said
    assert "keeps something beside its weights" not in said
