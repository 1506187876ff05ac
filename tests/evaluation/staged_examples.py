"""An objective with stages whose loss is exact, and which says where and when each stage ran.

Worker processes import this file, so it imports neither torch nor pytest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.objective.contract import Samples, StagedObjective, stop_if_told

STEPS = (1, 2, 3)
IMAGES = 12


@dataclasses.dataclass(frozen=True)
class Part:
    """The sum over some images of what one image adds to the loss, and who computed it."""

    total: float
    images: int
    process: int
    environment: str | None


class Stages(StagedObjective):
    """The loss is the mean over images i of (a . (1, i, i^2))^2.

    Where the first coefficient is 7, 8 or 9, merging, sampling or scoring fails; 6 gives NaN; 5 kills the process.
    """

    steps, samples, overlaps = STEPS, Samples(per_evaluation=IMAGES), True

    def __init__(self) -> None:
        self.log: list[tuple[str, str, float, float]] = []
        self.kept: Candidate | None = None

    def describe(self) -> dict[str, Any]:
        return {"stages": True}

    def why_no_gradient(self) -> str | None:
        return None

    def images_of(self, candidate: Candidate) -> int:
        return IMAGES if candidate.images is None else candidate.images

    def prepare(self, candidate: Candidate) -> Coefficients:
        self._stage("merge", candidate, 7.0)
        return candidate.coefficients.copy()

    def sample(self, candidate: Candidate, prepared: Coefficients, first: int, last: int) -> Part:
        self._stage("sample", candidate, 8.0)
        if candidate.coefficients[0] == 5.0:
            os._exit(9)
        self.kept = candidate if candidate.gradient else None
        values = basis(first, last) @ prepared
        return Part(float(np.square(values).sum()), last - first, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"))

    def score(self, candidate: Candidate, parts: Sequence[Part]) -> tuple[Evaluation, list[Any]]:
        self._stage("score", candidate, 9.0)
        images = sum(part.images for part in parts)
        loss = float("nan") if candidate.coefficients[0] == 6.0 else sum(part.total for part in parts) / images
        places = {f"part {i}": float(part.process) for i, part in enumerate(parts)}
        back = [1.0 / images] * len(parts) if candidate.gradient else [None] * len(parts)
        return Evaluation(loss, places, Cost(images=images)), back

    def vjp(self, candidate: Candidate, first: int, last: int, back: float) -> tuple[Coefficients, Cost]:
        assert self.kept is not None
        assert self.kept.coefficients.tobytes() == candidate.coefficients.tobytes()
        rows = basis(first, last)
        return 2.0 * back * rows.T @ (rows @ candidate.coefficients), Cost(model_calls=last - first)

    def _stage(self, name: str, candidate: Candidate, fails: float) -> None:
        start = time.perf_counter()
        self.log.append((name, threading.current_thread().name, start, time.perf_counter()))
        if candidate.coefficients[0] == fails:
            raise RuntimeError(f"cannot {name}")


class Overlapping(Stages):
    """The first sampling waits until the second candidate is merged, the first scoring until the second is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.merged, self.sampled = threading.Event(), threading.Event()
        self.met: set[str] = set()

    def _stage(self, name: str, candidate: Candidate, fails: float) -> None:
        earlier = sum(done == name for done, *_ in self.log)
        if name == "sample" and not earlier and self.merged.wait(120):
            self.met.add("merge")
        if name == "score" and not earlier and self.sampled.wait(120):
            self.met.add("score")
        super()._stage(name, candidate, fails)
        if earlier == 1:
            {"merge": self.merged, "sample": self.sampled, "score": threading.Event()}[name].set()


SLOW_SECONDS = 300.0


