from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.accelerator import environments
from lcsc_opt.base.errors import LcscError, ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.machine import cores
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.evaluation.worker import READY, Answer
from lcsc_opt.evaluation.workers import Workers
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key
from lcsc_opt.trajectory import Trajectory
from tests.evaluation.staged_examples import (
    IMAGES,
    SLOW_SECONDS,
    DiesOnce,
    HeldScore,
    Slow,
    Stages,
    Unreadable,
    UnreadableLoad,
    WritesItsProcess,
    assert_gradient,
    candidate,
    dies_while_loading,
    evaluated,
    failed,
    fails_to_load,
    fails_to_load_oddly,
    is_running,
)
from tests.processes import forked, wait_until
from tests.trajectory.trajectory_examples import make_trajectory


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with contextlib.closing(WorkerPool(Stages, 3)) as pool:
        yield pool


@pytest.fixture
def spread(pool: WorkerPool) -> Iterator[SpreadEvaluator]:
    with contextlib.closing(SpreadEvaluator(Stages(), pool)) as evaluator:
        yield evaluator


@pytest.mark.parametrize("images", [None, 7, 2, 1])
def test_the_images_of_a_candidate_are_spread_and_the_loss_is_the_same(
    spread: SpreadEvaluator, images: int | None
) -> None:
    asked = candidate(0.5, 0.75, -0.25, images=images)
    found = evaluated(spread.submit(asked))
    assert found.loss == pytest.approx(Stages().evaluate(asked).loss, rel=1e-12)
    assert found.cost.images == (IMAGES if images is None else images)
    processes = set(found.metrics.values())
    assert len(processes) == min(images or IMAGES, 3)
    assert os.getpid() not in processes


def test_the_gradient_of_a_candidate_is_the_sum_over_its_workers(spread: SpreadEvaluator) -> None:
    asked = candidate(0.5, 0.75, -0.25, gradient=True)
    found = evaluated(spread.submit(asked))
    assert found.cost.model_calls == IMAGES
    assert_gradient(found, asked)


@pytest.mark.parametrize(("first", "reason"), [(7.0, "merge"), (8.0, "sample"), (9.0, "score")])
def test_a_part_that_fails_fails_the_candidate_with_its_reason(
    spread: SpreadEvaluator, first: float, reason: str
) -> None:
    assert failed(spread.submit(candidate(first, 1 - first, 0.0))).reason == f"RuntimeError: cannot {reason}"
    evaluated(spread.submit(candidate(1.0, 0.0, 0.0)))


def test_a_worker_that_dies_fails_what_it_had_and_is_replaced() -> None:
    dies = candidate(5.0, -4.0, 0.0)
    with contextlib.closing(WorkerPool(Stages, 2)) as pool:
        spread = SpreadEvaluator(Stages(), pool)
        died = [failed(evaluator.submit(dies)) for evaluator in (ProcessEvaluator(pool), spread)]
        evaluated(spread.submit(candidate(1.0, 0.0, 0.0)))
        asked = candidate(0.5, 0.75, -0.25, gradient=True)
        assert_gradient(evaluated(ProcessEvaluator(pool).submit(asked)), asked)
        assert 1 <= pool.alive <= 2
    assert all("worker process died" in one.reason and one.retry for one in died)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("prompts.txt"), EOFError("cut off")],  # which a lost connection raises, too
)
def test_a_job_that_a_worker_cannot_read_fails_and_the_next_one_does_not(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(WorkerPool(Stages, 1)) as pool:
        failure = failed(pool.submit("submit", Unreadable(error)))
        evaluated(ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)))
    assert failure.reason == "the worker process died (exit code 1)", "nothing killed it"
    assert f"{type(error).__name__}: {error}" in capfd.readouterr().err


