"""What lists, rankings and curves show of a search: totals, the best trial, and how its best loss fell.

The process that runs a study stores this as one attribute, now and then. A reader adds the few trials that ended since,
so nobody reads all trials of a study to print one line about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydantic
from optuna.trial import TrialState

SUMMARY = "summary"  # the attribute of a study
SHORTEST_INTERRUPTION = 30.0  # seconds without an evaluation
PARTS = ("merge_seconds", "sample_seconds", "features_seconds", "metric_seconds")  # of an evaluation

Floats = npt.NDArray[np.float64]
Trials = npt.NDArray[np.void]


class Improvement(NamedTuple):
    """A trial with a lower loss than all before it, and what the search had spent when it was told of it."""

    number: int
    evaluations: float
    images: float
    model_calls: float
    evaluation_seconds: float
    loss: float


class TimedImprovement(NamedTuple):
    """A lower loss than all before it, and for how many seconds the search had run then."""

    seconds: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The totals of a search, failed trials included, and the course of its best loss.

    Attributes:
        covers: how many trials it is of: the first ones by number, all of which have ended.
        forgotten: how many trials of the study were forgotten when it was made; they count nowhere else.
        trials: those that it is of and that are not forgotten; for a reader also those that have not ended.
        evaluations: trials that have ended.
        failed: trials that failed.
        images: how many were sampled.
        model_calls: how many were made.
        seconds: spent in evaluations.
        charged_images: images of trials, and those that failed ones had asked for.
        uncharged_failures: failed ones that named no number of images; each is charged ``largest_images``.
        largest_images: the most images of a trial whose loss compares.
        compared: trials whose loss compares.
        with_loss: trials with a loss, whether it compares or not.
        part_seconds: spent in each of :data:`PARTS` by trials with a loss.
        waited_seconds: between the asks of all trials and their results, outside of evaluations and interruptions.
        retried: the numbers of the trials with a loss that had failed before.
        best: the number of the trial with the lowest loss that compares; of equal ones the earlier.
        loss: of that trial.
        metric: what this loss is called.
        run_seconds: for how long the search had run at ``busy_until``, without interruptions; where workers were told
            out of order, a summary that was continued may be some seconds longer than one of all trials.
        busy_until: when the last trial ended, in seconds since 1970; ``None`` without trials.
        longest_pause: seconds without an evaluation after which the search counts as interrupted.
        improvements: in the order in which the optimizer was told of them.
        timed_improvements: in the order in which they ended.
    """

    covers: int = 0
    forgotten: int = 0
    trials: int = 0
    evaluations: int = 0
    failed: int = 0
    images: float = 0.0
    model_calls: float = 0.0
    seconds: float = 0.0
    charged_images: float = 0.0
    uncharged_failures: int = 0
    largest_images: float = 0.0
    compared: int = 0
    with_loss: int = 0
    part_seconds: tuple[float, ...] = (0.0,) * len(PARTS)
    waited_seconds: float = 0.0
    retried: tuple[int, ...] = ()
    best: int | None = None
    loss: float | None = None
    metric: str = "loss"
    run_seconds: float = 0.0
    busy_until: float | None = None
    longest_pause: float = SHORTEST_INTERRUPTION
    improvements: tuple[Improvement, ...] = ()
    timed_improvements: tuple[TimedImprovement, ...] = ()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Summary:
        """The attribute :data:`SUMMARY`.

        Raises:
            TypeError: it is ``None``, or has other fields, as that of an earlier or later version.
        """
        if not isinstance(stored, Mapping) or stored.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise TypeError("the summary has other fields")
        return _SUMMARY.validate_python(stored)

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        stored: dict[str, Any] = _SUMMARY.dump_python(self, mode="json")
        return stored

    @classmethod
    def of(cls, trials: Trials, *, unfinished: int = 0) -> Summary:
        """The summary of trials that have ended, in the order in which the optimizer was told of them."""
        return cls(longest_pause=longest_pause(trials)).extended(trials, unfinished=unfinished)

    def extended(self, trials: Trials, *, unfinished: int = 0) -> Summary:
        """The summary with further trials.

        The course of the best loss is exact where the optimizer was told of all of them after those before.

        Args:
            trials: those that have ended, in the order in which the optimizer was told of them.
            unfinished: how many others there are.
        """
        if not len(trials):
            return dataclasses.replace(self, trials=self.trials + unfinished)
        is_complete = trials["state"] == TrialState.COMPLETE.value
        is_failed = trials["state"] == TrialState.FAIL.value
        losses = np.where(is_complete, trials["loss"], np.nan)
        has_loss = ~np.isnan(trials["loss"])
        names_no_images = is_failed & (trials["asked"] == 0)
        charged = np.where(is_failed, trials["asked"], trials["images"])
        best, loss = self._best_with(trials["number"], losses)
        clock = self._clock_with(trials)
        return dataclasses.replace(
            self,
            trials=self.trials + len(trials) + unfinished,
            evaluations=self.evaluations + len(trials),
            failed=self.failed + int(is_failed.sum()),
            images=self.images + float(trials["images"].sum()),
            model_calls=self.model_calls + float(trials["model_calls"].sum()),
            seconds=self.seconds + float(trials["seconds"].sum()),
            charged_images=self.charged_images + float(charged[~names_no_images].sum()),
            uncharged_failures=self.uncharged_failures + int(names_no_images.sum()),
            largest_images=float(trials["images"][~np.isnan(losses)].max(initial=self.largest_images)),
            compared=self.compared + int(np.count_nonzero(~np.isnan(losses))),
            with_loss=self.with_loss + int(has_loss.sum()),
            part_seconds=tuple(
                seconds + float(trials[part][has_loss].sum())
                for part, seconds in zip(PARTS, self.part_seconds, strict=True)
            ),
            waited_seconds=self.waited_seconds + self._newly_waited_seconds(trials),
            retried=(*self.retried, *trials["number"][trials["retried"]].tolist()),
            best=best,
            loss=loss,
            run_seconds=max(self.run_seconds, float(clock.max())),
            busy_until=float(np.nanmax(trials["ended"], initial=self.busy_until or 0.0)),
            improvements=(*self.improvements, *self._new_improvements(trials, losses)),
            timed_improvements=(*self.timed_improvements, *self._new_timed_improvements(clock, losses)),
        )

    def _newly_waited_seconds(self, trials: Trials) -> float:
        """The part of ``waited_seconds`` that these trials add."""
        waited = np.nan_to_num(trials["ended"] - trials["started"] - trials["seconds"])
        is_counted = (waited > 0) & (waited <= self.longest_pause)
        return float(waited[is_counted].sum())

    def _best_with(self, numbers: npt.NDArray[np.int64], losses: Floats) -> tuple[int | None, float | None]:
        """The number and the loss of the best trial, of those before and these; both ``None`` without a loss."""
        candidates: list[tuple[float, int]] = []
        if not np.isnan(losses).all():
            lowest = np.nanmin(losses)
            candidates.append((float(lowest), int(numbers[losses == lowest].min())))
        if self.best is not None and self.loss is not None:
            candidates.append((self.loss, self.best))
        if not candidates:
            return None, None
        loss, number = min(candidates)
        return number, loss

    def _new_improvements(self, trials: Trials, losses: Floats) -> list[Improvement]:
        evaluations = self.evaluations + np.arange(1, len(trials) + 1, dtype=np.float64)
        images = self.images + np.cumsum(trials["images"])
        model_calls = self.model_calls + np.cumsum(trials["model_calls"])
        seconds = self.seconds + np.cumsum(trials["seconds"])
        lowest = self.improvements[-1].loss if self.improvements else np.inf
        return [
            Improvement(
                number=int(trials["number"][index]),
                evaluations=float(evaluations[index]),
                images=float(images[index]),
                model_calls=float(model_calls[index]),
                evaluation_seconds=float(seconds[index]),
                loss=float(losses[index]),
            )
            for index in improvements(losses, below=lowest)
        ]

    def _new_timed_improvements(self, clock: Floats, losses: Floats) -> list[TimedImprovement]:
        lowest = self.timed_improvements[-1].loss if self.timed_improvements else np.inf
        order = np.argsort(clock, kind="stable")  # with several workers not the order of the tells
        points = []
        for index in improvements(losses[order], below=lowest):
            place = order[index]
            points.append(TimedImprovement(float(clock[place]), float(losses[place])))
        return points

    def _clock_with(self, trials: Trials) -> Floats:
        """``[n]`` seconds for which the search had run when each of these trials ended."""
        if self.busy_until is None:
            return wall_clock(trials, self.longest_pause)
        earlier = np.zeros(1, dtype=trials.dtype)  # one trial that took as long as all those before
        earlier["started"] = self.busy_until - self.run_seconds
        earlier["ended"] = self.busy_until
        earlier["seconds"] = self.run_seconds
        return wall_clock(np.concatenate([earlier, trials]), self.longest_pause)[1:]


