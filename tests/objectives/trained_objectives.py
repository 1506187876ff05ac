"""What tests of the objectives that train their own model share: the shortest training, and the questions to each."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Noise
from lcsc_opt.base.study_file import read_study_file
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import View, extract, frechet_distance
from lcsc_opt.objective.merge_sample_score import MergeSampleScore

ROOT = Path(__file__).parents[2]
TINY = {"images": 70, "batch_size": 32, "training_steps": 6, "checkpoint_every": 2}


def load(name: str) -> ModuleType:
    """The shipped objective's file."""
    return load_file(ROOT / "objectives" / f"{name}.py")


def build(name: str, **changes: Any) -> MergeSampleScore:
    """The shipped objective after the shortest training."""
    objective = load(name).build({**TINY, **changes})
    assert isinstance(objective, MergeSampleScore)
    return objective


def check(objective: MergeSampleScore) -> None:
    """It evaluates twice to the same, and on other noise or with other coefficients to something else."""
    coefficients = ema_coefficients(objective.steps, 0.7)
    first = objective.evaluate(Candidate(coefficients))
    assert first.metrics == {"fid": first.loss}
    assert (first.cost.images, first.cost.model_calls) == (70, 70 * objective.sampler.nfe)
    other = objective.evaluate(Candidate(coefficients[::-1].copy())).loss
    held_out = objective.evaluate(Candidate(coefficients, noise=HELD_OUT)).loss
    assert objective.evaluate(Candidate(coefficients)).loss == first.loss
    assert len({first.loss, other, held_out}) == 3
    assert objective.describe() == json.loads(json.dumps(objective.describe()))


def check_the_loss(objective: MergeSampleScore, real: Any) -> None:
    """It is FID between what is sampled and the real images, in the extractor's features."""
    coefficients = ema_coefficients(objective.steps, 0.7)
    candidate = Candidate(coefficients)
    sampled = objective.features(objective.images(coefficients, candidate.noise, 70))
    features = objective.features(real)
    expected = frechet_distance(
        sampled.mean(0), np.cov(sampled, rowvar=False), features.mean(0), np.cov(features, rowvar=False)
    )
    assert objective.evaluate(candidate).loss == pytest.approx(expected, rel=1e-4)


def check_the_cross_check(objective: MergeSampleScore, view: View) -> None:
    """A network that no search looks at scores what is reported, and decides nothing."""
    coefficients = ema_coefficients(objective.steps, 0.7)
    described = objective.describe()
    assert "cross_check" not in json.dumps(described)
    assert objective.cross_check_metric == "fid@cross_check"
    reported = objective.evaluate(Candidate(coefficients, noise=HELD_OUT))
    assert list(reported.metrics) == ["fid", "fid@cross_check", "precision", "recall", "sliced", "near", "fdr"]
    assert [*objective.judges] == list(reported.metrics)[1:]
    assert reported.loss == reported.metrics["fid"]
    for noise in (SEARCH, Noise("gradient", 3)):
        assert list(objective.evaluate(Candidate(coefficients, noise=noise)).metrics) == ["fid"]
    assert objective.describe() == described
    assert view.extractor.name != objective.scores.extractor.name
    assert view.extractor.dimension == 48
    assert view.reference is not None
    features = extract(view.extractor, objective.images(coefficients, HELD_OUT, 70), batch_size=70)
    real = view.reference.statistics
    expected = frechet_distance(features.mean(0), np.cov(features, rowvar=False), real.mean, real.cov)
    assert reported.metrics["fid@cross_check"] == pytest.approx(expected, rel=1e-4)


def check_the_study(name: str) -> None:
    """The shipped study names the objective and settings that it takes."""
    spec = read_study_file(ROOT / "studies" / f"{name}.yaml")
    assert spec.name == name
    assert Path(spec.objective.file).stem == name
    load(name).Settings(**spec.objective.settings)
    assert {"EMAGrid", "LCSC", "CMA"} <= {optimizer.name for optimizer in spec.optimizers}