class Unwritable(float):
    """Refuses to be pickled, as if the connection had broken."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OSError("of this process only")


def test_a_candidate_that_cannot_be_pickled_fails_with_its_reason_and_the_next_one_does_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its job is handed out by the thread that hears that the worker is ready: an error there would end it."""
    asked = candidate(1.0, 0.0, 0.0)
    bad = dataclasses.replace(asked, keep_weight=Unwritable(3.0))
    with contextlib.closing(WorkerPool(Stages, 2)) as pool:
        spread = SpreadEvaluator(Stages(), pool)
        for evaluator in (ProcessEvaluator(pool), spread, ProcessEvaluator(pool)):
            failure = failed(evaluator.submit(bad))
            assert re.match(r"cannot be sent to a worker, .*\(OSError: of this process only\); run", failure.reason)
            assert not failure.retry
            evaluated(evaluator.submit(asked))
        assert pool.alive
    assert "Traceback" not in capfd.readouterr().err


def test_closing_stops_workers_in_the_middle_and_cancels_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_TEST_MARKER", str(tmp_path / "samples"))
    pool = WorkerPool(Slow, 2)
    evaluator = SpreadEvaluator(Slow(), pool)
    future = evaluator.submit(candidate(1.0, 0.0, 0.0))
    wait_until((tmp_path / "samples").exists)
    start = time.monotonic()
    evaluator.close()
    pool.close()
    assert time.monotonic() - start < SLOW_SECONDS / 2
    with pytest.raises(CancelledError):
        future.result(timeout=120)


OTHER = Key({"objective.stages": False})


@pytest.mark.parametrize(
    ("load", "expected", "error", "message"),
    [
        (fails_to_load, None, StudySpecError, "put it back"),
        (Stages, OTHER, StudyStoreError, "other files"),
        (
            dies_while_loading,
            None,
            ObjectiveError,
            r"worker 0 was lost 3 times in a row: the worker process died \(exit code 7\)",
        ),
        (
            UnreadableLoad(EOFError("cut off")),
            None,
            ObjectiveError,
            r"worker 0 was lost 3 times in a row: the worker process died \(exit code 1\)",
        ),
        (fails_to_load_oddly, None, ObjectiveError, "the answer of a worker cannot be read: .*missing 1 required"),
    ],
)
def test_an_objective_that_workers_cannot_load_or_that_differs_there_is_told_as_it_is(
    load: Any, expected: Any, error: type[LcscError], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(WorkerPool(load, 1, expected=expected)) as pool, pytest.raises(error, match=message):
        ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    assert ("was lost 3 times" in capsys.readouterr().err) == message.startswith("worker 0 was lost")


class CannotLoad:
    """Other machines, and the connection to their one worker, which cannot load the objective."""

    def __init__(self) -> None:
        self.answers = iter([Answer.of(READY, StudySpecError("no such file"))])
        self.stopped = threading.Event()
        self.jobs: list[bytes] = []

    def start(self, _: Any) -> CannotLoad:
        return self

    def receive(self) -> Answer:
        for answer in self.answers:
            return answer
        self.stopped.wait()
        raise EOFError

    def refused(self, _: Any, error: LcscError) -> LcscError:
        """Finding the name of a machine takes a moment, in which another thread may submit something."""
        self.meanwhile = self.pool.submit("submit", candidate(0.0, 1.0, 0.0))
        return StudySpecError(f"node one: {error}")

    def send(self, job: bytes) -> None:
        self.jobs.append(job)

    def terminate(self) -> None:
        self.stopped.set()

    def join(self) -> tuple[str, bool]:
        return "the worker was stopped", False


def test_a_job_that_comes_while_a_worker_is_asked_why_it_cannot_load_is_refused_with_the_same_words() -> None:
    machines = CannotLoad()
    machines.pool = WorkerPool(Stages, 1, machines=machines)
    with contextlib.closing(machines.pool) as pool:
        first = pool.submit("submit", candidate(1.0, 0.0, 0.0))
        assert str(first.exception(120)) == "node one: no such file"
        assert str(machines.meanwhile.exception(120)) == "node one: no such file"
    assert not machines.jobs


def test_workers_are_spread_evenly_over_the_gpus(set_devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices("cuda:0", "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3)] == ["2", "5", "2"]
    listed = environments(3, ("cuda:1", "cpu", "cuda"))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in listed] == ["5", "", "2"]
    set_devices()
    assert environments(2) == [{}, {}]
    assert environments(1, ("cpu",)) == [{}]
    with pytest.raises(ObjectiveError, match="device: cuda:0 is not available; expected auto or one of cpu"):
        environments(1, ("cuda:0",))


IMPORTS_EARLY = """
import os

SEEN = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
import torch

from lcsc_opt.base.records import Evaluation
from tests.evaluation.staged_examples import Stages


class Early(Stages):
    def score(self, candidate, parts):
        threads = {"wanted": float(SEEN["OMP_NUM_THREADS"]), "used": torch.get_num_threads()}
        return Evaluation(float(SEEN["CUDA_VISIBLE_DEVICES"]), threads), [None]
"""


@pytest.mark.fresh_workers
def test_each_worker_has_its_own_device_and_its_share_of_the_cores_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imports_early.py").write_text(IMPORTS_EARLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    share = max(cores() // 2, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(share + 1))
    early = importlib.import_module("imports_early").Early
    devices = [{"CUDA_VISIBLE_DEVICES": number} for number in "37"]
    with contextlib.closing(WorkerPool(early, 2, environments=devices)) as pool:
        futures = [pool.submit("submit", candidate(1.0, 0.0, 0.0), worker=worker) for worker in (0, 1)]
        found = [evaluated(future) for future in futures]
    assert [one.loss for one in found] == [3.0, 7.0]
    assert [one.metrics for one in found] == 2 * [{"wanted": share, "used": share}]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1", "this process keeps its own"


def test_closing_while_a_gradient_is_scored_leaves_nobody_waiting() -> None:
    pool = WorkerPool(Stages, 2)
    objective = HeldScore()
    evaluator = SpreadEvaluator(objective, pool)
    future = evaluator.submit(candidate(1.0, 0.0, 0.0, gradient=True))
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
    (tmp_path / "marker").touch()
    monkeypatch.setenv("LCSC_TEST_MARKER", str(tmp_path / "marker"))
    asked = candidate(0.5, 0.75, -0.25, gradient=True)
    with contextlib.closing(WorkerPool(DiesOnce, 2)) as pool:
        evaluator = SpreadEvaluator(DiesOnce(), pool)
        first = failed(evaluator.submit(asked))
        assert_gradient(evaluated(evaluator.submit(asked)), asked)
        evaluator.close()
    assert first.retry
    assert "worker process died" in first.reason


def coordinator(folder: str) -> None:
    os.environ["LCSC_TEST_MARKER"] = str(Path(folder) / "samples")
    pool = WorkerPool(WritesItsProcess, 1)
    ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)).result()


