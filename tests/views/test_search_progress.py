from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import NodeWork
from lcsc_opt.database.history import HeldOut, Holder
from lcsc_opt.database.nodes import KeptNodes
from lcsc_opt.views.progress import (
    FailureReason,
    NodesNow,
    failures_of,
    nodes_of,
    progress_of,
    trial_times,
    workers_of,
)
from tests.history_examples import history

ALIVE = Holder("node1", 42, 900.0)


def test_a_running_study_says_how_long_it_will_take() -> None:
    study = history([3.0, 2.0, None, 1.0], ended=False, running=1, holder=ALIVE, budget={"evaluations": 10})
    found = progress_of(study)
    assert (found.state, found.unit, found.done, found.total, found.share) == ("running", "evaluations", 4, 10, 0.4)
    assert found.per_hour == pytest.approx(3600 / 1.5)
    assert found.seconds_left == pytest.approx(6 * 1.5)
    assert (found.failed, found.retried) == (1, 0)


def test_a_budget_in_images_is_counted_in_images() -> None:
    found = progress_of(history([3.0, 2.0, 1.0], ended=False, holder=ALIVE, budget={"images": 100}))
    assert (found.unit, found.done, found.total) == ("images", 30, 100)
    assert found.per_hour == pytest.approx(10 * 3600 / 1.5)
    assert found.seconds_left == pytest.approx(7 * 1.5)


def test_failed_trials_take_what_they_asked_of_a_budget_in_images() -> None:
    """As the runner counts them: it may ask for 40 images, and they are gone when none comes."""
    columns = {"images": [10.0, 0.0, 0.0, 4.0], "asked": [0.0, 0.0, 40.0, 0.0], "state": [1, 3, 3, 2]}
    study = history([3.0, None, None, 2.0], ended=False, holder=ALIVE, budget={"images": 100}, columns=columns)
    assert progress_of(study).done == 10 + 10 + 40 + 4
    inherited = history(
        [3.0, None, None, 2.0], budget={"images": 100}, columns={**columns, "inherited": [True, True, False, False]}
    )
    assert progress_of(inherited).done == 40 + 4
    assert progress_of(history([None, None], images=0.0, budget={"images": 100})).done == 0, "nobody knows how many"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"ended": True}, "finished"),
        ({"ended": False}, "interrupted"),
        ({"ended": False, "holder": ALIVE}, "running"),
    ],
)
def test_the_state_of_a_study(changes: dict, state: str) -> None:
    found = progress_of(history([2.0, 1.0], **changes))
    assert found.state == state
    assert (found.seconds_left is not None) == (state == "running")


def test_an_empty_study_has_no_rate() -> None:
    found = progress_of(history([], ended=False, budget={}))
    assert (found.state, found.done, found.total, found.per_hour, found.share) == ("empty", 0, None, None, None)


def test_the_rate_is_that_of_the_last_trials_and_of_no_interruption() -> None:
    study = history([1.0] * 100, ended=False, holder=ALIVE, budget={"evaluations": 200}, seconds=3, gap=0)
    study.trials["started"][75:] += 9 * 3600
    study.trials["ended"][75:] += 9 * 3600
    assert progress_of(study).per_hour == pytest.approx(1200)


def test_inherited_trials_are_no_progress() -> None:
    study = history([3.0, 2.0, 1.0], ended=False, columns={"inherited": [True, True, False]}, budget={"evaluations": 4})
    assert progress_of(study).done == 1


def test_workers_are_told_with_what_they_evaluate() -> None:
    study = history([3.0], ended=False, running=2, workers=2, holder=ALIVE)
    found = workers_of(study, now=1050.0)
    assert (found.count, found.host, found.process) == (2, "node1", 42)
    assert found.evaluating == ((1, 48.5), (2, 47.0))
    assert workers_of(history([1.0])).host is None


def test_what_workers_of_each_machine_do_is_what_was_kept_last() -> None:
    nodes = (NodeWork("one", 2, 0.5, 0), NodeWork("two", 0, None, 3))
    study = history([3.0], ended=False, workers=4, holder=ALIVE)
    study = dataclasses.replace(study, nodes=KeptNodes(1040.0, nodes))
    assert nodes_of(study, now=1050.0) == NodesNow(nodes, alive=2, asked=4, seconds=10.0)
    before = dataclasses.replace(study, nodes=KeptNodes(890.0, nodes))  # the holder runs it since 900
    assert nodes_of(before, now=1050.0) == NodesNow((), alive=0, asked=4, seconds=0.0)
    assert nodes_of(dataclasses.replace(study, holder=None), now=1050.0) is None


