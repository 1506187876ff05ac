from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.diagnostics.profiling.settings import Tried, combined, described, recommended, variants

ALL = {"images": 1000, "batch_size": 400, "dtype": "fp32", "channels_last": False, "compile": False}


def tried(ratio: float | None, change: float | None = 0.0, **settings: Any) -> Tried:
    return Tried(settings, 1.0, ratio, 1.0, change)


def test_on_a_gpu_half_types_and_graphs_are_tried() -> None:
    assert variants(ALL, images=1000, on_gpu=True) == [
        {"batch_size": 200},
        {"batch_size": 800},
        {"batch_size": 1600},
        {"channels_last": True},
        {"dtype": "bf16"},
        {"dtype": "fp16"},
        {"compile": True},
        {"compile": "reduce-overhead"},
        {"compile": "max-autotune"},
    ]


def test_what_is_set_already_or_makes_no_sense_is_not_tried() -> None:
    known = {"images": 1000, "batch_size": 1, "dtype": "bf16", "channels_last": True, "compile": True}
    assert variants(known, images=1000, on_gpu=False) == [{"batch_size": 2}, {"batch_size": 4}]
    assert variants({"batch_size": 1000}, images=1000, on_gpu=True) == [{"batch_size": 500}]
    assert variants({"batch_size": "auto"}, images=1000, on_gpu=True) == []
    assert variants({}, images=1000, on_gpu=True) == []


@pytest.mark.parametrize(
    ("ratio", "change", "helps"),
    [
        (1.5, 0.001, True),
        (1.5, -0.009, True),
        (1.5, 0.02, False),
        (1.5, -0.02, False),
        (1.04, 0.0, False),
        (None, None, False),
    ],
)
def test_a_setting_helps_when_it_is_faster_and_hardly_changes_the_loss(
    ratio: float | None, change: float | None, helps: bool
) -> None:
    assert tried(ratio, change, dtype="bf16").helps is helps


def test_the_best_of_each_setting_is_combined() -> None:
    found = [
        tried(1.2, batch_size=800),
        tried(1.3, batch_size=1600),
        tried(3.0, 0.5, dtype="fp16"),
        tried(1.5, dtype="bf16"),
        tried(1.0, channels_last=True),
        Tried({"compile": True}, problem="no compiler"),
    ]
    assert combined(found) == {"batch_size": 1600, "dtype": "bf16"}


def test_the_fastest_is_recommended_together_or_alone() -> None:
    base, alone = Tried({}, 1.0, 1.0, 1.0, 0.0), tried(1.5, dtype="bf16")
    assert recommended([base, alone, tried(1.9, dtype="bf16", batch_size=8)]) == tried(1.9, dtype="bf16", batch_size=8)
    assert recommended([base, alone, tried(1.2, dtype="bf16", batch_size=8)]) is alone
    assert recommended([base, tried(0.9, dtype="bf16")]) is None


def test_settings_are_written_as_in_a_study_file() -> None:
    assert described({"dtype": "bf16", "channels_last": True}) == "dtype: bf16, channels_last: true"
    assert described({}) == "as in the study file"