_SUMMARY = pydantic.TypeAdapter(Summary)


def improvements(losses: Floats, *, below: float = np.inf) -> npt.NDArray[np.intp]:
    """The indices at which a loss is lower than ``below`` and all before it; NaN is not."""
    lowest_before = np.fmin.accumulate(np.concatenate([[below], losses]))[:-1]
    return np.flatnonzero(losses < lowest_before)


def wall_clock(trials: Trials, pause: float | None = None) -> Floats:
    """``[n]`` seconds for which the search had run when each trial ended.

    A pause between evaluations is the time of the optimizer and the database, and counts. One that is longer than
    ``pause`` is an interruption of the search, and none of it counts. A trial that was interrupted and evaluated again
    counts with its last evaluation only.

    Args:
        trials: that have ended; one without a time counts as the last.
        pause: the longest one that is no interruption; ``None`` for :func:`longest_pause` of these trials.
    """
    if not len(trials):
        return np.zeros(0)
    if pause is None:
        pause = longest_pause(trials)
    ended = np.where(np.isnan(trials["ended"]), np.nanmax(trials["ended"], initial=0.0), trials["ended"])
    began = np.fmax(trials["started"], ended - trials["seconds"])
    order = np.argsort(began, kind="stable")
    busy_until = np.maximum.accumulate(ended[order])
    idle = began[order][1:] - busy_until[:-1]
    interruptions = np.where(idle > pause, idle, 0.0)
    interrupted = np.concatenate([[0.0], np.cumsum(interruptions)])  # seconds until each trial began, in this order
    place = np.empty(len(trials), dtype=np.int64)  # of each trial, in the order of ``began``
    place[order] = np.arange(len(trials))
    return np.asarray(ended - began[order[0]] - interrupted[place])


def longest_pause(trials: Trials) -> float:
    """Seconds without an evaluation after which a search of these trials counts as interrupted."""
    if not len(trials):
        return SHORTEST_INTERRUPTION
    return max(SHORTEST_INTERRUPTION, 3 * float(np.median(trials["seconds"])))
