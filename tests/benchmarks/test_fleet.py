"""``benchmarks/fleet.py`` against searches whose time is known by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fleet


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial takes as long, and the coordinator no time."""
    for name in ("SPREAD", "STRAGGLERS", "COORDINATOR", "MESSAGE"):
        monkeypatch.setattr(fleet, name, 0.0)


def outcome(**settings: Any) -> fleet.Outcome:
    return fleet.simulate(fleet.Fleet(**{"life": 1e12, "stragglers": 0.0, **settings}), 0)


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"workers": 1, "window": 1, "trials": 10}, 10),
        ({"workers": 4, "window": 6, "trials": 10}, 3),
        ({"workers": 4, "window": 1, "trials": 10}, 10),  # one candidate at a time
        ({"workers": 4, "window": 1, "trials": 10, "studies": 4}, 10),
        ({"workers": 4, "window": 1, "trials": 10, "studies": 6}, 15),
    ],
)
def test_rounds_of_evaluations(settings: dict[str, int], rounds: int) -> None:
    assert outcome(**settings).seconds == pytest.approx(rounds * fleet.SECONDS)


@pytest.mark.usefixtures("alike")
def test_images_spread_divide_the_sampling_only() -> None:
    sampled = (fleet.SECONDS - fleet.MERGE - fleet.SCORE) / 4
    assert outcome(workers=4, tells="images", trials=10).seconds == pytest.approx(
        10 * (fleet.MERGE + sampled + fleet.SCORE)
    )


def test_deaths_cost_time_and_no_trial() -> None:
    shared = {"workers": 8, "window": 12, "trials": 400}
    died = outcome(**shared, life=600.0)
    assert died.deaths > 0
    assert died.seconds > outcome(**shared).seconds
    assert 0 < died.use < 1
