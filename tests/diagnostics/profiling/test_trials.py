from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.spans import listening, span
from lcsc_opt.base.study_file import parse_study
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.diagnostics.profiling import plan_to_profile
from lcsc_opt.diagnostics.profiling.trials import SpanClock, folder_of, run_trials, throw_away_database, times_of
from lcsc_opt.search.experiment import Experiment

START = datetime.datetime(2026, 11, 20, 12)


def trial(number: int, end: float, *, failed: str = "", **cost: Any) -> FrozenTrial:
    attributes = {"reason": failed} if failed else {"cost": cost}
    state = TrialState.FAIL if failed else TrialState.COMPLETE
    made = create_trial(state=state, value=None if failed else 1.0, user_attrs=attributes)
    made.number, made.datetime_complete = number, START + datetime.timedelta(seconds=end)
    return made


def clock(*spans: tuple[str, float, float]) -> SpanClock:
    made, start = SpanClock(), START.timestamp()
    made.spans = [(name, start + begin, start + end) for name, begin, end in spans]
    return made


def test_the_first_trial_warms_up_and_the_others_are_averaged() -> None:
    trials = [trial(0, 10, images=50, seconds=9.0), trial(2, 16, images=10, seconds=2.0), trial(1, 12, images=20)]
    spans = clock(("ask", 0, 5), ("database", 9, 11), ("ask", 12, 12.5), ("database", 15, 18))
    times = times_of(trials, spans)
    assert (times.trials, times.failed) == (2, 0)
    assert times.seconds == pytest.approx(3.0)
    assert times.cost["images"] == 15
    assert times.cost["seconds"] == 1.0
    assert times.spans["ask"] == pytest.approx(0.25)
    assert times.spans["database"] == pytest.approx((1 + 1) / 2)  # what is within the measured time


def test_failed_trials_take_time_and_no_part_of_the_means() -> None:
    times = times_of([trial(0, 1, images=9), trial(1, 2, images=4), trial(2, 5, failed="no")], clock())
    assert (times.trials, times.failed, times.seconds) == (2, 1, 2.0)
    assert times.cost["images"] == 4


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([trial(0, 1), trial(1, 2, failed="the GPU is on fire")], "the GPU is on fire"),
        ([trial(0, 1)], "there were too few"),
        ([], "there were too few"),
    ],
)
def test_where_no_trial_can_be_measured_the_reason_is_said(trials: list[FrozenTrial], reason: str) -> None:
    with pytest.raises(SearchFailedError, match=f"no trial could be measured: {reason}"):
        times_of(trials, clock())


def test_a_clock_hears_how_long_spans_last() -> None:
    heard, begin = SpanClock(), time.time()
    with listening(heard):
        for _ in range(2):
            with span("ask"):
                time.sleep(0.02)
    ended = time.time()
    sums = heard.between(begin, ended)
    assert list(sums) == ["ask"]
    assert 0.04 <= sums["ask"] <= ended - begin


def test_the_database_is_beside_the_studys_own_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with throw_away_database(tmp_path) as storage:
        assert study_names(storage) == []
        assert [path.name.startswith(".lcsc-profile-") for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), throw_away_database(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with throw_away_database(tmp_path / "is not there") as storage:
        assert study_names(storage) == []
    assert list(tmp_path.iterdir()) == []


def test_a_search_of_a_few_trials_is_planned_for_the_whole_budget(workplace: Path) -> None:
    settings = {"callable": "plain_losses:loss", "steps": [10, 20, 30, 40]}
    (workplace / "plain_losses.py").write_text("def loss(coefficients):\n    return float((coefficients**2).sum())\n")
    study = {
        "name": "plain",
        "objective": {"file": "function.py", "settings": settings},
        "optimizers": ["EMAGrid", "CMA"],
        "seeds": [3, 4],
        "budget": {"evaluations": 600},
        "workers": 2,
    }
    plan, studies = plan_to_profile(parse_study(study, source="test"), workplace)
    assert (plan.name, studies) == ("plain/CMA/3", 4)
    with throw_away_database() as storage:
        times = run_trials(Experiment(storage, plan), plan, 4)
        attributes = StoredStudy.open(storage, "profile/CMA/3").attributes
    assert times.trials == 4
    assert attributes["optimizer_budget"] == {"evaluations": 600, "images": None}
    assert attributes["budget"] == {"evaluations": 5, "images": None}
    assert attributes["specification"]["workers"] == 1


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("sqlite:///studies.db", Path()),
        ("sqlite:////data/runs/studies.db", Path("/data/runs")),
        ("sqlite://", None),
        ("postgresql://me@host/studies", None),
        ("nonsense", None),
    ],
)
def test_only_a_file_has_a_folder(url: str, folder: Path | None) -> None:
    assert folder_of(url) == folder
