"""A time as a budget: how it is divided, what an optimizer plans with, and how long a run is said to take."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lcsc_opt.experiment.rehearsal import rehearse
from lcsc_opt.experiment.running import listed
from lcsc_opt.experiment.timing import SEARCH_SECONDS, Pace, evaluations_in, report_seconds, searches_seconds, seconds_for

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, Candidate, Cost, Evaluation
from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.states import is_searched
from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.planning import new_driver

ENDED = {"search_ended": {"evaluations": 3, "exhausted": False, "deadline": 60.0}}


@dataclasses.dataclass
class Sleeping(Objective):
    """Takes 20 µs an image, three times as long with a gradient."""

    steps: tuple[int, ...] = (1, 2, 3, 4)
    samples: Samples = dataclasses.field(default_factory=lambda: Samples(per_evaluation=1000))
    slept: float = 0.0

    def evaluate(self, candidate: Candidate) -> Evaluation:
        images = candidate.images or self.samples.per_evaluation
        seconds = images * 2e-5 * (3 if candidate.gradient else 1)
        time.sleep(seconds)
        self.slept += seconds
        slope = np.ones_like(candidate.coefficients)
        return Evaluation(1.0, cost=Cost(images=images), gradient=slope if candidate.gradient else None)

    def describe(self) -> dict[str, Any]:
        return {}

    def why_no_gradient(self) -> str | None:
        return None


def planned(optimizers: list[str], **changes: Any) -> list[StudySpec]:
    content = {"name": "e", "objective": {"file": "a.py"}, "optimizers": optimizers, "budget": "1 min", **changes}
    return listed(parse_studies(content, source="test"))


def test_what_is_left_of_a_time_is_divided_by_the_searches_to_come() -> None:
    grid, first, second = to_run = planned(["EMAGrid", "LCSC", "CMA"])
    assert seconds_for(first, to_run, {}) == 30
    studies: dict[str, dict[str, Any]] = {grid.name: {SEARCH_SECONDS: 10.0, **ENDED}}
    assert seconds_for(first, to_run, studies) == 25
    studies[first.name] = {SEARCH_SECONDS: 12.0, **ENDED}
    assert seconds_for(second, to_run, studies) == 38, "also what the first has left"
    studies[second.name] = {SEARCH_SECONDS: 60.0}
    assert seconds_for(second, to_run, studies) == 0
    longer = planned(["EMAGrid", "LCSC", "CMA"], budget="2 min")
    assert seconds_for(longer[1], longer, studies) == 19, "both continue"


@pytest.mark.parametrize(("optimizer", "within"), [("LCSCGradient", 0.3), ("CMA", 0.3)])
def test_an_optimizer_plans_with_what_fits_into_the_time(optimizer: str, within: float) -> None:
    objective = Sleeping()
    [spec] = planned([optimizer])
    evaluations = evaluations_in(
        8.0,
        Candidate(np.full(4, 0.25), gradient=configure(spec.optimizer).needs_gradient),
        lambda budget: new_driver(spec, objective, budget, defaults={}),
        objective.evaluate,
    )
    assert objective.slept < 0.1, "one evaluation of each kind"
    stored = 0.02 * evaluations
    whole = 2e-5 * 1000 * evaluations
    if optimizer == "CMA":
        assert whole + stored == pytest.approx(8.0, rel=within)
    else:
        assert evaluations > 150, "most steps have a tenth of the images"
        assert whole + stored < 8.0 * 2


def test_a_run_lasts_as_long_as_its_searches_and_reports() -> None:
    objective = Sleeping()
    pace = Pace(gradient=3.0, selection=1.0, held_out=2.0, also=4.0)
    options: dict[str, Any] = {"budget": {"evaluations": 50}, "held_out": {"images": 5000, "top": 3}}
    [search] = planned(["CMA"], **options)
    assert searches_seconds([search], objective, pace) == pytest.approx(50 * 1.02)
    assert report_seconds([search], objective, pace) == 5 * (3 * 1.0 + 3 * 2.0) + 3 * 4.0
    both = [search, *planned(["LCSC"], **options)]
    assert report_seconds(both, objective, pace) == 5 * (6 * 1.0 + 4 * 2.0) + 4 * 4.0, "baselines are measured once"
    [gradient] = planned(["LCSCGradient"], **options)
    assert 50 * 0.3 < searches_seconds([gradient], objective, pace) < 50 * 0.5, "most steps have 100 images"
    grid, timed = planned(["EMAGrid", "CMA"], budget="5 min")
    assert searches_seconds([timed], objective, pace) == 0
    assert searches_seconds([grid, timed], objective, pace) > 1, "a grid is not cut"


def test_what_only_the_first_evaluation_loads_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Sleeping()
    clock = {"now": 0.0}
    loaded: set[str] = set()

    def evaluate(candidate: Candidate) -> Evaluation:
        clock["now"] += 0.5
        if candidate.noise.group not in loaded:
            clock["now"] += 60.0
        loaded.add(candidate.noise.group)
        return Evaluation(1.0, cost=Cost(images=250))

    monkeypatch.setattr("lcsc_opt.experiment.rehearsal.time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    pace = rehearse("s", objective, evaluate, Candidate(np.full(4, 0.25)), report=True, chooses_layout=False)
    assert pace == Pace(search=2.0, selection=2.0, held_out=2.0)


def test_what_is_timed_has_the_layout_that_trials_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Sleeping()
    objective.layouts = (CONTIGUOUS, CHANNELS_LAST)
    clock = {"now": 0.0}
    seconds = {CONTIGUOUS: 2.0, CHANNELS_LAST: 1.0}

    def evaluate(candidate: Candidate) -> Evaluation:
        clock["now"] += seconds[candidate.layout]
        return Evaluation(1.0, cost=Cost(images=500, seconds=seconds[candidate.layout]))

    for module in ("study.rehearsal", "evaluation.layouts"):
        monkeypatch.setattr(f"lcsc_opt.{module}.time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    monkeypatch.setattr("lcsc_opt.experiment.rehearsal.SECONDS_TO_SHORTEN", 0.3)
    pace = rehearse("s", objective, evaluate, Candidate(np.full(4, 0.25)), report=True, chooses_layout=True)
    assert pace == Pace(search=2.0, selection=2.0, held_out=2.0, layout=CHANNELS_LAST)


def test_a_study_of_an_expired_time_is_searched_until_there_is_more() -> None:
    [spec] = planned(["LCSC"])
    assert is_searched(spec, ENDED)
    assert not is_searched(planned(["LCSC"], budget="61 s")[0], ENDED)
    assert not is_searched(spec, {"search_ended": {"evaluations": 3, "exhausted": False}})
    assert is_searched(planned(["LCSC"], budget={"evaluations": 3})[0], ENDED)
