"""The answer that a search would have given if it had been stopped after so many images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.database.summary import cost_of


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best trial within a number of images, and the whole cost until then.

    Attributes:
        limit: images after which the search is stopped.
        trial: the number of the trial with the lowest loss of those that compare; -1 if that is not known any more.
        images: that had been sampled until then, at most ``limit``.
        model_calls: that had been made until then.
        seconds: the sum over all evaluations until then, on one core.
        searched: the trial's loss on the search's noise.
    """

    limit: int
    trial: int
    images: int
    model_calls: int
    seconds: float
    searched: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """An answer on noise that the search never saw: FID in the features of the search, and in others."""

    answer: Answer
    held_out: float
    cross_check: float | None


def answers(trials: Sequence[FrozenTrial], limits: Sequence[int]) -> list[Answer]:
    """An answer for each limit, up to the first that holds the whole search; none for limits before the first answer.

    Args:
        trials: of the study, in the order of tells.
        limits: increasing numbers of images.
    """
    trials = [trial for trial in trials if trial.state.is_finished()]
    losses = np.array([trial.value if trial.state == TrialState.COMPLETE else np.nan for trial in trials])
    costs = [cost_of(trial) for trial in trials]
    images, calls = (np.cumsum([getattr(cost, name) for cost in costs]) for name in ("images", "model_calls"))
    seconds = np.cumsum([cost.seconds for cost in costs])
    found: list[Answer] = []
    for limit in limits:
        within = int(np.searchsorted(images, limit, side="right"))
        known = losses[:within]
        if within and not np.isnan(known).all():
            best, last = int(np.nanargmin(known)), within - 1
            found.append(
                Answer(
                    limit=limit,
                    trial=trials[best].number,
                    images=int(images[last]),
                    model_calls=int(calls[last]),
                    seconds=float(seconds[last]),
                    searched=float(known[best]),
                )
            )
        if within == len(trials):
            break
    return found


def from_table(rows: Sequence[Sequence[str]]) -> dict[int, list[Measured]]:
    """Seed → the answers of rows of ``results/optimizers.csv``, each from its column ``seed`` on."""
    found: dict[int, list[Measured]] = {}
    for seed, limit, images, calls, seconds, searched, held_out, cross_check in rows:
        answer = Answer(int(limit), -1, int(images), int(calls), float(seconds), float(searched))
        known = Measured(answer, float(held_out), float(cross_check) if cross_check else None)
        found.setdefault(int(seed), []).append(known)
    return found


def measured(found: Sequence[Answer], known: Mapping[str, Mapping[str, Any]]) -> list[Measured] | None:
    """Answers with the measurements of their trials on held-out noise; ``None`` while one of them is not measured.

    Args:
        found: of one study.
        known: number of the trial → ``loss``, and ``cross_check`` or ``None``.
    """
    if any(str(answer.trial) not in known for answer in found):
        return None
    results = [known[str(answer.trial)] for answer in found]
    return [
        Measured(answer, float(result["loss"]), result["cross_check"])
        for answer, result in zip(found, results, strict=True)
    ]
