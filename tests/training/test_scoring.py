"""Metrics of the objectives that are trained here are looked at before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.loading import check_objective

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keep": "recal"}, "keep: 'recal' cannot be kept"),
    ({"loss": "fidd"}, "did you mean 'fid'"),
    ({"metrics": ["kid@clip"]}, "kid@clip: digits and crops are seen by one network here"),
    ({"keep": "precision@dinov2"}, "hinge@dinov2: digits"),
]


@pytest.mark.parametrize("file", ["digits.py", "digits_ddpm.py", "photographs.py"])
@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_metric_that_cannot_be_had_is_refused(file: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        check_objective(ObjectiveSpec(file=file, settings=settings))


def test_metrics_that_can_be_had_pass() -> None:
    check_objective(ObjectiveSpec(file="digits.py", settings={"keep": "precision", "loss": {"fid": 1, "near": 6}}))
