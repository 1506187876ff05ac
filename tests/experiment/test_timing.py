"""A time as a budget: what an optimizer plans with, and how long a run is said to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import SEARCH, Candidate, Cost, Evaluation
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.database.states import is_searched
from lcsc_opt.experiment.rehearsal import about, rehearse
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.experiment.timing import (
    Pace,
    Seconds,
    evaluations_in,
    evaluations_within,
    report_seconds,
    searches_seconds,
)
from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.study.planning import Plan

ENDED = {"search_ended": {"evaluations": 3, "exhausted": False, "deadline": 60.0}}


@dataclasses.dataclass
class Images(Objective):
    """Of images, and never evaluated itself."""

    steps: tuple[int, ...] = (1, 2, 3, 4)
    samples: Samples = dataclasses.field(default_factory=lambda: Samples(per_evaluation=1000))

    def evaluate(self, candidate: Candidate) -> Evaluation:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {}

    def why_no_gradient(self) -> str | None:
        return None


def planned(optimizers: list[Any], **changes: Any) -> list[Plan]:
    content = {"name": "e", "objective": {"file": "a.py"}, "optimizers": optimizers, "budget": "1 min", **changes}
    return [Plan(spec, Images()) for spec in searches_of([parse_study_file(content, source="test")])]


def test_durations_are_numbers_as_people_write_them() -> None:
    shown = [about(seconds) for seconds in (0.123, 9.96, 54.2, 89.4, 99.6, 100, 5399, 360_000)]
    numbers = ["0.12 s", "10 s", "54 s", "89 s", "1.7 min", "1.7 min", "90 min", "100 h"]
    assert shown == [f"about {number}" for number in numbers]


def test_an_optimizer_plans_with_what_fits_into_the_time() -> None:
    pace = Pace(gradient=Seconds(3.0), search=Seconds(0.48, 0.0005))
    [spec] = planned(["CMA"])
    assert evaluations_in(spec, pace) == 60
    assert evaluations_in(spec, Pace(gradient=Seconds(600.0))) == 2
    [several] = planned(["CMA"], workers=2)
    assert evaluations_in(several, pace) == 120


def test_a_run_lasts_as_long_as_its_searches_and_its_one_report() -> None:
    pace = Pace(
        gradient=Seconds(0.0, 0.003), selection=Seconds(1.0), held_out=Seconds(1.0, 0.001), also=Seconds(0.0, 0.004)
    )
    options: dict[str, Any] = {"budget": {"evaluations": 50}, "held_out": {"images": 5000, "top": 3}}
    [search] = planned(["CMA"], **options)
    assert searches_seconds([search], pace) == pytest.approx(50 * 1.02)
    # three finalists, the last checkpoint, and three points on the way; the best, the last checkpoint
    assert report_seconds([search], pace) == 7 * 1.0 + 2 * 6.0 + 2 * 4.0
    both = [search, *planned(["LCSC"], **options)]
    assert report_seconds(both, pace) == 8 * 1.0 + 3 * 6.0 + 3 * 4.0, "two finalists of each"
    [gradient] = planned(["LCSCGradient"], **options)
    assert 15 < searches_seconds([gradient], pace) < 40, "most steps have 100 images"
    grid, timed = planned(["EMAGrid", "CMA"], budget="5 min")
    assert searches_seconds([timed], pace) == 300
    averages = grid.grid_size or 0
    assert searches_seconds([grid], pace) == pytest.approx(averages * 1.02), "it is through before"
    [short] = planned(["EMAGrid"], budget="3 s")
    assert searches_seconds([short], pace) == 3, "a time ends a grid, too"


def test_a_dry_run_knows_what_a_time_buys() -> None:
    pace = Pace(gradient=Seconds(0.0, 0.003), search=Seconds(1.0))
    grid, plain, gradient = planned(["EMAGrid", "CMA", "LCSCGradient"])
    averages = grid.grid_size or 0
    assert evaluations_within(600, grid, pace) == averages, "a grid has no more"
    assert evaluations_within(5.2, grid, pace) == 5
    [single] = planned([{"Grid": {"profile": "uniform"}}])
    assert evaluations_within(600, single, pace) == single.grid_size, "also of the smallest grid"
    assert evaluations_within(600, plain, pace) == int(600 / 1.02)
    bought = [evaluations_within(seconds, gradient, pace) for seconds in (60, 600, 36000)]
    assert bought == sorted(bought)
    assert bought[0] > 60, "most steps have few images"
    assert bought[2] > 1000, "ten hours"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of the rehearsal, which nothing moves but the evaluations of :func:`rehearsed`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lcsc_opt.experiment.rehearsal.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def rehearsed(
    clock: SimpleNamespace,
    seconds: Callable[[Candidate, int], Cost],
    loading: float,
    *,
    gradient: bool = False,
) -> Pace:
    """What a rehearsal finds out about evaluations of these costs; the first on each noise takes longer."""
    loaded: set[str] = set()

    def evaluate(candidate: Candidate) -> Evaluation:
        cost = seconds(candidate, candidate.images or 16)
        clock.now += cost.sample_seconds + cost.features_seconds + cost.metric_seconds
        if candidate.noise.group not in loaded:
            clock.now += loading
        loaded.add(candidate.noise.group)
        return Evaluation(1.0, cost=cost)

    return rehearse("s", Images(), evaluate, Candidate(np.full(4, 0.25), gradient=gradient), report=True).pace


@pytest.mark.parametrize("loading", [0.0, 60.0])
def test_what_a_trial_takes_is_known_from_few_images(clock: SimpleNamespace, loading: float) -> None:
    def cost(candidate: Candidate, images: int) -> Cost:
        return Cost(images=images, sample_seconds=0.1 * images, metric_seconds=0.5)

    pace = rehearsed(clock, cost, loading)
    assert pace.search.of(1000) == pytest.approx(100.5)
    assert pace.held_out.of(5000) == pytest.approx(500.5)


def test_where_few_images_take_no_time_more_are_timed(clock: SimpleNamespace) -> None:
    """A call of a network costs something, too."""

    def cost(candidate: Candidate, images: int) -> Cost:
        return Cost(images=images, sample_seconds=0.2 + 0.001 * images)

    assert rehearsed(clock, cost, 0.0).search.of(1000) < 5


def test_where_calls_take_the_time_a_trial_does_not_take_as_many_times_longer(clock: SimpleNamespace) -> None:
    """As those of a small network do, each of whose kernels waits for a core that others use."""

    def cost(candidate: Candidate, images: int) -> Cost:
        return Cost(images=images, sample_seconds=14 + 0.01 * images)

    pace = rehearsed(clock, cost, 0.0, gradient=True)
    assert 24 <= pace.gradient.of(1000) < 72
    assert 24 <= pace.search.of(1000) < 72


def test_a_gradient_is_not_timed_with_more_images_than_tell(clock: SimpleNamespace) -> None:
    """A U-Net of a few layers and fifty steps: two numbers of images say what further ones cost."""
    sampled = []

    def cost(candidate: Candidate, images: int) -> Cost:
        sampled.append((candidate.gradient, images))
        warm_up = 0.5 if len(sampled) == 1 else 0.0
        return Cost(images=images, sample_seconds=warm_up + 1.6 + 0.02 * images)

    pace = rehearsed(clock, cost, 0.0, gradient=True)
    assert pace.gradient.of(1000) == pytest.approx(21.6)
    assert max(images for gradient, images in sampled if gradient) == 64


def test_a_slow_first_evaluation_is_compared_with_fewer_images(clock: SimpleNamespace) -> None:
    def cost(candidate: Candidate, images: int) -> Cost:
        return Cost(images=images, sample_seconds=3.2 + 0.2 * images)

    assert rehearsed(clock, cost, 0.0).search.of(1000) == pytest.approx(203.2)


def test_other_noise_takes_as_long_and_its_further_features_are_added(clock: SimpleNamespace) -> None:
    """Of two numbers of images, the further ones cost less each than the first, which pay for the calls."""
    sampled = []

    def cost(candidate: Candidate, images: int) -> Cost:
        sampled.append((candidate.noise.group, images))
        features = 0.001 if candidate.noise == SEARCH else 0.004
        return Cost(images=images, sample_seconds=0.6 + 0.006 * images, features_seconds=features * images)

    pace = rehearsed(clock, cost, 60.0, gradient=True)
    assert pace.gradient is not None
    assert pace.gradient.of(1000) == pace.search.of(1000) == pytest.approx(7.6)
    assert pace.selection.of(1000) == pace.held_out.of(1000) == pytest.approx(10.6)
    assert [images for group, images in sampled if group != SEARCH.group] == [16, 16]


def test_a_study_of_an_expired_time_is_searched_until_there_is_more() -> None:
    spec = planned(["LCSC"])[0].spec
    assert is_searched(spec, ENDED)
    assert not is_searched(planned(["LCSC"], budget="61 s")[0].spec, ENDED)
    assert not is_searched(spec, {"search_ended": {"evaluations": 3, "exhausted": False}})
    assert is_searched(planned(["LCSC"], budget={"evaluations": 3})[0].spec, ENDED)
