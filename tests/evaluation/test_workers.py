from __future__ import annotations

import contextlib
import functools
import os
import pickle
import platform
import queue
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.records import Evaluation
from lcsc_opt.evaluation import Failure, ProcessEvaluator, SpreadEvaluator, WorkerPool, evaluate_safely, processes
from lcsc_opt.evaluation import pool as pool_module
from lcsc_opt.evaluation.processes import cores, environments
from lcsc_opt.evaluation.worker import READY, Answer, Job, WorkerSettings
from tests.evaluation.staged_examples import (
    IMAGES,
    SLOW_SECONDS,
    DiesOnce,
    EnvironmentInLoss,
    HeldScore,
    Slow,
    Stages,
    Whole,
    candidate,
    wait_for_file,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(Stages, 3)
    yield pool
    pool.close()


@pytest.mark.parametrize("images", [None, 7, 2, 1])
def test_the_images_of_a_candidate_are_spread_and_the_loss_is_the_same(pool: WorkerPool, images: int | None) -> None:
    evaluator, asked = SpreadEvaluator(Stages(), pool), candidate(0.5, 0.75, -0.25, images=images)
    outcome = evaluator.submit(asked).result(timeout=120)
    evaluator.close()
    assert isinstance(outcome, Evaluation)
    assert outcome.loss == pytest.approx(Stages().evaluate(asked).loss, rel=1e-12)
    assert outcome.cost.images == (IMAGES if images is None else images)
    processes = set(outcome.metrics.values())
    assert len(processes) == min(images or IMAGES, 3)
    assert os.getpid() not in processes


def test_the_gradient_of_a_candidate_is_the_sum_over_its_workers(pool: WorkerPool) -> None:
    evaluator, asked = SpreadEvaluator(Stages(), pool), candidate(0.5, 0.75, -0.25)
    outcome = evaluator.submit(asked, gradient=True).result(timeout=120)
    evaluator.close()
    expected = evaluate_safely(Stages(), asked, gradient=True)
    assert isinstance(outcome, Evaluation)
    assert isinstance(expected, Evaluation)
    assert outcome.gradient is not None
    assert outcome.cost.model_calls == IMAGES
    np.testing.assert_allclose(outcome.gradient, expected.gradient, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "reason"), [(7.0, "merge"), (8.0, "sample"), (9.0, "score")])
def test_a_part_that_fails_fails_the_candidate_with_its_reason(pool: WorkerPool, first: float, reason: str) -> None:
    evaluator = SpreadEvaluator(Stages(), pool)
    outcome = evaluator.submit(candidate(first, 1 - first, 0.0)).result(timeout=120)
    after = evaluator.submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    evaluator.close()
    assert isinstance(outcome, Failure)
    assert outcome.reason == f"RuntimeError: cannot {reason}"
    assert isinstance(after, Evaluation)


def test_an_objective_without_stages_gives_its_loss_and_its_gradient() -> None:
    pool, asked = WorkerPool(Whole, 1), candidate(0.5, 0.75, -0.25)
    try:
        evaluator = ProcessEvaluator(pool)
        plain, other = (evaluator.submit(asked, gradient=gradient).result(timeout=120) for gradient in (False, True))
    finally:
        pool.close()
    assert isinstance(plain, Evaluation)
    assert isinstance(other, Evaluation)
    assert plain.loss == other.loss == 0.4375
    assert plain.gradient is None
    assert other.gradient is not None
    assert other.gradient.tolist() == [0.5, 0.75, -0.25]


def test_a_worker_that_dies_fails_what_it_had_and_is_replaced() -> None:
    pool = WorkerPool(Stages, 2)
    try:
        whole, spread = ProcessEvaluator(pool), SpreadEvaluator(Stages(), pool)
        died = whole.submit(candidate(5.0, -4.0, 0.0)).result(timeout=120)
        also = spread.submit(candidate(5.0, -4.0, 0.0)).result(timeout=120)
        after = spread.submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
        [here] = pool.nodes()
    finally:
        pool.close()
    assert (here.name, here.deaths) == (platform.node(), 3), "one evaluated alone, two shared a candidate"
    assert 1 <= here.alive <= 2
    for failed in (died, also):
        assert isinstance(failed, Failure)
        assert "worker process died" in failed.reason
        assert failed.retry
    assert isinstance(after, Evaluation)


class Obedient:
    """A worker that answers every job at once, until it is stopped."""

    machine = "here"

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._answers.put(Answer(READY))

    def send(self, job: Job) -> None:
        self._answers.put(Answer(job.number, pickle.dumps("done")))

    def receive(self) -> Answer:
        answer = self._answers.get()
        if answer is None:
            raise EOFError
        return answer

    def terminate(self) -> None:
        self._answers.put(None)

    def join(self) -> tuple[str, bool]:
        return "stopped", True


class Places:
    """Where such workers are."""

    elastic = False

    def __init__(self) -> None:
        self.links: list[Obedient] = []

    def threads(self, workers: int) -> int:
        return 1

    def start(self, settings: WorkerSettings) -> Obedient:
        self.links.append(Obedient())
        return self.links[-1]

    def refused(self, link: object, error: LcscError) -> LcscError:
        return error


