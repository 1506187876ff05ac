"""The caller's functions that are called after each trial, as those of Optuna's ``study.optimize(callbacks=…)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial

from lcsc_opt.database.store import StoredStudy

TrialCallback = Callable[[optuna.Study, FrozenTrial], object]


class _SearchedStudy(optuna.Study):
    """A study as callbacks get it. Optuna's own ``stop`` knows only the loop of ``optimize``."""

    is_stopped = False

    def stop(self) -> None:
        """End the search after the trials that are running."""
        self.is_stopped = True


class TrialCallbacks:
    """Calls functions with Optuna's signature, one after the other, in the process that runs the search.

    Args:
        functions: called with the study and a copy of the trial.
        study: whose trials they are called after.
    """

    def __init__(self, functions: Sequence[TrialCallback], study: StoredStudy) -> None:
        self._functions = functions
        self._stored = study
        self._study = _SearchedStudy(study.name, study.storage) if functions else None

    @property
    def stopped(self) -> bool:
        """Whether one of the functions has called ``study.stop()``."""
        return self._study is not None and self._study.is_stopped

    def call(self, number: int) -> None:
        """Call the functions after the trial of this number, whose result is stored.

        Raises:
            Exception: whatever they raise.
        """
        if self._study is None:
            return
        trial = self._stored.trial(number)
        for function in self._functions:
            function(self._study, copy.deepcopy(trial))
