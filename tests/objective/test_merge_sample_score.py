from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, HELD_OUT, SEARCH, SELECTION, Candidate
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import FrechetReference, MetricSuite, Reference
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import ImageNoise
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.metrics.examples import Pixels, suite
from tests.sampling.consistency_sampler import ConsistencySampler

STEPS = (10, 20, 30, 40)
EMA = ema_coefficients(STEPS, 0.95)

pytestmark = pytest.mark.usefixtures("plain_targets")


class Network(nn.Module):
    """Two convolutions, between which channels have an order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.widening = nn.Conv2d(1, 4, 3, padding=1)
        self.narrowing = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.tanh(self.narrowing(torch.tanh(self.widening(x))))


def trajectory(folder: Path) -> Trajectory:
    path, generator = folder / "run.trajectory", torch.Generator().manual_seed(0)
    if not path.exists():
        with TrajectoryWriter(path) as writer:
            for step in STEPS:
                shapes = {name: tensor.shape for name, tensor in Network().named_parameters()}
                writer.append(step, {n: 0.5 * torch.randn(shape, generator=generator) for n, shape in shapes.items()})
    return Trajectory.open(path)


def real() -> Reference:
    return Reference.of_features(Pixels(), np.random.default_rng(0).uniform(-1, 1, (300, 16)))


def sampler() -> ConsistencySampler:
    return ConsistencySampler(ConsistencyFunction(Network()), sigmas=[20.0], noise=ImageNoise(0, (1, 4, 4)))


def build(folder: Path, scores: MetricSuite | None = None, **changes: Any) -> MergeSampleScore:
    settings = {"images": 40, "batch_size": 7, **changes}
    return MergeSampleScore(trajectory(folder), sampler(), scores or suite({"inception": real()}), **settings)


def test_the_loss_is_the_fid_of_the_merged_models_samples(tmp_path: Path) -> None:
    objective = build(tmp_path)
    alone = sampler()
    alone.load(trajectory(tmp_path).merge(EMA))
    with torch.inference_mode():
        features = alone.sample(SEARCH, 0, 40).flatten(1).double().numpy()
    reference = real().frechet
    expected = FrechetReference(features.mean(0), np.cov(features.T)).distance(reference.mean, reference.cov)
    evaluation = objective.evaluate(Candidate(EMA))
    assert evaluation.loss == pytest.approx(expected, rel=1e-6)
    assert evaluation.metrics == {"fid": evaluation.loss}
    assert objective(EMA) == evaluation.loss
    assert objective.describe()["trajectory"] == trajectory(tmp_path).sha256
    assert objective.describe() != build(tmp_path, images=41).describe()


def test_in_another_layout_only_rounding_differs(tmp_path: Path) -> None:
    second = sampler()
    objective = build(tmp_path, also=second)
    candidate = Candidate(EMA, gradient=True)
    plain = objective.evaluate(candidate)
    assert plain.gradient is not None
    for layout, is_last in ((CHANNELS_LAST, True), (CONTIGUOUS, False)):
        objective.layout = layout
        laid = objective.evaluate(candidate)
        assert laid.gradient is not None
        assert laid.loss == pytest.approx(plain.loss, rel=1e-5)
        np.testing.assert_allclose(laid.gradient, plain.gradient, rtol=1e-3)
        for each in (objective.sampler, second):
            weight = each.network.narrowing.weight  # type: ignore[attr-defined]
            assert weight.is_contiguous(memory_format=torch.channels_last) == is_last


def test_other_metrics_are_the_loss_or_beside_it_or_only_held_out(tmp_path: Path) -> None:
    scores = suite({"inception": real()}, loss={"kid": 100}, metrics=["fid"], held_out_metrics=["recall"])
    objective = build(tmp_path, scores)
    searched = objective.evaluate(Candidate(EMA))
    assert list(searched.metrics) == ["kid", "fid"]
    assert searched.loss == 100 * searched.metrics["kid"]
    assert searched.metrics["fid"] == pytest.approx(build(tmp_path)(EMA), rel=1e-12)
    assert list(objective.evaluate(Candidate(EMA, noise=SELECTION)).metrics) == ["kid", "fid"], "its loss decides"
    assert list(objective.evaluate(Candidate(EMA, noise=HELD_OUT)).metrics) == ["kid", "fid", "recall", "outside"]
    assert objective.reported_metrics().signs == {"fid": 1, "recall": -1, "outside": 1}
    assert objective.describe()["scores"]["loss"] == {"kid": 100.0}


def test_reports_know_what_held_out_real_images_would_have(tmp_path: Path) -> None:
    unseen = dataclasses.replace(real(), held_out=real())
    reported = build(tmp_path, suite({"inception": unseen}, held_out_metrics=["fid_held_out"])).reported_metrics()
    assert reported.real_halves == {"fid_held_out": pytest.approx(0.0, abs=1e-9)}
    assert reported.real_count == len(real().known_features)
    assert (reported.cross_check, reported.cross_check_text) == (None, None)


def test_a_second_sampler_uses_the_same_weights_and_changes_neither_search_nor_fingerprint(tmp_path: Path) -> None:
    alone = build(tmp_path)
    first = sampler()
    network = first.function
    second = ConsistencySampler(network, sigmas=[20.0, 2.0], noise=ImageNoise(0, (1, 4, 4)))
    scores = suite({"inception": real()})
    objective = MergeSampleScore(trajectory(tmp_path), first, scores, images=40, batch_size=7, also=second)
    candidate = Candidate(EMA, noise=HELD_OUT)
    elsewhere = objective.evaluate(Candidate(EMA, noise=HELD_OUT, sampler=1))
    assert objective.evaluate(candidate).metrics == alone.evaluate(candidate).metrics
    assert objective.describe() == alone.describe()
    assert objective.describe_reports() == alone.describe_reports() == {"scores": scores.describe_reports()}
    only = MergeSampleScore(trajectory(tmp_path), second, scores, images=40, batch_size=7)
    assert elsewhere.metrics == only.evaluate(candidate).metrics
    assert (elsewhere.cost.model_calls, elsewhere.cost.images) == (80, 40)
    titles = [title.text for title in objective.samples.samplers]
    assert titles == ["consistency, 1 model call an image", "consistency, 2 model calls an image"]
    assert len({title.sha256 for title in objective.samples.samplers}) == 2
    assert [title.text for title in alone.samples.samplers] == titles[:1]
