"""From measured seconds to a profile: where the time of a trial goes, and how near each part is to its limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lcsc_opt.base.spans import ASK, DATABASE, EVALUATE, FEATURES, MERGE, OF_EVALUATION, SAMPLE, TELL
from lcsc_opt.diagnostics.profiling.trials import TrialTimes

OPTIMIZER, OTHER = "optimizer", "other"
Unit = Literal["GB/s", "GFLOP/s"]
UNITS: Mapping[str, Unit] = {MERGE: "GB/s", SAMPLE: "GFLOP/s", FEATURES: "GFLOP/s"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a trial.

    Attributes:
        name: merge, sample, features, metric, or evaluate where an objective has no such parts; optimizer, database,
            other.
        seconds: of an average trial.
        share: of the trial's wall-clock time; where parts overlap, their shares add up to more than one.
        rate: bytes or operations per second that it reaches, where these are known.
        limit: what the machine reaches at best.
    """

    name: str
    seconds: float
    share: float
    rate: float | None = None
    limit: float | None = None

    @property
    def unit(self) -> Unit | None:
        """The unit in which rate and limit are shown; their values are in bytes or operations per second."""
        return UNITS.get(self.name)

    @property
    def reached(self) -> float | None:
        """The share of the limit."""
        return None if self.rate is None or not self.limit else self.rate / self.limit

    def as_row(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "unit": self.unit, "reached": self.reached}


@dataclasses.dataclass(frozen=True)
class Work:
    """The bytes and operations of an average trial, and how many of them the machine can do per second.

    A number is ``None`` where it is not known.
    """

    merge_bytes: float | None = None
    sample_operations: float | None = None
    features_operations: float | None = None
    read_rate: float | None = None
    sample_rate: float | None = None
    features_rate: float | None = None

    def of(self, part: str) -> tuple[float | None, float | None]:
        """The work of a part, and how much of such work the machine does in a second at best."""
        if part == MERGE:
            return self.merge_bytes, self.read_rate
        if part == SAMPLE:
            return self.sample_operations, self.sample_rate
        return (self.features_operations, self.features_rate) if part == FEATURES else (None, None)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a study's trials goes.

    Attributes:
        study: which one.
        trials: how many were measured.
        failed: how many of these failed.
        seconds: of an average trial.
        parts: in the order in which a trial goes through them.
        images: of an average trial.
        memory_bytes: the most that the process had.
        device_bytes: the most that torch had on the GPU; ``None`` where there is none.
        evaluations: the study's budget.
        studies: how many such studies the study file stands for.
        device: where it samples, for people; ``this machine`` where that is not known.
        advice: what would make it faster.
    """

    study: str
    trials: int
    failed: int
    seconds: float
    parts: tuple[Part, ...]
    images: float
    memory_bytes: int
    device_bytes: int | None
    evaluations: int
    studies: int
    device: str
    advice: str = ""

    @property
    def budget_seconds(self) -> float:
        """How long the budget takes with one worker, at this speed."""
        return self.evaluations * self.seconds

    @property
    def images_per_second(self) -> float | None:
        """The images per second of the whole trial; ``None`` where there are no images."""
        return self.images / self.seconds if self.images else None

    @property
    def overlapped(self) -> float:
        """The share of a trial in which one part ran beside another."""
        return max(sum(part.share for part in self.parts) - 1.0, 0.0)

    def as_row(self) -> dict[str, Any]:
        """JSON-able."""
        derived = {
            "budget_seconds": self.budget_seconds,
            "images_per_second": self.images_per_second,
            "overlapped": self.overlapped,
        }
        return {**dataclasses.asdict(self), **derived, "parts": [part.as_row() for part in self.parts]}


def divide(times: TrialTimes, work: Work) -> tuple[Part, ...]:
    """The parts of an average trial; what no part accounts for is ``other``."""
    of_evaluation = {name: times.cost[f"{name}_seconds"] for name in OF_EVALUATION}
    if not any(of_evaluation.values()):
        of_evaluation = {EVALUATE: times.spans.get(EVALUATE, 0.0)}
    seconds = {
        **of_evaluation,
        OPTIMIZER: times.spans.get(ASK, 0.0) + times.spans.get(TELL, 0.0),
        DATABASE: times.spans.get(DATABASE, 0.0),
    }
    seconds[OTHER] = max(times.seconds - sum(seconds.values()), 0.0)
    return tuple(_part(name, spent, times.seconds, work) for name, spent in seconds.items())


def _part(name: str, seconds: float, trial: float, work: Work) -> Part:
    done, limit = work.of(name)
    rate = done / seconds if done and seconds else None
    return Part(name, seconds, seconds / trial, rate, limit if rate is not None else None)
