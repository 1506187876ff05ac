"""What lists, rankings and curves show of a search: totals, the best trial, and how its best loss fell.

The process that runs a study stores this as one attribute when its search ends or is interrupted, so that nobody reads
all trials of a study to print one line about it. The attribute is taken away before a trial is written: while a search
runs, and after a kill, there is none, and readers make it from the trials.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.records import Cost, as_json, metric_of_loss
from lcsc_opt.database.states import SUCCEEDED

SUMMARY = "summary"  # the attribute of a study


class Improvement(NamedTuple):
    """A trial with a lower loss than all before it, and what the search had spent when it was told of it."""

    number: int
    evaluations: int
    images: int
    model_calls: int
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
        charged_images: images of trials; a failed one is charged those that it had asked for, and if it named no
            number, as many as the largest trial whose loss compares.
        cost: of all trials.
        metric: which one the loss is; ``loss`` if it is none.
        improvements: in the order in which the optimizer was told of them.
    """

    trials: int = 0
    evaluations: int = 0
    failed: int = 0
    retried: int = 0
    charged_images: int = 0
    cost: Cost = dataclasses.field(default_factory=Cost)
    metric: str = "loss"
    improvements: tuple[Improvement, ...] = ()

    @classmethod
    def stored(cls, attributes: Mapping[str, Any]) -> Summary | None:
        """The summary among the attributes of a study; ``None`` if there is none, or only one of another version."""
        stored = attributes.get(SUMMARY)
        if stored is None or stored.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        improvements = tuple(Improvement(*values) for values in stored["improvements"])
        return cls(**{**stored, "cost": Cost(**stored["cost"]), "improvements": improvements})

    def to_json(self) -> dict[str, Any]:
        """The attribute :data:`SUMMARY`."""
        stored: dict[str, Any] = as_json(dataclasses.asdict(self))
        return stored

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> Summary:
        """The summary of trials by number, the order in which the optimizer was told of them; values are losses."""
        ended = [trial for trial in trials if trial.state.is_finished()]
        failed = [trial for trial in ended if trial.state == TrialState.FAIL]
        total = Cost()
        lowest = math.inf
        most_images = 0  # of a trial whose loss compares
        metric = "loss"
        improvements = []
        for evaluations, trial in enumerate(ended, start=1):
            cost = cost_of(trial)
            total += cost
            if trial.state != TrialState.COMPLETE or trial.value is None:
                continue
            most_images = max(most_images, cost.images)
            if trial.value < lowest:
                lowest = trial.value
                metric = _metric_of_loss(trial.user_attrs.get("metrics") or {}, lowest)
                spent = (total.images, total.model_calls, total.seconds)
                improvements.append(Improvement(trial.number, evaluations, *spent, lowest))
        # what a failed trial has sampled is not known: it counts as what it asked for, else as the largest one
        charged_images = total.images + sum(trial.user_attrs.get("images") or most_images for trial in failed)
        return cls(
            trials=len(trials),
            evaluations=len(ended),
            failed=len(failed),
            retried=sum(trial.state in SUCCEEDED and bool(trial.user_attrs.get("attempts")) for trial in ended),
            charged_images=charged_images,
            cost=total,
            metric=metric,
            improvements=tuple(improvements),
        )

    @property
    def best(self) -> int | None:
        """The number of the trial with the lowest loss that compares, of equal ones the first; ``None`` without one."""
        if self.improvements:
            return self.improvements[-1].number
        return None

    @property
    def loss(self) -> float | None:
        """The loss of the trial :attr:`best`; ``None`` without one."""
        if self.improvements:
            return self.improvements[-1].loss
        return None


def cost_of(trial: FrozenTrial) -> Cost:
    """What a trial cost, as far as that is known."""
    return Cost(**trial.user_attrs.get("cost", {}))


def _metric_of_loss(metrics: Mapping[str, float], loss: float) -> str:
    """The metric that a loss is; ``loss`` if it is none.

    For a maximized score the loss is the metric times −1, so it is none.
    """
    name = metric_of_loss(metrics, loss)
    # a function's metric "loss" has the function's name before it
    if name is None or metrics[name] != loss or name.endswith(".loss"):
        return "loss"
    return name
