"""An objective whose real images are few, and so shrinks the target of its loss."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate
from lcsc_opt.coefficients.profiles import power_ema_coefficients
from lcsc_opt.evaluation.base import Outcome
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.shrinking import ENOUGH, shrinkage_of
from lcsc_opt.objective.merge_sample_score import AVERAGE, MergeSampleScore
from tests.metrics.examples import Pixels, suite
from tests.objective.test_merge_sample_score import EMA, STEPS, build

ASKED = Candidate(EMA, gradient=True)


def few(count: int = 20) -> MetricSuite:
    features = np.random.default_rng(0).uniform(-1, 1, (count, 16))
    return suite({"inception": Reference.of_features(Pixels(), features)})


@pytest.fixture
def objective(tmp_path: Path) -> MergeSampleScore:
    return build(tmp_path, few(), batch_size=500)


def test_the_loss_is_relative_to_many_samples_of_an_average_of_the_checkpoints(objective: MergeSampleScore) -> None:
    evaluation = objective.evaluate(ASKED)
    assert list(evaluation.metrics) == ["fid_shrunk", "fid"]
    assert evaluation.loss == evaluation.metrics["fid_shrunk"] < evaluation.metrics["fid"]
    samples = objective.images(power_ema_coefficients(STEPS, 0.1), AVERAGE, ENOUGH)
    reference = objective.scores.references["inception"]
    target = reference.shrunk(shrinkage_of("fid", reference, samples.flatten(1).numpy()))
    features = objective.images(EMA, ASKED.noise, 40).flatten(1).numpy()
    assert evaluation.loss == pytest.approx(target.frechet.distance_from_features(features), rel=1e-5)
    assert "fid_shrunk" in objective.evaluate(Candidate(EMA, noise=SELECTION)).metrics
    held_out = objective.evaluate(Candidate(EMA, noise=HELD_OUT))
    assert held_out.loss == held_out.metrics["fid"]
    assert objective.reported_metrics().few_real_images == 20


def test_the_gradient_is_that_of_the_loss_also_of_the_first_evaluation(objective: MergeSampleScore) -> None:
    gradient = objective.evaluate(ASKED).gradient
    assert gradient is not None
    np.testing.assert_array_equal(objective.evaluate(ASKED).gradient, gradient)
    direction = np.array([1.0, -1.0, 0.5, -0.5])
    ahead, behind = (objective(EMA + step * direction) for step in (1e-3, -1e-3))
    assert gradient @ direction == pytest.approx((ahead - behind) / 2e-3, rel=1e-3)


class OneWorker:
    """A pool of one worker, in this process."""

    def __init__(self, objective: MergeSampleScore) -> None:
        self._pipeline = Pipeline(objective)

    def __len__(self) -> int:
        return 1

    def submit(self, kind: str, *arguments: Any, **_: Any) -> Future[Any]:
        begin: Callable[..., Future[Any]] = getattr(self._pipeline, kind)
        return begin(*arguments)


def test_it_is_the_same_whoever_samples(tmp_path: Path, objective: MergeSampleScore) -> None:
    expected = objective.evaluate(ASKED)
    plain = Candidate(EMA)
    pool: Any = OneWorker(build(tmp_path, batch_size=500))
    evaluators = [
        Pipeline(build(tmp_path, few(), batch_size=500)),
        SpreadEvaluator(build(tmp_path, few(), batch_size=500), pool),
    ]
    for evaluator in evaluators:
        outcomes: list[Outcome] = [future.result() for future in map(evaluator.submit, (plain, ASKED, plain))]
        for outcome in outcomes:
            assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)  # type: ignore[union-attr]
        evaluator.close()


def test_many_real_images_cost_a_few_samples_once_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = []
    sample = MergeSampleScore.sample

    def counted(self: MergeSampleScore, candidate: Candidate, *rest: Any) -> Any:
        sampled.append((candidate.noise.group, candidate.images))
        return sample(self, candidate, *rest)

    monkeypatch.setattr(MergeSampleScore, "sample", counted)
    objective = build(tmp_path, few(3000), batch_size=500)
    evaluation = objective.evaluate(ASKED)
    objective.evaluate(ASKED)
    assert sampled == [("average", 200), ("search", None), ("search", None)]
    assert evaluation.metrics == {"fid": evaluation.loss}
    assert not objective.reported_metrics().few_real_images
    sampled.clear()
    build(tmp_path, few(20)).evaluate(Candidate(EMA, rehearsal=True))
    assert sampled == [("search", None)], "of a rehearsal nobody compares the loss"


def test_another_rule_would_be_another_problem(tmp_path: Path, objective: MergeSampleScore) -> None:
    assert objective.describe()["target"] == {"sigma_rel": 0.1, "images": 2000}
    many = suite({"inception": Reference.of_features(Pixels(), np.random.default_rng(0).normal(size=(10_001, 16)))})
    assert "target" not in build(tmp_path, many).describe()


def test_an_average_that_cannot_sample_leaves_the_real_images_alone(
    objective: MergeSampleScore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    average = power_ema_coefficients(STEPS, 0.1)
    merge = objective.trajectory.merge

    def broken(coefficients: Any) -> Any:
        merged = merge(coefficients)
        if np.array_equal(coefficients, average):
            merged = {name: tensor * float("nan") for name, tensor in merged.items()}
        return merged

    monkeypatch.setattr(objective.trajectory, "merge", broken)
    with caplog.at_level("INFO", logger="lcsc_opt"):
        evaluation = objective.evaluate(Candidate(EMA))
    assert evaluation.metrics == {"fid": evaluation.loss}
    assert any("cannot sample" in line for line in caplog.messages)
