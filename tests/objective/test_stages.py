"""Evaluations divided by images, in stages, and batches that turn out too large."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.records import HELD_OUT, Candidate, Noise
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from tests.metrics.examples import suite
from tests.objective.test_merge_sample_score import EMA, build, real
from tests.processes import wait_until

OTHER = np.array([1.5, -1.0, 0.25, 0.25])


pytestmark = pytest.mark.usefixtures("plain_targets")


@pytest.fixture
def objective(tmp_path: Path) -> MergeSampleScore:
    return build(tmp_path)


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
    assert evaluation.loss == pytest.approx(whole.loss, rel=1e-8)  # a convolution of one image rounds differently
    assert evaluation.metrics == pytest.approx(whole.metrics, rel=1e-8)
    assert (evaluation.cost.images, evaluation.cost.model_calls) == (count, count)
    assert back == [None] * len(parts)


def products(workers: list[MergeSampleScore], candidate: Candidate, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
    """The parts of the gradient, each from the worker that sampled its images."""
    both = list(zip(workers, ranges, strict=True))
    parts = [travelled(one.sample(candidate, one.prepare(candidate), *part)) for one, part in both]
    _, back = workers[0].score(candidate, parts)
    found = [
        one.vjp(travelled(candidate), *part, travelled(rows))[0]
        for (one, part), rows in zip(both, back, strict=True)
        if rows is not None
    ]
    assert len(found) == len(ranges)
    return found


@pytest.mark.parametrize("cuts", [(), (20,), (7, 14, 33)])
def test_products_of_parts_add_up_to_the_gradient(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    candidate, ranges = Candidate(OTHER, gradient=True), list(itertools.pairwise([0, *cuts, 40]))
    whole = build(tmp_path).evaluate(candidate).gradient
    assert whole is not None
    found = products([build(tmp_path) for _ in ranges], candidate, ranges)
    np.testing.assert_allclose(sum(found), whole, rtol=1e-5)


@pytest.mark.parametrize("meanwhile", ["nothing", "another candidate", "another process"])
def test_a_vector_jacobian_product_is_the_same_whatever_was_sampled_meanwhile(tmp_path: Path, meanwhile: str) -> None:
    objective, candidate = build(tmp_path), Candidate(EMA, gradient=True)
    part = objective.sample(candidate, objective.prepare(candidate), 0, 40)
    _, [back] = objective.score(candidate, [part])
    assert back is not None
    if meanwhile == "another candidate":
        objective.evaluate(Candidate(OTHER))
    elif meanwhile == "another process":
        objective = build(tmp_path)
    product, cost = objective.vjp(candidate, 0, 40, back)
    expected = build(tmp_path).evaluate(candidate)
    assert expected.gradient is not None
    assert product.tobytes() == expected.gradient.tobytes()
    assert cost.model_calls == (35 if meanwhile == "nothing" else 40) + 2 * 40
    again, _ = objective.vjp(candidate, 0, 40, back)
    assert again.tobytes() == expected.gradient.tobytes()


def test_an_automatic_batch_that_is_too_large_is_halved_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = build(tmp_path, batch_size="auto")
    expected, sample = build(tmp_path, batch_size=8)(EMA), objective.sampler.sample

    def scarce(noise: Noise, start: int, stop: int) -> Tensor:
        if stop - start > 8:
            raise torch.OutOfMemoryError("out of memory")
        return sample(noise, start, stop)

    objective.sampler.sample = scarce  # type: ignore[method-assign]
    assert objective(EMA) == pytest.approx(expected, rel=1e-9)
    objective(OTHER)
    assert [line.split()[-4] for line in capsys.readouterr().err.splitlines()] == ["20", "10", "5"]
    other = build(tmp_path, suite({"inception": real()}, keep="precision"), batch_size="auto")
    other.sampler.sample = scarce  # type: ignore[method-assign]
    other.images(EMA, Noise(), 40)
    assert [line.split()[-4] for line in capsys.readouterr().err.splitlines()] == ["20", "10", "5"]
    never = build(tmp_path, batch_size="auto")
    never.sampler.sample = lambda *_: scarce(Noise(), 0, 9)  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        never(EMA)


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
    future = pipeline.submit(Candidate(EMA, gradient=gradient))
    assert reached.wait(timeout=60)
    pipeline.close()
    assert isinstance(future.exception(), KeyboardInterrupt)
    assert len(sampled) == closed_at
    sampled.clear()
    objective.evaluate(Candidate(EMA, gradient=gradient))  # it was that pipeline's evaluation, not the objective
    assert len(sampled) == batches