def test_a_job_goes_to_another_worker_where_the_chosen_one_dies_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places()
    pool = WorkerPool(Stages, 1, machines=places)
    assert pool.submit("submit").result(timeout=60) == "done"
    load = pool_module._Worker.load.fget
    assert load is not None

    def dies_while_it_is_asked(worker: Any) -> int:
        if len(places.links) == 1:
            places.links[0].terminate()
            while worker._link is not None:
                time.sleep(0.001)
        return int(load(worker))

    monkeypatch.setattr(pool_module._Worker, "load", property(dies_while_it_is_asked))
    try:
        assert pool.submit("submit").result(timeout=60) == "done"
    finally:
        pool.close()
    assert len(places.links) == 2


def test_closing_stops_workers_in_the_middle_and_cancels_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_TEST_MARKER", str(tmp_path / "samples"))
    pool = WorkerPool(Slow, 2)
    evaluator = SpreadEvaluator(Slow(), pool)
    future = evaluator.submit(candidate(1.0, 0.0, 0.0))
    wait_for_file(tmp_path / "samples")
    start = time.monotonic()
    evaluator.close()
    pool.close()
    assert time.monotonic() - start < SLOW_SECONDS / 2
    with pytest.raises(CancelledError):
        future.result(timeout=120)


def fails_to_load() -> Stages:
    raise StudySpecError("no such file: put it back")


def test_an_objective_that_a_worker_cannot_load_is_told_as_it_is() -> None:
    pool = WorkerPool(fails_to_load, 1)
    try:
        with pytest.raises(StudySpecError, match="put it back"):
            ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    finally:
        pool.close()


def test_parts_of_another_objective_are_refused() -> None:
    pool = WorkerPool(Stages, 1, expected={"objective": {"stages": False}, "code": {}})
    evaluator = SpreadEvaluator(Stages(), pool)
    try:
        with pytest.raises(StudyStoreError, match="other files"):
            evaluator.submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    finally:
        evaluator.close()
        pool.close()


def test_workers_are_spread_evenly_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gpus", lambda: ["2", "5"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3)] == ["2", "5", "2"]
    listed = environments(3, ("cuda:1", "cpu", "cuda"))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in listed] == ["5", "", "2"]
    monkeypatch.setattr(processes, "gpus", list)
    assert environments(2) == [{}, {}]
    with pytest.raises(Exception, match=r"workers: cuda:0 is not there \(torch sees none\); 'auto' takes what is"):
        environments(1, ("cuda:0",))


def test_each_worker_sees_its_own_device_only_and_has_its_share_of_the_cores() -> None:
    pool = WorkerPool(functools.partial(EnvironmentInLoss), 2, environments=[{"CUDA_VISIBLE_DEVICES": n} for n in "37"])
    try:
        futures = [pool.submit("submit", candidate(1.0, 0.0, 0.0), worker=worker) for worker in (0, 1)]
        outcomes = [future.result(timeout=120) for future in futures]
        assert [outcome.loss for outcome in outcomes] == [3.0, 7.0]
        assert [outcome.metrics["threads"] for outcome in outcomes] == 2 * [max(cores() // 2, 1)]
    finally:
        pool.close()


def test_closing_while_a_gradient_is_scored_leaves_nobody_waiting() -> None:
    pool = WorkerPool(Stages, 2)
    objective = HeldScore()
    evaluator = SpreadEvaluator(objective, pool)
    future = evaluator.submit(candidate(1.0, 0.0, 0.0), gradient=True)
    assert objective.scores.wait(120)
    with ThreadPoolExecutor() as closing:
        closed = closing.submit(lambda: (pool.close(), evaluator.close()))
        objective.ends.set()
        closed.result(120)
    with contextlib.suppress(CancelledError):  # or its products came before the end
        future.result(timeout=120)
    assert future.done()


def test_a_worker_that_dies_between_sample_and_gradient_costs_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    monkeypatch.setenv("LCSC_TEST_MARKER", str(marker))
    pool, asked = WorkerPool(DiesOnce, 2), candidate(0.5, 0.75, -0.25)
    evaluator = SpreadEvaluator(DiesOnce(), pool)
    try:
        first = evaluator.submit(asked, gradient=True).result(timeout=120)
        second = evaluator.submit(asked, gradient=True).result(timeout=120)
    finally:
        evaluator.close()
        pool.close()
    expected = evaluate_safely(Stages(), asked, gradient=True)
    assert isinstance(first, Failure)
    assert first.retry
    assert "worker process died" in first.reason
    assert isinstance(second, Evaluation)
    assert isinstance(expected, Evaluation)
    assert second.gradient is not None
    np.testing.assert_allclose(second.gradient, expected.gradient, rtol=1e-12)  # type: ignore[arg-type]


def dies_while_loading() -> Stages:
    os._exit(7)


def test_a_worker_that_dies_again_and_again_is_given_up_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pool = WorkerPool(dies_while_loading, 1)
    try:
        with pytest.raises(
            ObjectiveError, match=r"worker 0 was lost 3 times in a row: .* exit code 7\); give it more memory"
        ):
            ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    finally:
        pool.close()
    assert "worker 0 was lost 3 times in a row" in capsys.readouterr().err
