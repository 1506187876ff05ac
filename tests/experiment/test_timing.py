"""A time as a budget: what an optimizer plans with, and how long a run is said to take."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.states import is_searched
from lcsc_opt.experiment.rehearsal import rehearse
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.experiment.timing import Pace, evaluations_in, report_seconds, searches_seconds
from lcsc_opt.objective.contract import Objective, Samples

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


def planned(optimizers: list[str], **changes: Any) -> list[StudySpec]:
    content = {"name": "e", "objective": {"file": "a.py"}, "optimizers": optimizers, "budget": "1 min", **changes}
    return searches_of([parse_study_file(content, source="test")])


def test_an_optimizer_plans_with_what_fits_into_the_time() -> None:
    pace = Pace(gradient=3.0, search=0.98)
    [spec] = planned(["CMA"])
    assert evaluations_in(spec, Images(), pace) == 60
    assert evaluations_in(spec, Images(), Pace(gradient=600.0)) == 2
    [several] = planned(["CMA"], workers=2)
    assert evaluations_in(several, Images(), pace) == 120


def test_a_run_lasts_as_long_as_its_searches_and_its_one_report() -> None:
    objective = Images()
    pace = Pace(gradient=3.0, selection=1.0, held_out=2.0, also=4.0)
    options: dict[str, Any] = {"budget": {"evaluations": 50}, "held_out": {"images": 5000, "top": 3}}
    [search] = planned(["CMA"], **options)
    assert searches_seconds([search], objective, pace) == pytest.approx(50 * 1.02)
    # three finalists, the last checkpoint, and three points on the way; the best, the last checkpoint and the answer
    assert report_seconds([search], objective, pace) == 5 * (7 * 1.0 + 3 * 2.0) + 3 * 4.0
    both = [search, *planned(["LCSC"], **options)]
    assert report_seconds(both, objective, pace) == 5 * (8 * 1.0 + 4 * 2.0) + 4 * 4.0, "two finalists of each"
    [gradient] = planned(["LCSCGradient"], **options)
    assert 50 * 0.3 < searches_seconds([gradient], objective, pace) < 50 * 0.5, "most steps have 100 images"
    grid, timed = planned(["EMAGrid", "CMA"], budget="5 min")
    assert searches_seconds([timed], objective, pace) == 300
    assert searches_seconds([grid, timed], objective, pace) > 301, "a grid is not cut"


def test_what_only_the_first_evaluation_loads_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Images()
    clock = {"now": 0.0}
    loaded: set[str] = set()

    def evaluate(candidate: Candidate) -> Evaluation:
        clock["now"] += 0.5
        if candidate.noise.group not in loaded:
            clock["now"] += 60.0
        loaded.add(candidate.noise.group)
        return Evaluation(1.0, cost=Cost(images=250))

    monkeypatch.setattr("lcsc_opt.experiment.rehearsal.time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    pace = rehearse("s", objective, evaluate, Candidate(np.full(4, 0.25)), report=True)
    assert pace == Pace(search=2.0, selection=2.0, held_out=2.0)


def test_a_study_of_an_expired_time_is_searched_until_there_is_more() -> None:
    [spec] = planned(["LCSC"])
    assert is_searched(spec, ENDED)
    assert not is_searched(planned(["LCSC"], budget="61 s")[0], ENDED)
    assert not is_searched(spec, {"search_ended": {"evaluations": 3, "exhausted": False}})
    assert is_searched(planned(["LCSC"], budget={"evaluations": 3})[0], ENDED)
