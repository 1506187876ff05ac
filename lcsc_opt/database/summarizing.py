"""Keeps the summary of a study while it is searched."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.database.history import TRIAL, in_tell_order
from lcsc_opt.database.rows import name_of_loss, trial_rows
from lcsc_opt.database.states import compared_trials
from lcsc_opt.database.summary import Summary

MOST_TRIALS = 25  # that have ended since the summary was written
MOST_SECONDS = 10.0
_OF_CANDIDATE = ("images", "attempts")  # attributes that a trial has before it ends, and that its row shows


class Summarizer:
    """The summary of a study whose trials are added as they end.

    Args:
        trials: all that are stored, with losses as values, without forgotten ones.
        forgotten: the numbers of those.
    """

    def __init__(self, trials: Sequence[FrozenTrial], forgotten: Collection[int]) -> None:
        self._forgotten = frozenset(forgotten)
        self._rows: dict[int, Any] = {}  # number → one row; of trials that have ended
        self._begun: dict[int, tuple[float, Mapping[str, Any]]] = {}  # number → its start and its attributes
        ended = [trial for trial in trials if trial.state.is_finished()]
        for row in trial_rows(ended):
            self._rows[int(row["number"])] = row
        for trial in trials:
            if not trial.state.is_finished():
                started = time.time() if trial.datetime_start is None else trial.datetime_start.timestamp()
                self._begun[trial.number] = (started, _shown_attributes(trial.user_attrs))
        best = min(compared_trials(trials), key=lambda trial: (trial.value, trial.number), default=None)
        self._lowest = np.inf
        self._metric = "loss"
        if best is not None and best.value is not None:
            self._lowest = best.value
            self._metric = name_of_loss(best.user_attrs.get("metrics") or {}, best.value)
        self._covers = 0
        self._written_at = time.monotonic()
        self._ended_since = 0

    def begin(self, number: int, attributes: Mapping[str, Any]) -> None:
        """A trial begins, with the attributes of its candidate."""
        self._begun[number] = (time.time(), _shown_attributes(attributes))

    def note_attempts(self, number: int, attempts: Sequence[Mapping[str, Any]]) -> None:
        """A trial is evaluated again after failed attempts."""
        started, candidate = self._begun[number]
        self._begun[number] = (started, {**candidate, "attempts": attempts})

    def end(
        self,
        number: int,
        state: TrialState,
        value: float | None,
        attributes: Mapping[str, Any],
    ) -> None:
        """A trial has ended.

        Args:
            number: of the trial.
            state: how it has ended.
            value: its loss, also where a score is maximized; ``None`` if it has failed.
            attributes: of its result.
        """
        started, candidate = self._begun.pop(number)
        trial = create_trial(state=state, value=value, user_attrs={**candidate, **attributes})
        trial.number = number
        [row] = trial_rows([trial])
        row["started"] = started
        row["ended"] = time.time()
        self._rows[number] = row
        self._ended_since += 1
        if state == TrialState.COMPLETE and value is not None and value < self._lowest:
            self._lowest = value
            self._metric = name_of_loss(attributes.get("metrics") or {}, value)

    @property
    def has_news(self) -> bool:
        """Whether a trial has ended since :meth:`write`."""
        return self._ended_since > 0

    @property
    def is_due(self) -> bool:
        """Whether the summary should be written now."""
        is_late = time.monotonic() - self._written_at >= MOST_SECONDS
        return self._ended_since >= MOST_TRIALS or (self.has_news and is_late)

    def write(self) -> dict[str, Any]:
        """The summary as it is to be stored now."""
        while self._covers in self._rows or self._covers in self._forgotten:
            self._covers += 1
        self._written_at = time.monotonic()
        self._ended_since = 0
        rows = [row for number, row in self._rows.items() if number < self._covers]
        summary = Summary.of(in_tell_order(np.array(rows, dtype=TRIAL)))
        summary = dataclasses.replace(summary, covers=self._covers, forgotten=len(self._forgotten), metric=self._metric)
        return summary.to_json()


def _shown_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial that has not ended that its row will show."""
    return {name: attributes[name] for name in _OF_CANDIDATE if name in attributes}
