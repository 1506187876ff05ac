"""Studies whose candidates race: pruned trials of fewer images, a budget of images, continued bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

import lcsc_opt
from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.optimizers import racing
from tests.commands import Typed

OBJECTIVE = """
import numpy as np

from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.objective.contract import Objective

STEPS = tuple(range(100, 1100, 100))


class Prompts(Objective):
    steps = STEPS
    images_per_evaluation = 0

    def __init__(self, images):
        self.images_per_evaluation = images
        self._shifts = 0.01 * np.random.default_rng(0).standard_normal((max(images, 1), len(STEPS)))

    def evaluate(self, candidate, *, gradient=False):
        images = candidate.images or self.images_per_evaluation
        away = candidate.coefficients - 0.1 - self._shifts[:images].mean(axis=0)
        if candidate.noise.group == "held-out":
            away = candidate.coefficients - 0.1
        return Evaluation(float(away @ away), cost=Cost(images=images))

    def describe(self):
        return {}


def build(settings, context):
    return Prompts(settings["images"])
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "prompts.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    return {
        "name": "raced",
        "objective": {"file": "prompts.py", "settings": {"images": 90}},
        "optimizers": ["EMAGrid", {"LCSC": {"racing": {"eta": 3, "rungs": 3}}}, {"CMA": {"racing": {}}}],
        "budget": {"images": 2250},
        "held_out": {"images": 90, "top": 3},
    }


def stored(name: str) -> StoredStudy:
    return StoredStudy.open(open_storage("sqlite:///studies.db", write=False), name)


def trials_of(name: str) -> list[Any]:
    return stored(name).trials()


def sequence(name: str) -> list[tuple[Any, ...]]:
    trials = trials_of(name)
    return [(t.number, t.state, t.value, t.user_attrs.get("images"), t.user_attrs["coefficients"]) for t in trials]


@pytest.mark.parametrize("name", ["LCSC", "CMA"])
def test_few_images_are_pruned_trials_and_the_budget_counts_images(study: dict[str, Any], name: str) -> None:
    lcsc_opt.run(study, optimizers=[name])
    trials = trials_of(f"raced/{name}/0")
    images = Counter((trial.state, trial.user_attrs.get("images")) for trial in trials)
    assert set(images) == {(TrialState.PRUNED, 10), (TrialState.PRUNED, 30), (TrialState.COMPLETE, None)}
    spent = sum(trial.user_attrs.get("images") or 90 for trial in trials)
    assert 2250 <= spent < 2250 + 90
    assert len(trials) > 2 * 25, "more candidates than evaluations on all images would be"
    answer = stored(f"raced/{name}/0").attributes["held_out"]["trial"]
    assert trials[answer].state == TrialState.COMPLETE


@pytest.mark.parametrize(("workers", "interruptions"), [(1, 6), (2, 1)])
def test_an_interrupted_race_goes_on_bit_for_bit(
    study: dict[str, Any], monkeypatch: pytest.MonkeyPatch, workers: int, interruptions: int
) -> None:
    """Interrupted after some tells: in every rung, between a loss and the next ask."""
    study = {**study, "workers": workers, "optimizers": study["optimizers"][1:2]}
    lcsc_opt.run(study)
    tell = racing.Racing._internal_tell_candidate
    countdown = [7]

    def interrupted(self: Any, candidate: Any, loss: float) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        tell(self, candidate, loss)

    monkeypatch.setattr(racing.Racing, "_internal_tell_candidate", interrupted)
    again = {**study, "name": "again"}
    runs = 0
    while True:
        runs += 1
        countdown[0] = 0 if runs > interruptions else 7 + 10 * runs
        try:
            lcsc_opt.run(again)
            break
        except KeyboardInterrupt:
            continue
    assert runs == interruptions + 1
    assert sequence("again/LCSC/0") == sequence("raced/LCSC/0")


def test_show_says_how_candidates_race_by_default(study: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    lcsc_opt.run({**study, "budget": {"images": 360}, "held_out": None}, optimizers=["CMA"])
    assert "racing: eta: 3, rungs: 3" in Typed(capsys)("show", "raced/CMA/0").out


def test_a_raised_budget_continues_and_a_fork_races_too(
    study: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = Typed(capsys)
    lcsc_opt.run(study, optimizers=["LCSC"])
    before = sequence("raced/LCSC/0")
    lcsc_opt.run({**study, "budget": {"images": 3150}}, optimizers=["LCSC"])
    assert sequence("raced/LCSC/0")[: len(before)] == before
    assert len(sequence("raced/LCSC/0")) > len(before)
    typed("fork", "raced/LCSC/0", "forked", "--optimizer", "CMA", "--budget", "900")
    assert len(trials_of("forked/CMA/0")) > len(sequence("raced/LCSC/0"))
    typed("fork", "raced/LCSC/0", "same", "--budget", "900")
    own_images = {trial.user_attrs.get("images") for trial in trials_of("same/LCSC/0")[-5:]}
    assert own_images & {10, 30}, "the fork races, too"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": {"evaluations": 50}}, "racing: saves images, and budget.evaluations does not count them"),
        ({"objective": {"file": "prompts.py", "settings": {"images": 17}}}, "needs at least 18, got 17"),
        ({"optimizers": [{"LCSCQuadratic": {"racing": {}}}]}, "LCSCQuadratic cannot race"),
        ({"optimizers": [{"LCSC": {"racing": {"eta": 0}}}]}, "eta: expected at least 2, got 0"),
        ({"optimizers": [{"LCSC": {"racing": True}}]}, "expected a mapping of keys to values, got True"),
    ],
)
def test_what_cannot_race_is_one_line_and_nothing_is_stored(
    study: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((StudySpecError, LcscError), match=said) as caught:
        lcsc_opt.run({**study, **changes})
    assert "\n" not in str(caught.value)
    if Path("studies.db").exists():
        assert not our_studies(open_storage("sqlite:///studies.db", write=False))
