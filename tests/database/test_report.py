"""What is stored of held-out reports and of measurements."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.database.report import (
    Baseline,
    HeldOutReport,
    MeasuredModel,
    Measurement,
    MeasurementKey,
    MetricRow,
)


def test_what_is_stored_is_read_again() -> None:
    groups = [
        Measurement(0, 2.5, {"near": 3.05}, {"near": (3.0, 3.1)}),
        Measurement(1, 2.625, {"near": 3.1, "kid": 1.0}),
    ]
    answer = MeasuredModel.mean_of(groups, images=50)
    assert (answer.loss, answer.metrics) == (2.5625, {"near": pytest.approx(3.075)}), "a group has no kid"
    ema = Baseline("EMA*", answer, study="digits/EMAGrid/0", trial=3, label="EMA* (0.9)")
    baselines = (ema, Baseline("last checkpoint", answer))
    made = HeldOutReport(
        trial=1,
        answer=answer,
        selection={4: 2.4, 1: 2.3},
        baselines=baselines,
        rows=(MetricRow("loss", 1, 2.5625, against="EMA*", baseline=2.5625, gain=0.0, gain_interval=(-0.5, 0.5)),),
        warning="it lost",
    )
    assert HeldOutReport.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert HeldOutReport.from_json(None) is None
    least = HeldOutReport.from_json({"loss": 1.0})
    assert least == HeldOutReport(None, MeasuredModel(1.0))
    assert least is not None
    assert (least.sample, least.doubted) == ((None, (0,)), ())


def test_a_report_without_intervals_is_read() -> None:
    groups = [{"seed": 3, "loss": 2.5, "metrics": {"kid": 0.1}}]
    measured = {"loss": 2.5, "metrics": {"kid": 0.1}, "images": 20, "groups": groups}
    origin = {"study": "digits/EMAGrid/0", "trial": 2, "label": "EMA*"}
    row = {"metric": "loss", "sign": 1, "value": 2.5, "against": "EMA*", "baseline": 2.5, "gain": 0.0}
    stored = {
        "trial": 1,
        **measured,
        "chosen_from": [1, 0],
        "selection": [2.25, 2.75],
        "baselines": {"EMA*": {**origin, **measured}},
        "rows": [row],
        "warning": "it lost",
    }
    found = HeldOutReport.from_json(stored)
    assert found is not None
    assert (found.trial, found.loss, found.sample, found.metrics) == (1, 2.5, (20, (3,)), {"kid": 0.1})
    assert (found.rows[0].interval, found.answer.groups[0].without_groups) == (None, {})
    assert (found.selection, found.ema(None), found.warning) == ({1: 2.25, 0: 2.75}, 2.5, "it lost")
    [ema] = found.baselines
    assert (ema.study, ema.trial, ema.label, ema.measured) == ("digits/EMAGrid/0", 2, "EMA*", found.answer)
    again = found.to_json()
    again["rows"] = [row]  # which are stored with all their fields
    assert again == stored
    assert list(again) == list(stored)


def test_measurements_are_found_by_model_images_and_noise() -> None:
    coefficients = np.array([0.25, 0.75])
    measured = None
    for images, loss in ((20, 2.5), (30, 1.5)):
        key = MeasurementKey.of(coefficients, images, HELD_OUT)
        assert key.find(measured, seed=0) is None
        measured = json.loads(json.dumps(key.added(measured, Measurement(0, loss, {"kid": 0.1}))))
    assert MeasurementKey.of(coefficients, 20, HELD_OUT).find(measured, seed=0) == Measurement(0, 2.5, {"kid": 0.1})
    assert MeasurementKey.of(-coefficients, 20, HELD_OUT).find(measured, seed=0) is None