class Slow(Stages):
    """Samples for minutes, but in steps that Python sees; in worker processes a file says that it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.has_sampled = threading.Event()

    def _stage(self, name: str, candidate: Candidate, fails: float) -> None:
        if name == "sample":
            self.has_sampled.set()
            if "LCSC_TEST_MARKER" in os.environ:
                Path(os.environ["LCSC_TEST_MARKER"]).touch()
            for _ in range(int(SLOW_SECONDS / 0.01)):
                stop_if_told()
                time.sleep(0.01)


class WritesItsProcess(Slow):
    """Writes its process into the marker, and samples for minutes without a look at the stop flag."""

    def _stage(self, name: str, candidate: Candidate, fails: float) -> None:
        if name == "sample":
            Path(os.environ["LCSC_TEST_MARKER"]).write_text(str(os.getpid()))
            time.sleep(SLOW_SECONDS)


class HeldScore(Stages):
    """MetricSuite until it is told to end."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.ends = threading.Event(), threading.Event()

    def _stage(self, name: str, candidate: Candidate, fails: float) -> None:
        if name == "score":
            self.scores.set()
            assert self.ends.wait(120)


class DiesOnce(Stages):
    """The process that samples with a gradient dies before its product, once for each file that is there."""

    def vjp(self, candidate: Candidate, first: int, last: int, back: float) -> tuple[Coefficients, Cost]:
        with contextlib.suppress(FileNotFoundError):
            Path(os.environ["LCSC_TEST_MARKER"]).unlink()  # which one process can
            os._exit(9)
        self.kept = candidate  # as an objective does that samples again
        return super().vjp(candidate, first, last, back)


class Counted(Stages):
    """Counts the samples of all processes; that with a number in ``dies`` kills its process.

    Samples again what another process has sampled.
    """

    def __init__(self, log: str = "", dies: Sequence[int] = ()) -> None:
        super().__init__()
        self.log_file, self.dies = log, dies

    def sample(self, candidate: Candidate, prepared: Coefficients, first: int, last: int) -> Part:
        if self.log_file and self._count() in self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(candidate, prepared, first, last)

    def _count(self) -> int:
        with Path(self.log_file).open("ab", buffering=0) as file:
            file.write(b".")
            return file.tell()  # where this sample's byte ends, whatever others have written since

    def vjp(self, candidate: Candidate, first: int, last: int, back: float) -> tuple[Coefficients, Cost]:
        self.kept = candidate
        return super().vjp(candidate, first, last, back)


def basis(first: int, last: int) -> np.ndarray:
    """``[n, 3]``: (1, i, i^2) of each image."""
    index = np.arange(first, last, dtype=np.float64) / IMAGES
    return np.stack([np.ones_like(index), index, index**2], axis=1)


def cannot_be_made(error: Exception) -> None:
    raise error


class Unreadable:
    """Raises an error where it is unpickled."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return cannot_be_made, (self.error,)


def fails_to_load() -> Stages:
    raise StudySpecError("no such file: put it back")


class OddError(StudySpecError):
    """Can be pickled, and not unpickled."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def fails_to_load_oddly() -> Stages:
    raise OddError("no number", "settings")


class UnreadableLoad(Unreadable):
    """What loads an objective, and cannot be unpickled."""

    def __call__(self) -> Stages:
        return Stages()


def dies_while_loading() -> Stages:
    os._exit(7)


def expect_no_lost_node() -> None:
    """In a process that has not imported Ray yet: when a worker dies, its node is there, so hardly wait for its end."""
    from lcsc_opt.evaluation import ray

    ray._NODE_SECONDS = 0.1


def candidate(*coefficients: float, images: int | None = None, gradient: bool = False) -> Candidate:
    return Candidate(np.array(coefficients), images=images, gradient=gradient)


def evaluated(future: Future[Outcome]) -> Evaluation:
    outcome = future.result(timeout=120)
    assert isinstance(outcome, Evaluation), outcome
    return outcome


def failed(future: Future[Outcome]) -> Failure:
    outcome = future.result(timeout=120)
    assert isinstance(outcome, Failure), outcome
    return outcome


def assert_gradient(found: Evaluation, asked: Candidate) -> None:
    """It is that of the objective in one process."""
    expected = Stages().evaluate(asked).gradient
    assert found.gradient is not None
    assert expected is not None
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-12)


def study_file(folder: Path, **changes: Any) -> str:
    """A study of CMA over ``stages.py``, six evaluations long; its path."""
    content: dict[str, Any] = {
        "name": "e",
        "objective": {"file": "stages.py"},
        "optimizers": ["CMA"],
        "budget": {"evaluations": 6},
        "storage": "sqlite:///e.db",
    }
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return str(path)


def is_running(process: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
