from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import pytest
from optuna.trial import TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import FailureReason, HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.summary import SUMMARY
from lcsc_opt.views.study_status import overview, rate, rate_text, seconds_left
from tests.history_examples import history, measured, reported, standing, trials_of
from tests.study_examples import coefficients, write_report, write_study

ALIVE = "node1"


def overview_of(study: StoredStudy) -> dict[str, Any]:
    reader = HistoryReader(study.storage)
    return overview(reader, reader.read_study(study.name))


def left(losses: Sequence[float | None], *, running: int = 0, **changes: Any) -> tuple[float | None, float | None]:
    """The rate, and the time left, of a study of these trials."""
    trials = trials_of(losses, running=running)
    study = standing(trials, **changes)
    per_second = rate(study, trials)
    return per_second, seconds_left(study, per_second)


def test_a_running_study_says_how_long_it_will_take_in_the_unit_of_its_budget() -> None:
    in_evaluations = left([3.0, 2.0, None, 1.0], ended=False, running=1, holder=ALIVE, budget={"evaluations": 10})
    assert in_evaluations == pytest.approx((1 / 1.5, 6 * 1.5))
    in_images = left([3.0, 2.0, 1.0], ended=False, holder=ALIVE, budget={"images": 100})
    assert in_images == pytest.approx((10 / 1.5, 7 * 1.5))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"images": 100}, "24,000 images an hour"),
        ({"evaluations": 9}, "2,400 evaluations an hour"),
        ({"seconds": 9}, None),
    ],
)
def test_a_rate_has_its_unit_and_time_has_none(budget: dict[str, float], text: str | None) -> None:
    trials = trials_of([3.0, 2.0, 1.0])
    study = standing(trials, ended=False, budget=budget)
    assert rate_text(study, rate(study, trials)) == text


@pytest.mark.parametrize(("hourly", "text"), [(0.3, "0.3"), (1.42, "1.4"), (9.96, "10"), (11.6, "12")])
def test_a_slow_rate_is_not_rounded_to_nothing(hourly: float, text: str) -> None:
    study = standing([], ended=False, budget={"evaluations": 9})
    assert rate_text(study, hourly / 3600) == f"{text} evaluations an hour"


def test_failed_trials_take_what_they_asked_of_a_budget_in_images() -> None:
    """As the runner counts them: it may ask for 40 images, and they are gone when none comes."""
    trials = trials_of([3.0, None, None, 2.0])
    for trial, images in zip(trials, (10, 0, 0, 4), strict=True):
        trial.user_attrs["cost"]["images"] = images
    trials[2].user_attrs["images"] = 40
    trials[3].state = TrialState.PRUNED
    study = standing(trials, ended=False, holder=ALIVE, budget={"images": 100})
    assert study.budget_spent == 10 + 10 + 40 + 4
    assert history([None, None], images=0, budget={"images": 100}).budget_spent == 0, "nobody knows how many"


def test_a_study_that_does_not_run_has_no_time_left_and_an_empty_one_no_rate() -> None:
    for ended in (True, False):
        assert left([2.0, 1.0], ended=ended, budget={"evaluations": 9})[1] is None
    assert left([], ended=False, budget={}) == (None, None)
    assert rate(standing([]), trials_of([2.0, 1.0])) is None, "they came after the study was read"


def test_the_rate_is_that_of_the_last_trials_and_of_no_interruption() -> None:
    trials = trials_of([1.0] * 100, seconds=3, gap=0)
    for trial in trials[75:]:
        assert trial.datetime_complete is not None
        trial.datetime_complete += datetime.timedelta(hours=9)
    study = standing(trials, ended=False, holder=ALIVE, budget={"evaluations": 200})
    assert rate(study, trials) == pytest.approx(1 / 3)


def test_failures_are_grouped_by_reason() -> None:
    trials = trials_of([None, 2.0, None])
    for trial, reasons in zip(trials, (["memory", "memory"], ["memory"], ["not finite"]), strict=True):
        trial.user_attrs["attempts"] = [{"reason": reason, "seconds": 1.0} for reason in reasons]
    assert FailureReason.of(trials) == [FailureReason("memory", 3, 1), FailureReason("not finite", 1, 1)]
    assert FailureReason.of([]) == []


def test_everything_about_a_study_is_json(url: str) -> None:
    held_out = measured(5.0, trial=0)
    study = write_study(open_storage(url, write=True), "digits/LCSC/0", [4.0, None, 2.0], held_out=held_out)
    found = overview_of(study)
    assert json.loads(json.dumps(found)) == found
    expected = {
        **{"study": "digits/LCSC/0", "state": "finished", "evaluations": 3, "failed": 1, "best_trial": 2},
        **{"searched": 4.0, "held_out": 5.0, "checkpoints": 3, "chosen_trial": 0},  # both of the chosen trial
        **{"coefficients": coefficients(0).tolist(), "failure_reasons": {"broken": 1}},
        "best_coefficients": describe_coefficients(coefficients(0), (100, 200, 300)),
    }
    assert {key: found[key] for key in expected} == expected


def searched_with_failures(url: str) -> StoredStudy:
    """Trials 0 and 3 failed, trial 2 succeeded at its second attempt, and trial 5 is at its second one."""
    study = write_study(open_storage(url, write=True), "digits/LCSC/0", [], ended=False)

    def attempt(number: int) -> dict[str, object]:
        return {"reason": f"broken {number % 3}", "seconds": 1.0, "traceback": f"Traceback {number}"}

    with study.hold():
        for number in range(6):
            key = study.add_candidate(Candidate(coefficients(number)))
            if number in {2, 5}:
                study.note_attempts(key, [attempt(number)])
            if number in {0, 3}:
                study.fail(key, [attempt(number)])
            elif number < 5:
                cost = Cost(images=10, seconds=0.5, merge_seconds=0.125)
                study.finish(key, Evaluation(5.0 - number, {}, cost))
    return study


def test_an_overview_says_of_a_summary_what_it_says_of_the_trials(any_url: str) -> None:
    study = searched_with_failures(any_url)
    short = overview_of(study)
    assert study.attributes[SUMMARY]["retried"] == 1
    study.set_attribute(SUMMARY, None)
    assert overview_of(study) == short
    expected = {"failed": 2, "chosen_trial": 4, "failure_reasons": {"broken 0": 2}}
    expected["tracebacks"] = {"broken 0": "Traceback 3", "broken 2": "Traceback 5"}
    assert {name: short[name] for name in expected} == expected
    assert "merging" in short["shares_of_time"]
    assert short["seconds_per_trial"]["merge"] == 0.125


def test_an_answer_that_is_no_trial_is_one_error(url: str) -> None:
    study = searched_with_failures(url)
    write_report(study.storage, reported(5.0, trial=9))
    with pytest.raises(StudyStoreError, match="has no trial 9 of a search"):
        overview_of(study)


def test_a_study_that_was_deleted_meanwhile_is_one_error(url: str) -> None:
    study = searched_with_failures(url)
    study.delete()
    with pytest.raises(StudyStoreError, match="no such study"):
        overview_of(study)
