"""``LCSC`` does what Algorithm 1 of Liu et al. 2024 says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lcsc_opt.coefficients.profiles import PAPER_EMA_RATES, ema_coefficients, window_ema_rates
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import LCSC, coefficient_array
from tests.optimizers.asking import AFFINE, STEPS

EMAS = [ema_coefficients(STEPS, rate) for rate in window_ema_rates(STEPS)]
TINY = 1e-11
LOSSES = (5, 1, 4, 2, 6, 3, 7)  # of the first population, whose best three are 1, 3 and 5

Loss = Callable[[int, np.ndarray], float]


def lcsc(**options: Any) -> Any:
    return LCSC(**options)(coefficient_array(AFFINE, seed=0), budget=1000)


def run(optimizer: Any, loss: Loss, count: int) -> list[np.ndarray]:
    """Ask and tell ``count`` times; what was asked."""
    asked = []
    for number in range(count):
        candidate = optimizer.ask()
        asked.append(candidate.value)
        optimizer.tell(candidate, loss(number, candidate.value))
    return asked


def in_turn(number: int, _: np.ndarray) -> float:
    """Every candidate is worse than the one before."""
    return float(number)


def index_of(value: np.ndarray, among: Sequence[np.ndarray]) -> int | None:
    """Which of them it is, up to a tiny mutation; the latest of equals."""
    near = [i for i, other in enumerate(among) if np.abs(value - other).max() < 1e-8]
    return near[0] if near else None


def test_the_first_population_is_the_ema_coefficients_in_order() -> None:
    assert len(EMAS) == len(PAPER_EMA_RATES) == 7
    np.testing.assert_allclose(run(lcsc(), in_turn, 7), EMAS, rtol=0, atol=1e-14)


def test_without_mutation_and_crossover_children_are_their_parents() -> None:
    optimizer = lcsc(mutation=TINY, crossover=0, max_parents=3, generation_size=10)
    children = run(optimizer, lambda number, _: LOSSES[number] if number < 7 else 100 + number, 67)[7:]
    assert {index_of(child, EMAS) for child in children} == {1, 3, 5}, "the best three, each of them now and then"


def is_mix(child: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether it is, up to a factor, of one of both parents in each coefficient, and of either somewhere."""
    largest = child.argmax()
    for factor in (one[largest] / child[largest], other[largest] / child[largest]):
        from_one, from_other = np.abs(child * factor - one) < 1e-8, np.abs(child * factor - other) < 1e-8
        if (from_one | from_other).all() and (from_one & ~from_other).any() and (from_other & ~from_one).any():
            return True
    return False


def test_crossover_mixes_two_parents_coefficient_by_coefficient() -> None:
    optimizer = lcsc(mutation=TINY, crossover=1, max_parents=3, generation_size=300)
    children = run(optimizer, lambda number, _: LOSSES[number] if number < 7 else 100.0, 307)[7:]
    parents = [EMAS[i] for i in (1, 3, 5)]
    whole = [child for child in children if index_of(child, parents) is not None]
    mixed = [child for child in children if index_of(child, parents) is None]
    assert all(any(is_mix(child, *pair) for pair in itertools.combinations(parents, 2)) for child in mixed)
    assert len(whole) / 300 == pytest.approx(1 / 3, abs=0.1), "only where both parents are the same one"
    for pair in itertools.combinations(parents, 2):
        assert sum(is_mix(child, *pair) for child in mixed) / 300 == pytest.approx(2 / 9, abs=0.08)


def test_mutation_is_gaussian_noise_of_that_size_on_every_coefficient() -> None:
    optimizer = lcsc(mutation=1e-3, crossover=0, max_parents=1, generation_size=1500)
    moved = np.array(run(optimizer, in_turn, 1507)[7:]) - EMAS[0]
    # with e the noise and p the parent, the division by the sum leaves e - p sum(e), to first order
    p = EMAS[0]
    np.testing.assert_allclose(moved.std(axis=0), 1e-3 * np.sqrt((1 - p) ** 2 + 19 * p**2), rtol=0.08)
    small = moved[:, p < 1e-3] / 1e-3
    assert small.shape[1] >= 10
    assert np.abs(small.mean(axis=0)).max() < 5 / math.sqrt(1500)
    assert np.mean(np.abs(small) < 1.96) == pytest.approx(0.95, abs=0.005)
    assert np.abs(np.corrcoef(small.T)[~np.eye(small.shape[1], dtype=bool)]).max() < 0.1


def test_a_child_whose_sum_is_near_zero_is_drawn_again() -> None:
    optimizer = lcsc(mutation=1.0, crossover=0, max_parents=1, generation_size=1000)
    children = np.array(run(optimizer, in_turn, 1007)[7:])
    assert np.abs(children).max() < (1 + 5.5) / 0.1
    assert np.abs(math.fsum(children[0]) - 1) <= 1e-12


def test_of_many_rows_each_is_drawn_again_by_itself() -> None:
    """All of sixty rows have a sum that is large enough in one draw of 10^11."""
    space = AffineSpace(STEPS, np.tile(AFFINE.origin, (60, 1)))
    optimizer = LCSC(mutation=1.0, generation_size=100)(coefficient_array(space, seed=0), budget=1000)
    children = np.array(run(optimizer, in_turn, 27)[7:])
    assert children.shape == (20, 60, 20)
    np.testing.assert_allclose(children.sum(axis=-1), 1, rtol=0, atol=1e-9)
    assert np.abs(children).max() < (1 + 5.5) / 0.1


def test_a_generation_shares_its_parents() -> None:
    optimizer = lcsc(mutation=TINY, crossover=0, max_parents=1, generation_size=5)
    run(optimizer, in_turn, 7)
    first = optimizer.ask()
    better = optimizer.parametrization.spawn_child(new_value=np.full(20, 0.05))
    optimizer.tell(better, -1.0)
    optimizer.tell(first, 50.0)
    rest = run(optimizer, lambda *_: 50.0, 9)
    assert [index_of(child, [EMAS[0], np.full(20, 0.05)]) for child in [first.value, *rest]] == [0] * 5 + [1] * 5


def test_the_best_is_never_lost() -> None:
    optimizer = lcsc(mutation=TINY, crossover=0, max_parents=1, generation_size=3)
    losses = np.random.default_rng(0).random(60) + 1
    losses[4] = 0.5
    children = run(optimizer, lambda number, _: float(losses[number]), 60)[9:]
    assert {index_of(child, EMAS) for child in children} == {4}
    np.testing.assert_allclose(optimizer.recommend().value, EMAS[4], atol=1e-14)
