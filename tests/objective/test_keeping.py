"""An objective that keeps precision: what its losses and gradients are bounded by, alone and in parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Candidate, Noise, Yardstick
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.metrics import Reference
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers import LCSCGradient
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of, coefficient_array
from tests.metrics.examples import suite
from tests.objective.test_merge_sample_score import STEPS, Pixels, build

IMAGES = 60

pytestmark = pytest.mark.usefixtures("plain_targets")


def objective(folder: Path, keep: Any) -> MergeSampleScore:
    real = np.random.default_rng(0).uniform(-0.4, 0.4, (80, 16)).astype(np.float32)
    scores = suite({"inception": Reference.of_features(Pixels(), real)}, keep=keep)
    return build(folder, scores, images=IMAGES, batch_size=25)


def far(seed: int) -> Candidate:
    moved = 0.2 * np.random.default_rng(seed).standard_normal(len(STEPS))
    return Candidate(ema_coefficients(STEPS, 0.9) + moved - moved.mean())


def yardstick(kept: MergeSampleScore) -> Yardstick:
    """What bounds a search of this objective: one of the averages."""
    return kept.yardstick(kept.evaluate(Candidate(ema_coefficients(STEPS, 0.9))))


def bounded(candidate: Candidate, by: Yardstick) -> Candidate:
    return dataclasses.replace(candidate, yardstick=by)


def test_without_a_yardstick_there_is_no_penalty_and_the_bound_is_measured(tmp_path: Path) -> None:
    plain, kept = objective(tmp_path, None), objective(tmp_path, "precision")
    assert plain.fixed_average is None
    assert kept.fixed_average is not None
    evaluation = kept.evaluate(far(0))
    assert evaluation.loss == pytest.approx(plain.evaluate(far(0)).loss, rel=1e-9)
    assert evaluation.violation is None
    assert kept.yardstick(evaluation).bound == evaluation.metrics["precision"]
    assert kept(far(0).coefficients) >= evaluation.loss, "who calls it alone has the yardstick of the search"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("keep", "value"), [("hinge", None), ("precision", None), ("precision", 0.9)])
def test_losses_have_a_penalty_where_the_bound_is_passed(tmp_path: Path, keep: str, value: Any, seed: int) -> None:
    plain, kept = objective(tmp_path, None), objective(tmp_path, {keep: value} if value else keep)
    measured = yardstick(kept)
    evaluation = kept.evaluate(bounded(far(seed), measured))
    assert (measured.bound == value) == (value is not None)
    constraint = kept.scores.loss.relative_to(measured).constraint
    assert constraint is not None
    penalty = measured.penalty(evaluation.metrics[keep])
    assert evaluation.loss == pytest.approx(plain.evaluate(far(seed)).loss + penalty, rel=1e-9)
    violation = constraint.violation(evaluation.metrics[keep], IMAGES)
    assert evaluation.violation == violation
    assert (penalty > 0) == (violation > 0)


def test_losses_and_gradients_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    whole, main, worker = (objective(tmp_path, "precision") for _ in range(3))
    candidate = Candidate(
        far(1).coefficients,
        noise=Noise("gradient", 3),
        gradient=True,
        keep_weight=0.4,
        yardstick=yardstick(whole),
    )
    expected = whole.evaluate(candidate)
    ranges = [(0, 25), (25, IMAGES)]
    parts = [worker.sample(candidate, worker.prepare(candidate), *range_) for range_ in ranges]
    found, back = main.score(candidate, parts)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.violation == pytest.approx(expected.violation, rel=1e-4)
    products = [worker.vjp(candidate, *range_, rows)[0] for range_, rows in zip(ranges, back, strict=True) if rows]
    assert np.sum(products, axis=0) == pytest.approx(expected.gradient, rel=1e-4)


def test_the_weight_rises_while_the_metric_is_above_and_falls_while_it_is_below(tmp_path: Path) -> None:
    kept = objective(tmp_path, "precision")
    measured = yardstick(kept)
    origin = ema_coefficients(STEPS, 0.9)
    optimizer = LCSCGradient(images=IMAGES, step_size=0.3)(coefficient_array(AffineSpace(STEPS, origin), seed=0))
    weights, signs = [], []
    for _ in range(12):
        asked = optimizer.ask()
        candidate = bounded(candidate_of(asked), measured)
        evaluation = kept.evaluate(candidate)
        if candidate.gradient:
            assert candidate.keep_weight is not None
            weights.append(candidate.keep_weight)
            signs.append(np.sign(evaluation.violation or 0))
        attach_evaluation(asked, evaluation)
        optimizer.tell(asked, evaluation.loss)
    assert len(weights) > 5
    assert (np.sign(np.diff(weights)) == signs[:-1]).all()