def test_the_process_that_searches_is_a_worker_whose_trials_say_how_busy_it_is() -> None:
    study = history([3.0, 2.0, 1.0], ended=False, seconds=1.0, gap=0.5, holder=ALIVE)
    found = nodes_of(study, now=1050.0)
    assert found is not None
    [here] = found.nodes
    assert (here.name, here.alive, here.deaths, found.alive, found.asked) == ("node1", 1, 0, 1, 1)
    assert here.busy == pytest.approx(3 / 4)
    new = nodes_of(history([], ended=False, holder=ALIVE), now=1050.0)
    assert new is not None
    assert new.nodes == (NodeWork("node1", 1, None, 0),)


def test_failures_are_grouped_by_reason() -> None:
    study = history(
        [None, 2.0, None, 1.0],
        reasons={0: ("memory", "memory"), 1: ("memory",), 2: ("not finite",)},
    )
    assert failures_of(study) == [
        FailureReason("memory", 3, (0, 1), 1),
        FailureReason("not finite", 1, (2,), 1),
    ]
    assert progress_of(study).retried == 1
    assert failures_of(history([1.0])) == []


def test_thousands_of_different_reasons_are_looked_through_once() -> None:
    """Many name an address or a number of bytes, so that no two are alike."""

    class Reasons(dict[int, tuple[str, ...]]):
        looked = 0

        def __iter__(self) -> Iterator[int]:
            self.looked += 1
            return super().__iter__()

        def items(self) -> Any:
            self.looked += 1
            return super().items()

    reasons = Reasons({number: (f"tried to allocate {number} bytes",) for number in range(500)})
    found = failures_of(dataclasses.replace(history([None] * 500), reasons=reasons))
    assert sorted(failure.trials for failure in found) == [(number,) for number in range(500)]
    assert reasons.looked < 5


# time per trial


def test_time_is_split_into_parts_and_the_rest() -> None:
    columns = {"merge_seconds": 0.25, "sample_seconds": 0.5}
    found = trial_times(history([3.0, 2.0, 1.0], seconds=1.0, gap=0.5, columns=columns))
    assert list(found.seconds) == ["merge", "sample", "other"]
    assert found.seconds["merge"].tolist() == [0.25] * 3
    np.testing.assert_allclose(found.seconds["other"], [0.75, 0.75, 0.25], err_msg="after the last one nothing starts")


def test_an_interruption_is_no_time_of_a_trial() -> None:
    study = history([3.0, 2.0, 1.0], seconds=1.0, gap=0.5)
    study.trials["started"][2] += 3600
    study.trials["ended"][2] += 3600
    np.testing.assert_allclose(trial_times(study).seconds["other"], [1.5, 1.0, 1.0])


def test_with_several_workers_the_rest_is_the_time_from_ask_to_result() -> None:
    study = history([3.0, 2.0], seconds=1.0, workers=2, columns={"started": 1000.0, "ended": [1001.5, 1003.0]})
    np.testing.assert_allclose(trial_times(study).seconds["other"], [1.5, 3.0], err_msg="the second one waited for 2 s")


def test_many_trials_are_averaged_and_none_is_lost() -> None:
    study = history([1.0] * 1001, seconds=2.0, gap=0.0, running=1, ended=False)
    found = trial_times(study, most=100)
    assert (found.width, len(found.numbers)) == (11, 91)
    assert found.numbers[:3].tolist() == [0, 11, 22]
    assert found.seconds["other"] == pytest.approx(2.0)
    assert len(trial_times(history([])).numbers) == 0


@pytest.mark.parametrize(("trial", "answer"), [(None, 1), (2, 2), (0, 0), (9, 1), (3, 1)])
def test_the_answer_is_the_chosen_trial_and_without_a_complete_one_the_best(trial: int | None, answer: int) -> None:
    study = dataclasses.replace(history([3.0, 1.0, 2.0, None]), held_out=HeldOut(trial, 5.0))
    assert (study.chosen, study.best) == (answer, 1)
