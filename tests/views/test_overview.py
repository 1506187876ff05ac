from __future__ import annotations

import json

import pytest

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.summary import describe_coefficients
from lcsc_opt.views.overview import failure_reasons, overview, seconds_per_trial
from tests.history_examples import history
from tests.study_examples import coefficients, write_study


def test_everything_about_a_study_is_json(url: str) -> None:
    study = write_study(
        open_storage(url, write=True), "digits/LCSC/0", [4.0, None, 2.0], held_out={"trial": 0, "loss": 5.0}
    )
    found = overview(study)
    assert json.loads(json.dumps(found)) == found
    assert (found["study"], found["state"], found["evaluations"], found["failed"]) == (
        "digits/LCSC/0",
        "finished",
        3,
        1,
    )
    assert (found["best_trial"], found["searched"], found["held_out"], found["checkpoints"]) == (2, 2.0, 5.0, 3)
    assert found["chosen_trial"] == 0
    assert found["coefficients"] == coefficients(0).tolist()
    assert found["best_coefficients"] == describe_coefficients(coefficients(0), (100, 200, 300))
    assert found["failure_reasons"] == {"broken": 1}
    assert found["held_out_report"] == {"trial": 0, "loss": 5.0}


def test_a_trial_counts_with_the_reason_of_its_last_attempt() -> None:
    reasons = {0: ("memory", "not finite"), 1: ("memory",), 2: ("not finite",), 3: ("memory",)}
    assert failure_reasons(history([None, None, None, 1.0], reasons=reasons)) == {"not finite": 2, "memory": 1}


def test_seconds_per_trial_are_means_of_parts_and_a_median_of_the_rest() -> None:
    study = history([4.0, 3.0, 2.0, 1.0], gap=0.5, columns={"sample_seconds": [0.2, 0.4, 0.2, 0.4]})
    study.trials["started"][3] += 3600
    found = seconds_per_trial(study)
    assert found == {"sample": pytest.approx(0.3), "other": pytest.approx(0.5)}
    assert seconds_per_trial(history([None])) == {}
