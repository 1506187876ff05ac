"""Sum-to-one algebra: EMA profiles against simulations of their definitions, and the spaces' properties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.profiles import (
    LARGEST_SIGMA_REL,
    PAPER_EMA_RATES,
    POWER_EMA_SIGMAS,
    average_name,
    check_coefficients,
    check_steps,
    close_sum,
    describe_coefficients,
    ema_coefficients,
    extrapolated_average,
    normalize,
    plain_averages,
    power_ema_coefficients,
    window_ema_rates,
)
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace

seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-12, 1e-3, 1.0, 30.0, 1e3, 1e6, 1e10, 1e15])
intervals = st.lists(st.integers(1, 200), min_size=1, max_size=20)
all_steps = st.builds(
    lambda first, gaps: tuple(first + int(gap) for gap in np.cumsum([0, *gaps])), st.integers(1, 5000), intervals
)
rates = st.floats(0, 0.999999)
sigma_rels = st.floats(0.005, LARGEST_SIGMA_REL)


def off_one(coefficients: np.ndarray) -> float:
    """How far the exact sum is from one."""
    return abs(math.fsum([*coefficients, -1.0]))


def affine(steps: Sequence[int], origin_rate: float = 0.99) -> AffineSpace:
    return AffineSpace(tuple(steps), ema_coefficients(steps, origin_rate))


def convex(steps: Sequence[int]) -> ConvexSpace:
    return ConvexSpace(tuple(steps), ema_coefficients(steps, 0.99))


SPACES: tuple[Callable[[Sequence[int]], CoefficientSpace], ...] = (affine, convex)


def free_vector(dimension: int, magnitude: float, seed: int) -> np.ndarray:
    """Normal, now and then with zeros or one outlier; below 2^53, where doubles are a whole number apart."""
    generator = np.random.default_rng(seed)
    free = magnitude * generator.standard_normal(dimension)
    if seed % 3 == 1:
        free[generator.random(dimension) < 0.7] = 0
    if seed % 5 == 2 and magnitude <= 1e6:
        free[generator.integers(dimension)] *= 1e6
    return free


def assert_average_of_training(profile: np.ndarray, steps: Sequence[int], keep: Callable[[int], float]) -> None:
    """It is a moving average updated at every training step: average ← keep(n) average + (1 - keep(n)) weight(n).

    A checkpoint stands for the steps since the one before it, n_{i-1} < n <= n_i; the first for all before it.
    """
    one_hot = np.eye(len(steps))
    average = one_hot[0]
    for step in range(steps[0] + 1, steps[-1] + 1):
        average = keep(step) * average + (1 - keep(step)) * one_hot[np.searchsorted(np.array(steps), step)]
    np.testing.assert_allclose(profile, average, rtol=0, atol=1e-11)
    assert profile.dtype == np.float64
    assert (profile >= 0).all()
    assert off_one(profile) <= 1e-15


@pytest.mark.parametrize("count", [2, 3, 12, 16, 32, 200])
def test_grids_ask_one_checkpoint_exactly_and_averages_without_negative_coefficients(count: int) -> None:
    space = affine(range(100, 100 * count + 100, 100))
    for alone in (np.eye(count)[0], np.eye(count)[-1]):
        assert (space.to_coefficients(space.to_free(alone)) == alone).all()
    for last in (3, 10, count):
        average = normalize(np.arange(count, 0, -1) <= last)
        found = space.to_coefficients(space.to_free(average))
        assert ((found > 0) == (average > 0)).all()
        assert (found >= 0).all()


@given(all_steps, rates)
def test_ema_coefficients_are_those_of_an_average_kept_during_training(steps: tuple[int, ...], rate: float) -> None:
    assert_average_of_training(ema_coefficients(steps, rate), steps, lambda _: rate)
    assert ema_coefficients(steps, 0.0).tolist() == np.eye(len(steps))[-1].tolist()  # bit for bit


@given(all_steps, sigma_rels)
def test_power_ema_coefficients_are_those_of_an_average_kept_during_training(
    steps: tuple[int, ...], sigma_rel: float
) -> None:
    # the profile t^e averaged step by step: keep(t) = (1 - 1/t)^(e + 1), Karras et al. 2024, Eq. 2
    def excess(e: float) -> float:  # of the width of t^e over sigma_rel, Appendix C.2
        return math.sqrt(e + 1) / ((e + 2) * math.sqrt(e + 3)) - sigma_rel

    exponent = 0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, 1e6, xtol=1e-13)
    profile = power_ema_coefficients(steps, sigma_rel)
    assert_average_of_training(profile, steps, lambda step: (1 - 1 / step) ** (exponent + 1))


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_rate_or_a_width_outside_of_its_range_is_refused(value: float) -> None:
    with pytest.raises(StudySpecError, match=r"^rate: expected at least 0 and below 1"):
        ema_coefficients((1, 2), value)
    with pytest.raises(StudySpecError, match=r"^sigma_rel: expected above 0"):
        power_ema_coefficients((1, 2), value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([7], "at least 2 checkpoints"),
        ([-1, 5], r"^steps\[0\]: expected a whole number above -1, got -1"),
        ([1, 3, 3], r"^steps\[2\]: expected a whole number above 3, got 3"),
        ([1, 2.5], r"^steps\[1\]: expected a whole number above 1, got 2.5"),
        ([1, math.inf], r"^steps\[1\]: expected a whole number above 1, got inf"),
        ([None, None], r"^steps\[0\]: expected a whole number above -1, got None"),
        (["step1", "step2"], r"^steps\[0\]: expected a whole number above -1, got 'step1'"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps: list[Any], message: str) -> None:
    with pytest.raises(StudySpecError, match=message):
        check_steps(steps)


def test_a_long_window_keeps_the_rates_of_the_paper() -> None:
    steps = range(750_000, 800_100, 100)  # 50,000 steps, as on CIFAR-10
    assert window_ema_rates(steps) == tuple(sorted((0.999, 0.9995, 0.9999, 0.999943, 0.99995, 0.99997, 0.99999)))


@given(all_steps)
def test_rates_of_any_window_are_told_apart(steps: tuple[int, ...]) -> None:
    adapted = window_ema_rates(steps)
    assert len(adapted) == len(PAPER_EMA_RATES)
    assert all(0 <= rate < 1 for rate in adapted)
    profiles = [ema_coefficients(steps, rate) for rate in adapted]
    on_first = [profile[0] for profile in profiles]
    assert on_first == sorted(on_first)
    for slower, faster in zip(profiles[1:], profiles, strict=False):
        assert np.abs(slower - faster).sum() > 1e-3


def test_the_fastest_average_of_checkpoints_at_every_step_is_the_last_one() -> None:
    steps = (1, 2, 3)
    assert average_name(ema_coefficients(steps, window_ema_rates(steps)[0]), steps) == "last checkpoint"


def test_plain_averages_are_emas_and_uniform_averages_of_the_last_checkpoints() -> None:
    steps = tuple(range(100, 2100, 100))
    averages = plain_averages(steps, [0.9, 0.9995])
    assert [average_name(coefficients, steps) for coefficients in averages] == [
        "EMA 0.9",
        "EMA 0.9995",
        "last checkpoint",
        "average of the last 3",
        "average of the last 10",
        "average of all 20",
    ]
    np.testing.assert_allclose(averages[4], np.repeat([0.0, 0.1], 10), rtol=0, atol=1e-15)
    assert len(plain_averages(steps[:3])) == len(PAPER_EMA_RATES) + 2


@pytest.mark.parametrize(
    ("coefficients", "name"),
    [
        ([0, 1, 0], "step 200"),
        ([0.5, 0, 0.5], "average of 2"),
        ([0, -0.5, 1.5], "last checkpoint, extrapolated by 0.5"),
    ],
)
def test_answers_of_other_baselines_have_names(coefficients: Any, name: str) -> None:
    assert average_name(np.array(coefficients), (100, 200, 300)) == name


def test_names_have_the_settings_of_the_grid() -> None:
    steps = tuple(range(100, 2100, 100))
    for sigma_rel in POWER_EMA_SIGMAS:
        assert average_name(power_ema_coefficients(steps, sigma_rel), steps) == f"power EMA {sigma_rel:g}"
    for rate in (0.75, 0.76, 0.9, 0.9995):  # the first leaves 3e-13 before the last checkpoint
        assert average_name(ema_coefficients(steps, rate), steps) == f"EMA {rate:g}"
    extrapolated = extrapolated_average(20, 4, 0.25)
    assert average_name(extrapolated, steps) == "last 4, extrapolated by 0.25"


@pytest.mark.parametrize("values", [[], [1.0], [-0.5, 0.5, 1.0], [0.2, 0.8, 0.0], [0, 0.25, 0.75], [np.nan, 0.5, 0.5]])
def test_other_coefficients_are_no_plain_average(values: list[float]) -> None:
    assert average_name(np.array(values), (100, 200, 300)) is None


@given(st.integers(1, 40), magnitudes, seeds)
def test_closing_a_sum_moves_it_by_its_error_only(count: int, magnitude: float, seed: int) -> None:
    coefficients = free_vector(count, magnitude, seed)
    error = 1 - math.fsum(coefficients)
    closed = close_sum(coefficients)
    assert off_one(closed) <= 1e-12
    assert np.abs(closed - coefficients).max() <= abs(error) * (1 + 1e-15) + 1e-15 * np.abs(coefficients).max()
    assert (closed != coefficients).sum() <= 2


@pytest.mark.parametrize("values", [[1.0, -0.9995], [math.inf, -math.inf], [], [1e308, 1e308, -1e308]])
def test_what_cannot_be_scaled_to_one_is_refused(values: list[float]) -> None:
    with pytest.raises(StudySpecError, match="cannot be scaled to one"):
        normalize(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.5, 0.5]], r"shape \[1, 2\]; expected \[2\]"),
        ([math.inf, -math.inf], "have to be finite"),
        ([0.5, 0.5 + 2e-9], "the sum is off by 2e-09"),
        ([1e308, 1e308], "the sum is off by inf"),
        ([10**400, 1], "are not numbers: int too large"),
    ],
)
def test_wrong_coefficients_are_refused(values: Any, message: str) -> None:
    with pytest.raises(StudySpecError, match=message):
        check_coefficients(values, 2)


@pytest.mark.parametrize("space_of", SPACES)
@given(all_steps, magnitudes, seeds)
def test_coefficients_of_any_free_vector_sum_to_one_and_give_it_back(
    space_of: Callable[[Sequence[int]], Any], steps: tuple[int, ...], magnitude: float, seed: int
) -> None:
    space = space_of(steps)
    free = free_vector(space.shape[0], magnitude, seed)
    coefficients = space.to_coefficients(free)
    assert coefficients.shape == (len(steps),)
    assert coefficients.dtype == np.float64
    assert off_one(coefficients) <= 1e-12
    if space_of is not convex:  # which clips
        np.testing.assert_allclose(space.to_free(coefficients), free, rtol=0, atol=1e-13 * (1 + np.abs(free).max()))
        moved = np.linalg.norm(coefficients - space.origin)
        assert moved == pytest.approx(np.linalg.norm(free), rel=1e-12, abs=1e-14)


@given(st.integers(25, 60), seeds)
def test_an_affine_direction_moves_its_own_coefficient(count: int, seed: int) -> None:
    space = affine(range(count))
    i = seed % space.shape[0]
    moved = space.to_coefficients(np.eye(space.shape[0])[i]) - space.origin
    assert moved[i] > 0.94
    assert abs(moved[-1]) < 0.21
    assert (np.abs(np.delete(moved, [i, count - 1])) < 0.06).all()


@given(all_steps, magnitudes, seeds)
def test_convex_coefficients_are_not_negative(steps: tuple[int, ...], magnitude: float, seed: int) -> None:
    space = convex(steps)
    free = free_vector(space.shape[0], magnitude, seed)
    coefficients = space.to_coefficients(free)
    assert (coefficients >= 0).all()
    clipped = np.maximum(space.origin + free, 0)
    if clipped.sum() > 1e-3:
        np.testing.assert_allclose(coefficients, clipped / clipped.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space_of", SPACES)
@given(st.integers(2, 25), seeds)
def test_gradients_go_to_the_free_vector_by_the_chain_rule(
    space_of: Callable[[Sequence[int]], Any], count: int, seed: int
) -> None:
    """Against central differences, a convex space's away from the kinks of clipping."""
    space = space_of(range(1, count + 1))
    generator = np.random.default_rng(seed)
    free = 0.3 * generator.standard_normal(space.shape)
    gradient = generator.standard_normal(count)
    if space_of is convex:
        free[np.abs(space.origin + free) < 1e-3] += 0.01
        free[0] = 1.0  # clipping leaves something
    step = 1e-6
    differences: list[float] = []
    for axis in np.eye(space.shape[0]):
        ahead = space.to_coefficients(free + step * axis)
        behind = space.to_coefficients(free - step * axis)
        differences.append(gradient @ (ahead - behind) / (2 * step))
    np.testing.assert_allclose(space.to_free_gradient(free, gradient), differences, atol=1e-8 * count)


