from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.base.records import Cost
from lcsc_opt.diagnostics.profiling.parts import Part, Work, divide
from lcsc_opt.diagnostics.profiling.trials import TrialTimes
from tests.diagnostics.profiling.profile_examples import profile


def times(seconds: float = 1.0, spans: dict[str, float] | None = None, **cost: float) -> TrialTimes:
    parts: Any = {f"{name}_seconds": spent for name, spent in cost.items()}
    return TrialTimes(5, 0, seconds, Cost(images=100, **parts).as_dict(), spans or {})


def by_name(parts: tuple[Part, ...]) -> dict[str, Part]:
    return {part.name: part for part in parts}


def test_parts_and_the_rest_make_the_whole_trial() -> None:
    spans = {"ask": 0.01, "tell": 0.02, "database": 0.1, "sample": 9.0}
    parts = by_name(divide(times(2.0, spans, merge=0.2, sample=1.0, features=0.4, metric=0.1), Work()))
    assert list(parts) == ["merge", "sample", "features", "metric", "optimizer", "database", "other"]
    assert parts["optimizer"].seconds == pytest.approx(0.03)
    assert parts["other"].seconds == pytest.approx(0.17)
    assert sum(part.seconds for part in parts.values()) == pytest.approx(2.0)
    assert parts["sample"].share == pytest.approx(0.5)


def test_an_objective_without_these_parts_is_evaluated() -> None:
    parts = by_name(divide(times(1.0, {"evaluate": 0.7, "database": 0.1}), Work()))
    assert list(parts) == ["evaluate", "optimizer", "database", "other"]
    assert parts["evaluate"].seconds == 0.7
    assert parts["other"].share == pytest.approx(0.2)


def test_parts_that_overlap_leave_nothing_over() -> None:
    parts = divide(times(1.0, {}, merge=0.5, sample=0.9), Work())
    assert by_name(parts)["other"].seconds == 0
    assert profile(parts).overlapped == pytest.approx(0.4)
    assert profile(divide(times(1.0, {}, sample=0.9), Work())).overlapped == 0


def test_work_becomes_rates_beside_their_limits() -> None:
    work = Work(merge_bytes=4e9, sample_operations=6e9, features_operations=2e9, read_rate=16e9, sample_rate=20e9)
    parts = by_name(divide(times(1.0, {}, merge=0.5, sample=0.6, features=0.1), work))
    assert parts["merge"].rate == pytest.approx(8e9)
    assert parts["merge"].reached == pytest.approx(0.5)
    assert parts["merge"].unit == "GB/s"
    assert parts["sample"].reached == pytest.approx(0.5)
    assert parts["features"].rate == pytest.approx(2e10)
    assert parts["features"].reached is None  # no limit was measured
    assert parts["metric"].rate is None
    assert parts["metric"].unit is None


def test_a_profile_says_images_per_second_and_how_long_the_budget_takes() -> None:
    assert profile().images_per_second == 200
    assert profile().budget_seconds == 150
    assert profile(images=0.0).images_per_second is None
    row = profile((Part("sample", 0.4, 0.8, 1e9, 4e9),)).as_row()
    assert row["parts"] == [
        {"name": "sample", "seconds": 0.4, "share": 0.8, "rate": 1e9, "limit": 4e9, "unit": "GFLOP/s", "reached": 0.25}
    ]
    assert (row["budget_seconds"], row["images_per_second"]) == (150, 200)
