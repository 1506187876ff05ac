"""A study with a row of coefficients for each layer: searched, stored, continued, started at, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

import lcsc_opt
from lcsc_opt.database.arrays import coefficients_of
from tests.commands import Typed
from tests.model_studies import write_model_study

LAYERS = ("conv", "norm", "steps")  # "steps" is a counter, which no merge combines


@pytest.fixture
def study_file(workplace: Path) -> Path:
    return write_model_study(workplace, space={"rows": "layers"}, optimizers=["LCSC", "CMA"], held_out={"images": 20})


def asked(name: str) -> list[bytes]:
    study = optuna.load_study(study_name=name, storage="sqlite:///studies.db")
    return [coefficients_of(trial).tobytes() for trial in study.get_trials(deepcopy=False)]


def test_it_is_searched_and_continued_as_if_it_had_not_stopped(study_file: Path, typed: Typed) -> None:
    said = typed("run", str(study_file), "budget={evaluations: 8}").err
    assert "without a gradient, more rows do not help" in said
    before = {}
    for name in ("small/LCSC/0", "small/CMA/0"):
        study = lcsc_opt.load_study(name)
        assert study.layer_groups == dict.fromkeys(LAYERS, 1)
        assert study.coefficients.shape == (3, 5)
        np.testing.assert_allclose(study.coefficients.sum(axis=1), 1, rtol=0, atol=1e-12)
        assert study.held_out is not None
        before[name] = asked(name)
    typed("run", str(study_file), "budget={evaluations: 12}")
    for name, candidates in before.items():
        assert len(asked(name)) == 12
        assert asked(name)[:8] == candidates
    typed("run", str(study_file), "--optimizer", "LCSC", "name=whole", "budget={evaluations: 12}")
    assert asked("small/LCSC/0") == asked("whole/LCSC/0"), "CMA plans with its first budget"
