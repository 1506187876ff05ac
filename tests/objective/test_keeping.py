"""An objective that keeps precision: what its losses and gradients are bounded by, alone and in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import Candidate, Noise
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers import LCSCGradient
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of, coefficient_array, request_of
from tests.objective.test_merge_sample_score import STEPS, Pixels, build

IMAGES, FEWEST_KEPT = 60, 500


@pytest.fixture(autouse=True)
def fewer_images_tell_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.objective.ema_constraint.FEWEST_KEPT", FEWEST_KEPT)


def objective(folder: Path, keep: Any) -> MergeSampleScore:
    real = np.random.default_rng(0).uniform(-0.4, 0.4, (80, 16)).astype(np.float32)
    scores = MetricSuite({"inception": Reference.of_features(Pixels(), real)}, keep=keep)
    return build(folder, scores, images=IMAGES, batch_size=25)


def far(seed: int) -> Candidate:
    moved = 0.2 * np.random.default_rng(seed).standard_normal(len(STEPS))
    return Candidate(ema_coefficients(STEPS, 0.9) + moved - moved.mean())


def test_the_bound_is_the_best_ema_of_the_window(tmp_path: Path) -> None:
    plain, kept = objective(tmp_path, None), objective(tmp_path, "precision")
    emas = [plain.evaluate(Candidate(ema_coefficients(STEPS, rate))) for rate in window_ema_rates(STEPS)]
    kept.evaluate(far(0))
    baseline = kept.scores.constraint
    assert baseline is not None
    assert baseline.loss == pytest.approx(min(ema.loss for ema in emas), rel=1e-12)
    rate = window_ema_rates(STEPS)[int(np.argmin([ema.loss for ema in emas]))]
    counted = kept.evaluate(Candidate(ema_coefficients(STEPS, rate), images=FEWEST_KEPT))
    assert 0 < baseline.value == counted.metrics["precision"] < 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("keep", "bound"), [("hinge", None), ("precision", None), ("precision", 0.9)])
def test_losses_have_a_penalty_where_the_bound_is_passed(tmp_path: Path, keep: str, bound: Any, seed: int) -> None:
    plain, kept = objective(tmp_path, None), objective(tmp_path, {keep: bound} if bound else keep)
    evaluation = kept.evaluate(far(seed))
    baseline = kept.scores.constraint
    assert baseline is not None
    assert (baseline.value == bound) == (bound is not None)
    penalty = baseline.penalty(evaluation.metrics[keep])
    assert evaluation.loss == pytest.approx(plain.evaluate(far(seed)).loss + penalty, rel=1e-9)
    violation = baseline.violation(evaluation.metrics[keep], IMAGES)
    assert evaluation.violation == violation
    assert (penalty > 0) == (violation > 0)


def test_losses_and_gradients_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    whole, main, worker = (objective(tmp_path, "precision") for _ in range(3))
    candidate = Candidate(far(1).coefficients, noise=Noise("gradient", 3), keep_weight=0.4)
    expected = whole.evaluate(candidate, gradient=True)
    ranges = [(0, 25), (25, IMAGES)]
    parts = [worker.sample(candidate, worker.prepare(candidate), *range_, gradient=True) for range_ in ranges]
    found, back = main.score(candidate, parts, gradient=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.violation == pytest.approx(expected.violation, rel=1e-4)
    products = [worker.vjp(candidate, *range_, rows)[0] for range_, rows in zip(ranges, back, strict=True) if rows]
    assert np.sum(products, axis=0) == pytest.approx(expected.gradient, rel=1e-4)


def test_the_weight_rises_while_the_metric_is_above_and_falls_while_it_is_below(tmp_path: Path) -> None:
    kept = objective(tmp_path, "precision")
    origin = ema_coefficients(STEPS, 0.9)
    optimizer = LCSCGradient(images=IMAGES, step_size=0.3)(coefficient_array(AffineSpace(STEPS, origin), seed=0))
    weights, signs = [], []
    for _ in range(12):
        asked = optimizer.ask()
        request = request_of(asked)
        evaluation = kept.evaluate(candidate_of(asked), gradient=request.gradient)
        if request.gradient:
            assert request.keep_weight is not None
            weights.append(request.keep_weight)
            signs.append(np.sign(evaluation.violation or 0))
        attach_evaluation(asked, evaluation)
        optimizer.tell(asked, evaluation.loss)
    assert len(weights) > 5
    assert (np.sign(np.diff(weights)) == signs[:-1]).all()