def test_a_clipped_coefficient_feels_only_a_fall_inwards() -> None:
    space = convex((1, 2, 3, 4))
    free = space.to_free(np.array([0.0, 0.0, 0.5, 0.5]))
    falls, rises, *_ = space.to_free_gradient(free, np.array([-1.0, 1.0, 0.1, 0.1]))
    assert (falls, rises) == (pytest.approx(-1.1), 0.0)
    assert space.to_free_gradient(free - 1e-9, np.array([-1.0, 1.0, 0.1, 0.1]))[0] == 0.0


def test_coefficients_are_described_by_a_few_numbers() -> None:
    assert describe_coefficients(np.array([-0.5, 0.25, 2.0, -0.75]), (10, 20, 30, 40)) == {
        "sum_abs": 3.5,
        "negative": pytest.approx(1.25 / 3.5),
        "effective": pytest.approx(3.5**2 / (0.25 + 0.0625 + 4 + 0.5625)),
        "largest": 2.0,
        "largest_step": 30,
    }
    assert describe_coefficients(np.array([[-0.5, 1.5], [0.5, 0.5]]), (10, 20)) == {
        "sum_abs": 1.5,  # the mean of 2 and 1
        "negative": pytest.approx(0.5 / 3),  # of all entries
        "effective": pytest.approx((2**2 / 2.5 + 2) / 2),  # the mean of the rows
        "largest": 1.5,
        "largest_step": 20,
    }
