"""Evaluations divided by images, in stages, and batches that turn out too large."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.records import HELD_OUT, Candidate, Noise
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.evaluation import Pipeline
from lcsc_opt.metrics import Reference, Scores
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.merge_sample_score import Merged, MergeSampleScore
from lcsc_opt.sampling import ConsistencyFunction, ConsistencySampler, ImageNoise
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.processes import wait_until

STEPS = (10, 20, 30)
EMA, OTHER = ema_coefficients(STEPS, 0.95), np.array([1.5, -1.0, 0.5])
FEATURES = 12


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Some:
    """The first pixels, and how many images came at once."""

    name, dimension = "some", FEATURES

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images.flatten(1)[:, :FEATURES]


@pytest.fixture
def objective(tmp_path: Path) -> MergeSampleScore:
    return build(tmp_path)


def build(folder: Path, **changes: Any) -> MergeSampleScore:
    generator = torch.Generator().manual_seed(0)
    with TrajectoryWriter(folder / "run.trajectory") as writer:
        for step in STEPS:
            weights = {n: 0.5 * torch.randn(p.shape, generator=generator) for n, p in Network().named_parameters()}
            writer.append(step, weights)
    sampler = ConsistencySampler(
        ConsistencyFunction(Network()), image_shape=(1, 4, 4), sigmas=[20.0], noise=ImageNoise(0)
    )
    real = np.random.default_rng(0).uniform(-1, 1, (300, FEATURES))
    scores = Scores({"inception": Reference.of_features(Some(), real)})
    settings = {"images": 40, "batch_size": 7, **changes}
    return MergeSampleScore(Trajectory.open(folder / "run.trajectory"), sampler, scores, **settings)


def travelled(value: Any) -> Any:
    """As between processes."""
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("cuts", [(), (20,), (1, 2), (7, 14, 33)])
@pytest.mark.parametrize("images", [None, 11])  # fewer than features: FID by the Gram matrix
@pytest.mark.parametrize("noise", [Noise(), HELD_OUT])
def test_parts_give_the_loss_of_the_whole(
    objective: MergeSampleScore, cuts: tuple[int, ...], images: int | None, noise: Noise
) -> None:
    candidate = Candidate(EMA, images=images, noise=noise)
    count = objective.images_of(candidate)
    ends = [0, *(cut for cut in cuts if cut < count), count]
    parts = [
        travelled(objective.sample(candidate, objective.prepare(candidate), first, last))
        for first, last in itertools.pairwise(ends)
    ]
    evaluation, back = objective.score(candidate, parts)
    whole = objective.evaluate(candidate)
    # a convolution of one image rounds differently, which the mean over eleven images shows
    rounding = 1e-8 if images == 11 else 1e-9
    assert evaluation.loss == pytest.approx(whole.loss, rel=rounding)
    assert evaluation.metrics == pytest.approx(whole.metrics, rel=rounding)
    assert (evaluation.cost.images, evaluation.cost.model_calls) == (count, count)
    assert back == [None] * len(parts)


@pytest.mark.parametrize("cuts", [(), (20,), (7, 14, 33)])
def test_products_of_parts_add_up_to_the_gradient(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    candidate = Candidate(OTHER)
    ends = [0, *cuts, 40]
    ranges = list(itertools.pairwise(ends))
    whole = build(tmp_path / "whole").evaluate(candidate, gradient=True)
    workers = [build(tmp_path / f"worker {i}") for i in range(len(ranges))]
    parts = [
        travelled(worker.sample(candidate, worker.prepare(candidate), first, last, gradient=True))
        for worker, (first, last) in zip(workers, ranges, strict=True)
    ]
    _, back = workers[0].score(candidate, parts, gradient=True)
    products = [
        worker.vjp(travelled(candidate), first, last, travelled(rows))[0]
        for worker, (first, last), rows in zip(workers, ranges, back, strict=True)
        if rows is not None
    ]
    assert whole.gradient is not None
    assert len(products) == len(ranges)
    np.testing.assert_allclose(sum(products), whole.gradient, rtol=1e-5)


@pytest.mark.parametrize("meanwhile", ["nothing", "another candidate", "another process"])
def test_a_vector_jacobian_product_is_the_same_whatever_was_sampled_meanwhile(tmp_path: Path, meanwhile: str) -> None:
    objective, candidate = build(tmp_path / "one"), Candidate(EMA)
    part = objective.sample(candidate, objective.prepare(candidate), 0, 40, gradient=True)
    _, [back] = objective.score(candidate, [part], gradient=True)
    assert back is not None
    if meanwhile == "another candidate":
        objective.evaluate(Candidate(OTHER))
    elif meanwhile == "another process":
        objective = build(tmp_path / "two")
    product, cost = objective.vjp(candidate, 0, 40, back)
    expected = build(tmp_path / "three").evaluate(candidate, gradient=True)
    assert expected.gradient is not None
    assert product.tobytes() == expected.gradient.tobytes()
    assert cost.model_calls == (35 if meanwhile == "nothing" else 40) + 2 * 40
    again, _ = objective.vjp(candidate, 0, 40, back)
    assert again.tobytes() == expected.gradient.tobytes()


def test_a_vector_jacobian_product_is_the_same_where_one_worker_samples_several_parts(tmp_path: Path) -> None:
    candidate, ranges = Candidate(OTHER), [(0, 20), (20, 40)]
    two, one = [build(tmp_path / name) for name in ("first", "second")], build(tmp_path / "one")
    products = []
    for workers in (two, [one, one]):
        both = list(zip(workers, ranges, strict=True))
        parts = [worker.sample(candidate, worker.prepare(candidate), *images, gradient=True) for worker, images in both]
        _, back = one.score(candidate, parts, gradient=True)
        products.append(
            [
                worker.vjp(candidate, *images, rows)[0].tobytes()
                for (worker, images), rows in zip(both, back, strict=True)
                if rows is not None
            ]
        )
    assert products[0] == products[1]
    assert len(products[0]) == 2


def test_merged_weights_are_let_go_before_images_are_sampled(objective: MergeSampleScore) -> None:
    candidate, alive = Candidate(EMA), []
    prepare, sample = objective.prepare, objective.sampler.sample

    def remembered(candidate: Candidate) -> Merged:
        merged = prepare(candidate)
        alive.extend(weakref.ref(tensor) for tensor in merged[0].values())
        return merged

    def sampled(noise: Noise, start: int, stop: int) -> Tensor:
        assert alive
        assert all(tensor() is None for tensor in alive)
        return sample(noise, start, stop)

    objective.prepare = remembered  # type: ignore[method-assign]
    objective.sampler.sample = sampled  # type: ignore[method-assign]
    objective.evaluate(candidate)


def test_a_found_batch_that_is_too_large_is_made_smaller_and_nothing_else_changes(tmp_path: Path) -> None:
    asked: list[int] = []

    def smaller(size: int) -> int:
        asked.append(size)
        return size // 2

    objective = build(tmp_path, batch_size=32, smaller_batch=smaller)
    expected = build(tmp_path / "other", batch_size=8).evaluate(Candidate(EMA)).loss
    sample = objective.sampler.sample

    def scarce(noise: Noise, start: int, stop: int) -> Tensor:
        if stop - start > 8:
            raise torch.OutOfMemoryError("out of memory")
        return sample(noise, start, stop)

    objective.sampler.sample = scarce  # type: ignore[method-assign]
    evaluation = objective.evaluate(Candidate(EMA))
    assert asked == [32, 16]
    assert evaluation.loss == pytest.approx(expected, rel=1e-9)
    assert objective.describe()["batch_size"] == "auto"
    objective.evaluate(Candidate(OTHER))
    assert asked == [32, 16]


@pytest.mark.parametrize(("gradient", "closed_at", "batches"), [(False, 3, 40), (True, 3, 79), (True, 43, 79)])
def test_closing_a_pipeline_stops_between_two_batches(
    tmp_path: Path, gradient: bool, closed_at: int, batches: int
) -> None:
    objective = build(tmp_path, batch_size=1)
    sample, sampled, reached = objective.sampler.sample, list[int](), threading.Event()

    def slow(noise: Noise, start: int, stop: int) -> Tensor:
        sampled.append(start)
        if len(sampled) == closed_at and not reached.is_set():
            reached.set()
            with contextlib.suppress(KeyboardInterrupt):
                wait_until(stop_if_told)  # which raises once the pipeline is being closed
        return sample(noise, start, stop)

    objective.sampler.sample = slow  # type: ignore[method-assign]
    pipeline = Pipeline(objective)
    future = pipeline.submit(Candidate(EMA), gradient=gradient)
    assert reached.wait(timeout=60)
    pipeline.close()
    assert isinstance(future.exception(), KeyboardInterrupt)
    assert len(sampled) == closed_at
    sampled.clear()
    objective.evaluate(Candidate(EMA), gradient=gradient)  # it was that pipeline's evaluation, not the objective
    assert len(sampled) == batches


def test_weights_need_no_gradient_once_a_kept_graph_is_dropped(objective: MergeSampleScore) -> None:
    candidate = Candidate(EMA)
    parameters = list(objective.sampler.network.parameters())  # type: ignore[attr-defined]
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    objective.sample(candidate, objective.prepare(candidate), 0, 40, gradient=True)
    assert all(parameter.requires_grad for parameter in parameters)
    objective.evaluate(Candidate(OTHER))
    assert not any(parameter.requires_grad for parameter in parameters)
    assert any(before)
