"""Three-point brackets: numbers without a derivative, searched between the checks of LCSCGradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.coefficients.tuning import RANGE, TunedNumber, TunedSpace
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.brackets import Bracket
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of, request_of

STEPS = (10, 20, 30, 40)
TARGET = np.array([-0.1, 0.2, 0.3, 0.6])
BEST = {"guidance": 3.2, "churn": 0.15}
SIZES = {"guidance": 4.0, "churn": 1.0}


def space() -> TunedSpace:
    guidance = TunedNumber("guidance", 1.0, 5.0, 1.5)
    churn = TunedNumber("churn", 0.0, 1.0, 0.5, differentiable=False)
    return TunedSpace(AffineSpace(STEPS, default_origin(STEPS)), (guidance, churn))


def bowl(candidate: Candidate, *, gradient: bool) -> Evaluation:
    """Squared distances from the best coefficients and numbers; churn has no derivative."""
    distance = candidate.coefficients - TARGET
    errors = {name: (value - BEST[name]) / SIZES[name] for name, value in candidate.tuned.items()}
    loss = float(np.square(distance).sum() + sum(error**2 for error in errors.values()))
    product = np.concatenate([2 * distance, [2 * errors["guidance"] / SIZES["guidance"], 0.0]]) if gradient else None
    return Evaluation(loss, gradient=product)


def search(
    evaluations: int, *, waiting: int = 1, fails: Callable[[Candidate], bool] = lambda _: False
) -> list[tuple[Candidate, bool]]:
    """The candidates of a search by LCSCGradient, and whether each asked for a gradient."""
    optimizer: Any = build_optimizer(
        OptimizerSpec(name="LCSCGradient"), space(), budget=evaluations, workers=waiting, seed=0
    )
    optimizer.plan_budget(evaluations=evaluations, images=None, images_per_evaluation=0)
    asked = []
    queue: list[Any] = []
    for _ in range(evaluations):
        parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        asked.append((candidate, request_of(parameter).gradient))
        queue.append(parameter)
        if len(queue) == waiting:
            told = queue.pop(0)
            evaluation = bowl(candidate_of(told), gradient=request_of(told).gradient)
            is_failure = fails(candidate_of(told))
            attach_evaluation(told, None if is_failure else evaluation)
            optimizer.tell(told, 100.0 if is_failure else evaluation.loss)
    return asked


def bracketed(loss: Callable[[float], float], start: float, probes: int) -> float:
    """Where a bracket is after so many probes of a function of the unit."""
    bracket = Bracket(start)
    for _ in range(probes):
        distance = bracket.next_distance()
        rise = np.inf if distance == 0 else loss(bracket.center + distance) - loss(bracket.center)
        bracket.tell(distance, rise)
        assert 0 <= bracket.center <= RANGE
    return bracket.center


@pytest.mark.parametrize("best", [0.0, 0.05, 0.21, 0.4])
@pytest.mark.parametrize("start", [0.0, 0.2, 0.4])
def test_a_bracket_closes_in_on_the_lowest_place(best: float, start: float) -> None:
    assert bracketed(lambda unit: abs(unit - best) ** 1.5, start, 16) == pytest.approx(best, abs=0.01 * RANGE)


def test_a_parabola_is_solved_by_its_first_bracket() -> None:
    """Two worse sides are enough, also where one of them is nearer because of a bound."""
    assert bracketed(lambda unit: 3 * (unit - 0.21) ** 2, 0.2, 2) == pytest.approx(0.21)
    assert bracketed(lambda unit: 3 * (unit - 0.06) ** 2, 0.05, 2) == pytest.approx(0.06)


def test_a_number_that_changes_nothing_stays() -> None:
    assert bracketed(lambda unit: 1.0, 0.17, 9) == 0.17


def test_a_number_without_a_derivative_is_found_between_checks() -> None:
    asked = search(200)
    last, gradient = asked[-1]
    assert not gradient
    assert last.tuned["churn"] == pytest.approx(BEST["churn"], abs=0.02)
    assert last.tuned["guidance"] == pytest.approx(BEST["guidance"], abs=0.4)
    assert np.abs(last.coefficients - TARGET).max() < 0.1


@pytest.mark.parametrize("best", [0.0, 0.15, 1.0])
def test_each_probe_moves_only_its_number_of_the_check_before_it(best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BEST, "churn", best)
    asked = search(150)
    plain = [index for index, (_, gradient) in enumerate(asked) if not gradient]
    pairs = [(first, second) for first, second in itertools.pairwise(plain) if second == first + 1]
    assert len(pairs) > 12
    for first, second in pairs[:-1]:
        check = asked[first][0]
        probe = asked[second][0]
        np.testing.assert_allclose(probe.coefficients, check.coefficients, rtol=0, atol=1e-12)
        assert probe.tuned["guidance"] == pytest.approx(check.tuned["guidance"])
        assert abs(probe.tuned["churn"] - check.tuned["churn"]) > 1e-3


def test_the_last_evaluation_of_a_budget_is_a_check() -> None:
    """It has the number that was found, not one beside it."""
    for evaluations in range(20, 32):
        asked = search(evaluations)
        assert not asked[-1][1]
        steps = [candidate.tuned["churn"] for candidate, gradient in asked if gradient]
        assert asked[-1][0].tuned["churn"] == pytest.approx(steps[-1])


@pytest.mark.parametrize("waiting", [1, 3])
def test_a_search_is_the_same_again(waiting: int) -> None:
    first, second = (search(80, waiting=waiting) for _ in range(2))
    for (candidate, _), (again, _) in zip(first, second, strict=True):
        assert candidate.coefficients.tobytes() == again.coefficients.tobytes()
        assert candidate.tuned == again.tuned


def test_with_several_candidates_in_flight_the_number_is_found_too() -> None:
    asked = search(240, waiting=3)
    assert asked[-1][0].tuned["churn"] == pytest.approx(BEST["churn"], abs=0.03)


def test_a_side_that_fails_is_worse() -> None:
    """The best number is where every evaluation fails: the search stays beside it, and does not end."""
    asked = search(200, fails=lambda candidate: candidate.tuned["churn"] < 0.3)
    assert asked[-1][0].tuned["churn"] == pytest.approx(0.3, abs=0.1)
    assert asked[-1][0].tuned["churn"] >= 0.3
