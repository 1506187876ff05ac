"""Averages out of rows that are averages: against NVlabs' phema.py, dense profiles, and averages that were tracked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients import ema_coefficients, power_ema_coefficients
from lcsc_opt.coefficients.profiles import average_name, default_origin, plain_averages, window_ema_rates
from lcsc_opt.coefficients.rows import LARGEST_SIGMA_REL, AverageSteps, Profiles, Row, power_exponent, rows_of

# printed by solve_posthoc_coefficients of NVlabs' training/phema.py (edm2, commit of 2024) for widths .05 and .1
PHEMA = {
    ((1000, 2000, 3000), 0.07): [
        6.270359942267e-07,
        -1.540282989692e-05,
        0.002799855890083,
        -0.01904565142948,
        0.4410766033538,
        0.5751839679795,
    ],
    ((1000, 2000, 3000), 0.2): [
        -0.01895707264546,
        0.05258537075686,
        -0.133345095495,
        0.3366067540672,
        -0.3874931218458,
        1.150603165162,
    ],
    ((33554, 67108, 100663, 134217), 0.15): [
        -0.0005620161400602,
        0.001944003694192,
        -0.01314742882487,
        0.038019077687,
        -0.07795965564455,
        0.2004108513455,
        -0.2640610769322,
        1.115356244815,
    ],
    ((7, 19, 100), 0.03): [
        -3.601856828567e-26,
        1.793668194068e-24,
        -2.424024874303e-13,
        2.30522452586e-06,
        2.222903453171,
        -1.222905758396,
    ],
}


def two_widths(*steps: int, widths: tuple[float, ...] = (0.05, 0.1)) -> AverageSteps:
    steps_of_rows = AverageSteps.of(Row(step, width) for step in steps for width in widths)
    assert isinstance(steps_of_rows, AverageSteps)
    return steps_of_rows


@pytest.mark.parametrize(("steps", "sigma_rel"), PHEMA)
def test_coefficients_are_those_of_phema(steps: tuple[int, ...], sigma_rel: float) -> None:
    found = power_ema_coefficients(two_widths(*steps), sigma_rel)
    np.testing.assert_allclose(found, PHEMA[steps, sigma_rel], rtol=1e-9, atol=1e-12)


def test_a_width_that_is_there_is_that_row() -> None:
    steps = two_widths(100, 200, 300)
    np.testing.assert_allclose(power_ema_coefficients(steps, 0.1), [0, 0, 0, 0, 0, 1], atol=1e-12)


def dense(rows: list[Row], end: int) -> np.ndarray:
    """The profiles of rows as densities at many times, ``[K, end * 50]``."""
    times = (np.arange(end * 50) + 0.5) / 50
    profiles = []
    for row in rows:
        exponent = power_exponent(row.width) if row.width else 0.0
        start = 0.0 if row.width else row.step - 1
        inside = (times > start) & (times <= row.step)
        profile = np.where(inside, (times / row.step) ** exponent, 0.0)
        profiles.append(profile / profile.sum())
    return np.stack(profiles)


def test_inner_products_are_those_of_dense_profiles() -> None:
    rows = [Row(20, 0.05), Row(20, 0.2), Row(37), Row(38), Row(40, 0.1), Row(40, LARGEST_SIGMA_REL)]
    profiles = dense(rows, 40)
    expected = profiles @ profiles.T * 50  # sums of densities → integrals
    np.testing.assert_allclose(Profiles.of(rows).times_power(Profiles.of(rows)), expected, rtol=1e-3, atol=1e-4)
    times = (np.arange(40 * 50) + 0.5) / 50
    exponential = 0.9 ** (40 - times)
    exponential /= exponential.sum()
    np.testing.assert_allclose(
        Profiles.of(rows).times_exponential(0.9, 40.0), profiles @ exponential * 50, rtol=1e-3, atol=1e-6
    )


def tracked(decays: dict[str, np.ndarray], every: int) -> tuple[dict[str, np.ndarray], int]:
    """Averages of a random walk of 40 weights, updated at each step: name → ``[steps / every, 40]``."""
    count = len(next(iter(decays.values())))
    walk = np.cumsum(np.random.default_rng(0).normal(size=(count, 40)), axis=0)
    saved: dict[str, list[np.ndarray]] = {name: [] for name in decays}
    averages = {name: walk[0].copy() for name in decays}
    for step in range(1, count + 1):
        for name, decay in decays.items():
            averages[name] += (1 - decay[step - 1]) * (walk[step - 1] - averages[name])
            if step % every == 0:
                saved[name].append(averages[name].copy())
    return {name: np.array(values) for name, values in saved.items()}, count


def test_reconstructions_are_near_to_averages_that_were_tracked() -> None:
    times = np.arange(1, 2001)
    decays = {str(width): (1 - 1 / times) ** (power_exponent(width) + 1) for width in (0.05, 0.1, 0.07, 0.15)}
    decays["rate"] = np.full(2000, 0.995)
    averages, count = tracked(decays, every=100)
    steps = two_widths(*range(100, count + 1, 100))
    rows = np.stack([averages["0.05"], averages["0.1"]], axis=1).reshape(len(steps), 40)
    scale = np.linalg.norm(averages["0.05"][-1] - averages["0.15"][-1])
    for width in (0.07, 0.15):
        off = np.linalg.norm(power_ema_coefficients(steps, width) @ rows - averages[str(width)][-1])
        assert off < 0.02 * scale
    off = np.linalg.norm(ema_coefficients(steps, 0.995) @ rows - averages["rate"][-1])
    assert off < 0.05 * scale


def test_weights_of_the_last_step_make_fast_averages_exact() -> None:
    rows = [Row(step, width) for step in (100, 200) for width in (0.05, 0.1)]
    with_last = AverageSteps.of([*rows[:2], Row(200), *rows[2:]])
    found = ema_coefficients(with_last, 0.3)
    assert found[2] > 0.6
    assert ema_coefficients(with_last, 0.0).tolist() == [0, 0, 0, 0, 1]


def test_whatever_takes_steps_takes_them() -> None:
    steps = two_widths(100, 200, 300)
    assert steps == (100, 100, 200, 200, 300, 300)
    assert pickle.loads(pickle.dumps(steps)).widths == steps.widths
    for coefficients in (default_origin(steps), *plain_averages(steps), *plain_averages(steps, [0.9, 0.999])):
        assert coefficients.shape == (6,)
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert average_name(power_ema_coefficients(steps, 0.15), steps) == "power EMA 0.15"
    assert average_name(ema_coefficients(steps, window_ema_rates(steps)[3]), steps).startswith("EMA ")  # type: ignore[union-attr]
    assert window_ema_rates(two_widths(50)) == tuple(sorted(window_ema_rates(two_widths(50))))


def test_plain_steps_stay_plain() -> None:
    steps = AverageSteps.of([Row(1), Row(5)])
    assert type(steps) is tuple
    assert rows_of(steps) == [Row(1), Row(5)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(100, 0.1), Row(100, 0.1)], "step 100, width 0.1 comes after step 100, width 0.1"),
        ([Row(100, 0.1), Row(100, 0.05)], "in order"),
        ([Row(0, 0.1), Row(100, 0.1)], "width 0.1 at step 0: an average needs a step above 0"),
        ([Row(100, 0.3), Row(200, 0.3)], "sigma_rel above 0 and at most 0.2887"),
        ([Row(100, -0.1), Row(200, 0.1)], "sigma_rel"),
        ([Row(100, float("nan")), Row(200, 0.1)], "sigma_rel"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(StudySpecError, match=message):
        AverageSteps.of(rows)