def test_a_killed_coordinator_leaves_no_worker_behind(tmp_path: Path) -> None:
    process = forked(coordinator, str(tmp_path))
    process.start()
    wait_until(lambda: (tmp_path / "samples").exists() and (tmp_path / "samples").read_text())
    worker = int((tmp_path / "samples").read_text())
    process.kill()
    process.join()
    wait_until(lambda: not is_running(worker))


class OfWeights(Objective):
    """Merges in rows, and scores the sum of what it has merged."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    def evaluate(self, candidate: Candidate) -> Evaluation:
        assert self.trajectory is not None
        return Evaluation(sum(float(tensor.sum()) for tensor in self.trajectory.merge(candidate.coefficients).values()))

    def describe(self) -> dict[str, Any]:
        return {}


def test_candidates_are_evaluated_in_their_rows_whoever_has_merged_in_others_meanwhile(tmp_path: Path) -> None:
    """Pictures of another search's model are made by the same objective, in its rows."""
    objective = OfWeights(make_trajectory(tmp_path / "run.trajectory"))
    content = {"name": "e", "objective": {"file": "a.py"}, "optimizers": ["CMA"], "budget": {"evaluations": 9}}
    [spec] = searches_of([parse_study_file(content, source="test")])
    workers = Workers(objective, spec, BuildContext())

    def in_rows(rule: Rule) -> Candidate:
        assert objective.trajectory is not None
        groups = objective.trajectory.in_rows(rule).layer_groups
        assert groups is not None
        count = len(objective.steps)
        return Candidate(np.full((len(groups), count), 1 / count))

    rules: tuple[Rule, ...] = ("layers", "channels")
    for other in rules:
        for rule in rules:
            workers.use(spec, rule)
            objective.merge_in_rows(other)
            assert isinstance(workers.evaluate(in_rows(rule), rule), Evaluation)
    workers.close()
