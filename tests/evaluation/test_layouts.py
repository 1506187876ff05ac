from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, Candidate, Cost, Evaluation
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.layouts import ROUNDS, Choice, fastest_layout
from lcsc_opt.objective.contract import Objective

CANDIDATE = Candidate(np.array([0.5, 0.5]), gradient=True)


class Laid(Objective):
    """Answers with seconds that it is told, in turns for each layout."""

    steps = (1, 2)
    layouts = (CONTIGUOUS, CHANNELS_LAST)

    def __init__(self, **seconds: Any) -> None:
        self._seconds: dict[str, Iterator[float]] = {
            CONTIGUOUS: iter(seconds["contiguous"]),
            CHANNELS_LAST: iter(seconds["channels_last"]),
        }
        self.seen: list[Candidate] = []

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.seen.append(candidate)
        return Evaluation(
            1.0, cost=Cost(seconds=next(self._seconds[candidate.layout]) + 50, features_seconds=30, metric_seconds=20)
        )

    def describe(self) -> dict[str, Any]:
        return {}


def chosen(objective: Laid) -> Choice:
    return fastest_layout(objective, objective.evaluate, CANDIDATE)


def test_the_faster_layout_is_chosen_by_candidates_like_those_of_the_search() -> None:
    objective = Laid(contiguous=[1.0] * (1 + ROUNDS), channels_last=[9.0, *[0.5] * ROUNDS])
    choice = chosen(objective)
    assert (choice.layout, choice.relative_seconds) == (CHANNELS_LAST, 0.5)
    assert all(candidate.gradient for candidate in objective.seen)
    turns = [candidate.layout for candidate in objective.seen]
    assert turns == [CONTIGUOUS, CHANNELS_LAST, CHANNELS_LAST, CONTIGUOUS] * 2


@pytest.mark.parametrize(
    ("contiguous", "channels_last"),
    [
        ([1.0] * 6, [0.97] * 6),  # a tie
        ([7.0, 8.0, 1.0, 7.0], [1.4] * 6),  # something else ran beside
        ([1.0] * 5, [0.1, *[1.0] * 5]),  # a first evaluation
    ],
)
def test_ties_and_noise_keep_the_contiguous_layout(contiguous: list[float], channels_last: list[float]) -> None:
    assert chosen(Laid(contiguous=contiguous, channels_last=channels_last)).layout == CONTIGUOUS


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Failure("view size is not compatible", 0.1), CONTIGUOUS),
        (Evaluation(1.2, cost=Cost(seconds=0.1)), CONTIGUOUS),
        (Evaluation(1.00001, cost=Cost(seconds=0.1)), CHANNELS_LAST),
    ],
)
def test_a_layout_in_which_the_candidate_fails_or_has_another_loss_is_not_chosen(
    answer: Outcome, expected: str
) -> None:
    def evaluate(candidate: Candidate) -> Outcome:
        return Evaluation(1.0, cost=Cost(seconds=1.0)) if candidate.layout == CONTIGUOUS else answer

    assert fastest_layout(Laid(contiguous=[], channels_last=[]), evaluate, CANDIDATE).layout == expected


def test_where_an_evaluation_fails_no_other_follows() -> None:
    seen: list[Candidate] = []

    def evaluate(candidate: Candidate) -> Outcome:
        seen.append(candidate)
        return Failure("out of memory", 0.1)

    assert fastest_layout(Laid(contiguous=[], channels_last=[]), evaluate, CANDIDATE) == Choice()
    assert len(seen) == 1


def test_slow_evaluations_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.evaluation.layouts.MOST_SECONDS", 0.0)
    objective = Laid(contiguous=[1.0] * 2, channels_last=[9.0, 0.5])
    assert chosen(objective).layout == CHANNELS_LAST
