"""What lists, rankings and curves show of a search: totals, the best trial, and how its best loss fell.

The process that runs a study stores this as one attribute when its search ends or is interrupted, so that nobody reads
all trials of a study to print one line about it. The attribute is taken away before a trial is written: while a search
runs, and after a kill, there is none, and readers make it from the trials.
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
PARTS = ("merge_seconds", "sample_seconds", "features_seconds", "metric_seconds")  # of an evaluation

Floats = npt.NDArray[np.float64]
Trials = npt.NDArray[np.void]


class Improvement(NamedTuple):
    """A trial with a lower loss than all before it, and what the search had spent when it was told of it."""

    number: int
    evaluations: float
    images: float
    model_calls: float
    seconds: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The totals of a search, failed trials included, and the course of its best loss.

    Attributes:
        trials: how many there are, also those that have not ended.
        evaluations: trials that have ended.
        failed: trials that failed.
        retried: trials with a loss that had failed before.
        compared: trials whose loss compares.
        with_loss: trials with a loss, whether it compares or not.
        images: how many were sampled.
        charged_images: images of trials; a failed one is charged those that it had asked for, and if it named no
            number, as many as the largest trial whose loss compares.
        model_calls: how many were made.
        seconds: spent in evaluations.
        part_seconds: spent in each of :data:`PARTS` by trials with a loss.
        metric: what the loss is called.
        improvements: in the order in which the optimizer was told of them.
    """

    trials: int = 0
    evaluations: int = 0
    failed: int = 0
    retried: int = 0
    compared: int = 0
    with_loss: int = 0
    images: float = 0.0
    charged_images: float = 0.0
    model_calls: float = 0.0
    seconds: float = 0.0
    part_seconds: tuple[float, ...] = (0.0,) * len(PARTS)
    metric: str = "loss"
    improvements: tuple[Improvement, ...] = ()

    @classmethod
    def stored(cls, attributes: Mapping[str, Any]) -> Summary | None:
        """The summary among the attributes of a study; ``None`` if there is none, or only one of another version."""
        stored = attributes.get(SUMMARY)
        if stored is None or stored.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        return _SUMMARY.validate_python(stored)

    def to_json(self) -> dict[str, Any]:
        """The attribute :data:`SUMMARY`."""
        stored: dict[str, Any] = _SUMMARY.dump_python(self, mode="json")
        return stored

    @classmethod
    def of(cls, trials: Trials, *, metric: str = "loss") -> Summary:
        """The summary of trials by number, the order in which the optimizer was told of them."""
        ended = trials[is_finished(trials)]
        is_failed = ended["state"] == TrialState.FAIL.value
        has_loss = ~np.isnan(ended["loss"])
        losses = compared_losses(ended)
        is_compared = ~np.isnan(losses)
        largest_images = ended["images"][is_compared].max(initial=0.0)
        asked_images = np.where(ended["asked"] == 0, largest_images, ended["asked"])
        charged_images = np.where(is_failed, asked_images, ended["images"])
        return cls(
            trials=len(trials),
            evaluations=len(ended),
            failed=int(is_failed.sum()),
            retried=int(ended["retried"].sum()),
            compared=int(is_compared.sum()),
            with_loss=int(has_loss.sum()),
            images=float(ended["images"].sum()),
            charged_images=float(charged_images.sum()),
            model_calls=float(ended["model_calls"].sum()),
            seconds=float(ended["seconds"].sum()),
            part_seconds=tuple(float(ended[part][has_loss].sum()) for part in PARTS),
            metric=metric,
            improvements=tuple(_improvements(ended, losses)),
        )

    @property
    def best(self) -> int | None:
        """The number of the trial with the lowest loss that compares, of equal ones the first; ``None`` without one."""
        if self.improvements:
            return self.improvements[-1].number
        return None

    @property
    def loss(self) -> float | None:
        """The loss of that trial."""
        if self.improvements:
            return self.improvements[-1].loss
        return None


def _improvements(trials: Trials, losses: Floats) -> list[Improvement]:
    images = np.cumsum(trials["images"])
    model_calls = np.cumsum(trials["model_calls"])
    seconds = np.cumsum(trials["seconds"])
    return [
        Improvement(
            number=int(trials["number"][index]),
            evaluations=float(index + 1),
            images=float(images[index]),
            model_calls=float(model_calls[index]),
            seconds=float(seconds[index]),
            loss=float(losses[index]),
        )
        for index in improvements(losses)
    ]


_SUMMARY = pydantic.TypeAdapter(Summary)


def is_finished(trials: Trials) -> npt.NDArray[np.bool_]:
    """``[n]``, whether each trial has ended."""
    unfinished = [state.value for state in TrialState if not state.is_finished()]
    return ~np.isin(trials["state"], unfinished)


def compared_losses(trials: Trials) -> Floats:
    """``[n]``, the loss of each trial; NaN where it does not compare with others."""
    return np.where(trials["state"] == TrialState.COMPLETE.value, trials["loss"], np.nan)


def improvements(losses: Floats) -> npt.NDArray[np.intp]:
    """The indices at which a loss is lower than all before it; NaN is not."""
    lowest_before = np.fmin.accumulate(np.concatenate([[np.inf], losses]))[:-1]
    return np.flatnonzero(losses < lowest_before)
