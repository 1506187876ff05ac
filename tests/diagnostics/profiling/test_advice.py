from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.diagnostics.profiling.advice import EXACT, Circumstances, advice
from lcsc_opt.diagnostics.profiling.parts import Part
from tests.diagnostics.profiling.profile_examples import profile

ALL = {"images": 1000, "batch_size": 500, "dtype": "fp32", "channels_last": False, "compile": False}
TUNED = {"images": 1000, "batch_size": "auto", "dtype": "bf16", "channels_last": True, "compile": True}


def said(*parts: tuple[Any, ...], device: str = "cpu", **circumstances: Any) -> str:
    """Advice on parts that are given as name, share, and the share of the limit that is reached."""
    made = [Part(name, share, share, *((reached[0], 1.0) if reached else ())) for name, share, *reached in parts]
    return advice(profile(tuple(made), device=device), Circumstances(**circumstances))


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cpu", ALL, "try batch_size: auto, channels_last: true, compile: true;"),
        ("cuda: H", ALL, "try batch_size: auto, dtype: bf16, channels_last: true, compile: reduce-overhead;"),
        ("cuda: H", {**TUNED, "dtype": "fp32"}, "try dtype: bf16;"),
        ("cpu", {"images": 1000, "batch_size": 500}, "try another batch_size;"),
    ],
)
def test_slow_sampling_is_told_the_settings_that_were_not_tried(
    device: str, settings: dict[str, Any], expected: str
) -> None:
    text = said(("sample", 0.8, 0.12), ("merge", 0.1), device=device, settings=settings)
    assert text.startswith(f"sampling takes 80% of the time and reaches 12% of what this machine can do: {expected}")
    assert text.endswith("lcsc profile --settings measures what each brings")


def test_slow_sampling_is_told_of_workers_too_where_there_is_room() -> None:
    assert said(("sample", 0.8, 0.1), settings=ALL, places=2).endswith("; workers: 2 may help as well")
    assert "workers" not in said(("sample", 0.8, 0.1), settings=ALL, places=2, workers=2)


def test_sampling_near_its_limit_is_told_of_another_dtype_only() -> None:
    assert ": try dtype: bf16;" in said(("sample", 0.8, 0.7), device="cuda: H", settings=ALL)


def test_sampling_that_is_tuned_is_told_of_workers_where_there_is_room() -> None:
    assert said(("sample", 0.9, 0.5), settings=TUNED, places=8).endswith(
        ": set workers: 8, as many as this machine has room for"
    )
    text = said(("sample", 0.9, 0.5), settings=TUNED, places=2, workers=2)
    assert text.startswith("sampling takes 90%")
    assert "nothing here would make it much faster" in text


@pytest.mark.parametrize(
    ("reached", "stored", "expected"),
    [
        (0.9, EXACT, "pack the checkpoints with --dtype float16"),
        (0.9, "float16", "combine fewer checkpoints (select: interval), or pack them with --dtype int8"),
        (0.3, EXACT, "memory is faster, so the processor or other programs limit it"),
    ],
)
def test_merging_is_told_what_limits_it(reached: float, stored: str, expected: str) -> None:
    assert expected in said(("sample", 0.4, 0.9), ("merge", 0.45, reached), settings=TUNED, stored=stored)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("features", "features take 70% of the time: evaluate fewer images (now 1,000)"),
        ("metric", "the metric takes 70% of the time: leave out metrics"),
        ("database", "the database takes 70% of the time: an evaluation is hardly longer than a transaction"),
        ("optimizer", "the optimizer takes 70% of the time: search fewer directions"),
        ("evaluate", "the function takes 70% of the time: set workers: 4"),
        ("other", "other takes 70% of the time, and nothing here would make it much faster"),
    ],
)
def test_every_part_has_its_line(part: str, expected: str) -> None:
    assert said((part, 0.7), settings=TUNED, places=4).startswith(expected)


def test_where_the_largest_part_is_at_its_limit_the_next_one_is_looked_at() -> None:
    parts = (("sample", 0.6, 0.9), ("database", 0.3), ("merge", 0.1, 0.1))
    assert said(*parts, settings=TUNED).startswith("the database takes 30%")
    assert said(("sample", 0.9, 0.9), ("database", 0.1), settings=TUNED).startswith("sampling takes 90%")
