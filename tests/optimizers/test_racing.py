"""Racing: who goes on, on how many images, and what the optimizer behind it is told."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import nevergrad as ng
import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.optimizers import build_optimizer, candidate_of, coefficient_array, request_of
from lcsc_opt.optimizers.racing import Racing, RacingOptions
from lcsc_opt.testing import check_optimizer
from tests.optimizers.asking import AFFINE, run, tell

IMAGES = 900


class Told(ng.optimizers.base.Optimizer):  # type: ignore[misc]
    """Asks random candidates, and remembers the losses."""

    def __init__(self, parametrization: Any) -> None:
        super().__init__(parametrization)
        self.asked: list[Any] = []
        self.told: dict[int, float] = {}

    def _internal_ask_candidate(self) -> Any:
        step = 0.1 * self._rng.standard_normal(self.dimension)
        self.asked.append(self.parametrization.spawn_child().set_standardized_data(step))
        return self.asked[-1]

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        self.told[self.asked.index(candidate)] = loss


class Prompts:
    """Distance to a target that each image moves a little: fewer images have another mean, and losses a bias."""

    def __init__(self, *, spread: float = 0.0, bias: float = 0.0) -> None:
        generator = np.random.default_rng(1)
        self._shifts = spread * generator.standard_normal((IMAGES, len(AFFINE.steps)))
        self._bias = bias
        self._target = np.full(len(AFFINE.steps), 1 / len(AFFINE.steps))

    def loss(self, coefficients: np.ndarray, images: int = IMAGES) -> float:
        away = coefficients - self._target - self._shifts[:images].mean(axis=0)
        return float(away @ away + self._bias / images)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        return Evaluation(self.loss(candidate.coefficients, candidate.images or IMAGES))

    def answer(self, parameter: Any) -> Evaluation:
        return self.evaluate(candidate_of(parameter))


def racing(seed: int = 0, **options: Any) -> Racing:
    inner = Told(coefficient_array(AFFINE, seed=seed))
    return Racing(inner, RacingOptions(**options), images=IMAGES)


def test_one_candidate_in_eta_goes_on_to_eta_times_as_many_images() -> None:
    asked = run(racing(), Prompts(spread=0.01), 130 * 3)
    images = Counter(request_of(candidate).images for candidate in asked)
    assert set(images) == {100, 300, None}
    assert images[300] == pytest.approx(images[100] / 3, abs=8)
    assert images[None] == pytest.approx(images[100] / 9, abs=8)


def test_a_candidate_goes_on_with_the_same_coefficients_bit_for_bit_before_another_is_asked() -> None:
    asked = run(racing(), Prompts(), 60)
    for earlier, later in itertools.pairwise(asked):
        rung = request_of(later).images
        if rung != 100:
            assert later.value.tobytes() == earlier.value.tobytes()
            assert request_of(earlier).images == (100 if rung == 300 else 300)
    assert sum(request_of(candidate).images != 100 for candidate in asked) == 17


def test_the_optimizer_is_told_what_the_loss_on_all_images_is_though_few_images_are_biased() -> None:
    objective = Prompts(bias=100.0)  # 1 on 100 images, 0.11 on all
    optimizer = racing()
    run(optimizer, objective, 60)
    inner = optimizer.optimizer
    assert len(inner.told) == len(inner.asked) > 30
    for number, loss in inner.told.items():
        assert loss == pytest.approx(objective.loss(inner.asked[number].value), rel=1e-9)


def test_only_a_candidate_of_all_images_is_ever_told_as_the_best() -> None:
    objective = Prompts(spread=1.0)  # few images tell hardly anything
    optimizer = racing()
    asked = run(optimizer, objective, 300)
    on_all = [objective.loss(candidate.value) for candidate in asked if request_of(candidate).images is None]
    assert min(optimizer.optimizer.told.values()) == min(on_all)
    assert objective.loss(optimizer.recommend().value) == pytest.approx(min(on_all), rel=1e-9)


@pytest.mark.parametrize("in_flight", [4, 18])
def test_with_several_in_flight_nothing_below_the_best_of_all_images_is_told(in_flight: int) -> None:
    objective = Prompts(spread=10.0)  # few images tell hardly anything
    for seed in range(5):
        optimizer = racing(seed)
        waiting = []
        best = np.inf
        for _ in range(100):
            waiting.append(optimizer.ask())
            if len(waiting) < in_flight:
                continue
            candidate = waiting.pop(0)
            if request_of(candidate).images is None:
                best = min(best, objective.loss(candidate.value))
            tell(optimizer, candidate, objective.answer(candidate))
            assert min(optimizer.optimizer.told.values(), default=np.inf) >= best
        assert np.isfinite(best)


def test_candidates_that_drop_out_before_any_had_all_images_are_told_later() -> None:
    optimizer = racing()
    waiting = [optimizer.ask() for _ in range(6)]
    objective = Prompts()
    for candidate in waiting[1:]:
        tell(optimizer, candidate, objective.answer(candidate))
    assert not optimizer.optimizer.told
    tell(optimizer, waiting[0], None, loss=1e6)
    assert optimizer.optimizer.told == {0: 1e6}
    while not set(range(6)) <= set(optimizer.optimizer.told):
        candidate = optimizer.ask()
        tell(optimizer, candidate, objective.answer(candidate))
    told = optimizer.optimizer.told
    assert all(told[n] == pytest.approx(objective.loss(waiting[n].value), rel=1e-9) for n in range(1, 6))


def test_failures_are_told_and_the_race_goes_on() -> None:
    optimizer = racing()
    asked = run(optimizer, Prompts(), 200, failing=lambda number: number % 3 == 1)
    assert list(optimizer.optimizer.told.values()).count(1e6) > 50
    assert sum(request_of(candidate).images is None for candidate in asked) > 5


@pytest.mark.parametrize("name", ["LCSC", "CMA", "DE"])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_an_optimizer_reaches_a_lower_loss_with_the_same_images(name: str, in_flight: int) -> None:
    objective = Prompts(spread=0.02)

    def reached(options: dict[str, Any], seed: int) -> float:
        spec = OptimizerSpec(name=name, options=options)
        optimizer = build_optimizer(spec, AFFINE, budget=60, workers=in_flight, seed=seed)
        if options:
            optimizer.plan_budget(evaluations=None, images=60 * IMAGES, images_per_evaluation=IMAGES)
        spent = 0
        best = np.inf
        waiting = []
        while spent < 60 * IMAGES:
            waiting.append(optimizer.ask())
            spent += request_of(waiting[-1]).images or IMAGES
            if len(waiting) == in_flight:
                candidate = waiting.pop(0)
                evaluation = objective.answer(candidate)
                if request_of(candidate).compares(IMAGES):
                    best = min(best, evaluation.loss)
                tell(optimizer, candidate, evaluation)
        return best

    plain = [reached({}, seed) for seed in range(4)]
    raced = [reached({"racing": {}}, seed) for seed in range(4)]
    assert np.mean(raced) < np.mean(plain)


@pytest.mark.parametrize("name", ["LCSC", "CMA"])
def test_it_keeps_the_contract_of_optimizers(name: str) -> None:
    check_optimizer(name, {"racing": {"eta": 2, "rungs": 3}})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("LCSC", {"eta": 1}, r"optimizers.LCSC.racing: eta: expected at least 2, got 1"),
        ("LCSC", {"rungs": 1}, r"optimizers.LCSC.racing: rungs: expected at least 2, got 1"),
        ("LCSC", {"rung": 3}, r"optimizers.LCSC.racing: rung: .*did you mean 'rungs'"),
        ("LCSC", 3, r"optimizers.LCSC.racing: expected a mapping of keys to values, got 3"),
        ("CMA", {"eta": 10, "rungs": 5}, r"optimizers.CMA.racing: .*expected at least 1 / 1000"),
        ("CMA", {"rungs": 10**9}, r"optimizers.CMA.racing: .*expected at least 1 / 1000"),
        ("LCSCGradient", {}, r"LCSCGradient.racing: LCSCGradient cannot race; LCSC and Nevergrad's optimizers can"),
        ("EMAGrid", {}, r"EMAGrid.racing: EMAGrid cannot race"),
        ("Powell", {}, r"optimizers.Powell.racing: it needs each exact loss in turn, so none can race"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: Any, said: str) -> None:
    with pytest.raises(StudySpecError, match=said) as caught:
        build_optimizer(OptimizerSpec(name=name, options={"racing": options}), AFFINE, budget=9, workers=1, seed=0)
    assert "\n" not in str(caught.value)
