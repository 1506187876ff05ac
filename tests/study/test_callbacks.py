"""Callbacks with Optuna's signature: what they are given, how they stop a search, and what they raise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import lcsc_opt
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import reading
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.study.loop import TrialCallback
from tests.model_studies import write_model_study

LOSSES = """
import os
import numpy as np

def loss(coefficients):
    if os.environ.get("FAIL") and coefficients[0] > float(os.environ["FAIL"]):
        raise ValueError("too much of the first")
    return float(((coefficients - [0.5, -0.5, 1.0]) ** 2).sum())
"""


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., lcsc_opt.Study]:
    Path("losses_of_callbacks.py").write_text(LOSSES)
    monkeypatch.delitem(sys.modules, "losses_of_callbacks", raising=False)  # of an earlier test's folder

    def run(*callbacks: TrialCallback, budget: dict[str, int] | None = None, **changes: Any) -> lcsc_opt.Study:
        settings = {"callable": "losses_of_callbacks:loss", "steps": [10, 20, 30]}
        content = {
            "name": "called",
            "objective": {"file": "function.py", "settings": settings},
            "optimizers": ["LCSC"],
            "budget": budget or {"evaluations": 8},
            **changes,
        }
        (study,) = lcsc_opt.run(content, callbacks=callbacks)
        return study

    return run


class Recorder:
    """Reads what callbacks of optuna-integration read."""

    def __init__(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.best: list[float | None] = []
        self.processes: set[int] = set()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        assert isinstance(study, optuna.Study)
        assert [direction.name for direction in study.directions] == ["MINIMIZE"]
        complete = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        self.best.append(study.best_trial.value if complete else None)
        self.trials.append(trial)
        self.processes.add(os.getpid())

    @property
    def numbers(self) -> list[int]:
        return [trial.number for trial in self.trials]


def test_callbacks_get_each_trial_as_optuna_reads_it(run: Callable[..., lcsc_opt.Study]) -> None:
    recorder = Recorder()
    study = run(recorder)
    assert recorder.numbers == list(range(8))
    values = [trial.value for trial in recorder.trials]
    assert recorder.best == np.minimum.accumulate(np.array(values, dtype=float)).tolist()
    for trial, row in zip(recorder.trials, study.trials, strict=True):
        assert (trial.state, trial.value) == (TrialState.COMPLETE, row["loss"])
        assert trial.datetime_complete is not None
        coefficients = coefficients_of(trial)
        assert coefficients.tolist() == row["coefficients"]
        assert trial.params == {"sum_abs": pytest.approx(np.abs(coefficients).sum())}
        assert trial.user_attrs["cost"]["seconds"] == row["seconds"]
        assert trial.user_attrs["metrics"] == row["metrics"]
    stored = optuna.load_study(study_name=study.name, storage=study.storage)
    assert stored.trials == recorder.trials
    run(again := Recorder())
    assert not again.trials, "finished trials were called for when they ended"


def stop_after(number: int) -> TrialCallback:
    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == number:
            study.stop()

    return stop


def test_stop_ends_the_search_and_the_next_run_continues_it(
    run: Callable[..., lcsc_opt.Study], capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = run(name="whole")
    recorder = Recorder()
    study = run(stop_after(2), recorder)
    assert recorder.numbers == [0, 1, 2]
    assert study.state == "interrupted"
    assert "a callback has stopped the search" in capsys.readouterr().err
    run(recorder)
    assert recorder.numbers == list(range(8))
    assert study.state == "finished"
    assert [trial["coefficients"] for trial in study.trials] == [row["coefficients"] for row in uninterrupted.trials]


def test_trials_that_run_in_other_processes_when_a_search_is_stopped_are_finished(
    run: Callable[..., lcsc_opt.Study],
) -> None:
    recorder = Recorder()
    study = run(stop_after(2), recorder, workers=2)
    assert recorder.numbers == [0, 1, 2, 3, 4], "three trials are in flight"
    assert recorder.processes == {os.getpid()}
    assert [trial["state"] for trial in study.trials] == ["COMPLETE"] * 5


def test_a_stopped_search_is_reported_and_again_when_it_has_continued(workplace: Path) -> None:
    study_file = write_model_study(workplace, optimizers=["LCSC"], budget={"images": 80}, held_out={"top": 2})
    (study,) = lcsc_opt.run(study_file, callbacks=[stop_after(1)])
    assert len(study.trials) == 2
    assert study.held_out is not None
    (study,) = lcsc_opt.run(study_file)
    assert len(study.trials) > 2
    assert (study.state, study.held_out is not None) == ("finished", True)
    stored = optuna.load_study(study_name=study.name, storage=study.storage)
    best = sorted(stored.trials, key=lambda trial: (trial.value, trial.number))[:2]
    with reading(study.storage) as storage:
        found = HistoryReader(storage).read_study(study.name).found
    assert found is not None
    assert found.model.trial in [trial.number for trial in best], "the first report is replaced"


@pytest.mark.parametrize("error", [RuntimeError("no network"), KeyboardInterrupt()])
def test_what_a_callback_raises_ends_the_run_and_loses_nothing(
    run: Callable[..., lcsc_opt.Study], error: BaseException
) -> None:
    def fail(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 3:
            raise error

    recorder = Recorder()
    with pytest.raises(type(error)):
        run(recorder, fail, seeds=[0])
    assert recorder.numbers == [0, 1, 2, 3]
    assert [trial["state"] for trial in lcsc_opt.load_study("called/LCSC/0").trials] == ["COMPLETE"] * 4
    run(recorder)
    assert recorder.numbers == list(range(8)), "each trial once"


def test_callbacks_get_failed_trials(run: Callable[..., lcsc_opt.Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "0.2")  # three of the seven averages that begin a search have more
    recorder = Recorder()
    run(recorder, budget={"evaluations": 12}, failures={"retries": 0, "in_a_row": None})
    assert recorder.numbers == list(range(12))
    failed = [trial for trial in recorder.trials if trial.state == TrialState.FAIL]
    assert 0 < len(failed) < 12
    assert all(trial.value is None and "too much of the first" in trial.user_attrs["reason"] for trial in failed)


class _Run:
    """What WeightsAndBiasesCallback calls of a run of W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values))


@pytest.mark.filterwarnings("ignore:.*has been deprecated:FutureWarning")
def test_a_callback_of_optuna_integration_runs_unchanged(
    run: Callable[..., lcsc_opt.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna_integration")
    wandb: Any = ModuleType("wandb")
    wandb.run = _Run()
    wandb.init = lambda **_: wandb.run
    wandb.sdk = ModuleType("wandb.sdk")
    wandb.sdk.wandb_run = ModuleType("wandb.sdk.wandb_run")
    wandb.sdk.wandb_run.Run = _Run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delitem(sys.modules, "optuna_integration.wandb", raising=False)
    monkeypatch.delitem(sys.modules, "optuna_integration.wandb.wandb", raising=False)
    from optuna_integration.wandb import WeightsAndBiasesCallback

    study = run(WeightsAndBiasesCallback(metric_name="loss"))
    assert [step for step, _ in wandb.run.logged] == list(range(8))
    assert [values["loss"] for _, values in wandb.run.logged] == [trial["loss"] for trial in study.trials]
    assert wandb.run.config == {"direction": ["MINIMIZE"]}
