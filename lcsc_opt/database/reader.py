"""Reads studies repeatedly, each time only the trials that are new, for pages that refresh while a search runs.

Trials come through Optuna's cache, which never reads a trial again that has ended. Nothing is ever written.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import NodeWork
from lcsc_opt.base.settings import near_miss
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.history import (
    COSTS,
    NODES,
    TRIAL,
    Floats,
    StudyHistory,
    Trials,
    is_finished,
    kept_metric,
)
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import BASELINES, HOLDER, LOGGED, SUCCEEDED, is_search, short_metric, split_name
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.urls import parse_url, sqlite_file

UNSEEN = (HOLDER, NODES, LOGGED)  # attributes whose changes make no new revision


@dataclasses.dataclass
class _CachedStudy:
    """A study as it was last read.

    Attributes:
        study: the stored study.
        created: when it was created, to notice that a study was deleted and created again.
        history: what readers get.
        trials: all of its trials, also those that the history leaves out.
        attributes: its attributes without :data:`UNSEEN`.
    """

    study: StoredStudy
    created: Any
    history: StudyHistory
    trials: Trials
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class HistoryReader:
    """Histories of the studies of one database, as fresh as their last :meth:`read`. Safe to share between threads."""

    def __init__(self, storage: RDBStorage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._cached_storage = get_storage(storage)
        self._file = _file_of(storage)
        self._studies: dict[str, _CachedStudy] = {}
        self._revisions = itertools.count(1)

    def names(self) -> list[str]:
        """The names of our studies, in the order in which they were created."""
        return list(our_studies(self.storage))

    def searches(self) -> list[str]:
        """The names of our studies that are searches: all but landscapes."""
        return [name for name in self.names() if is_search(name)]

    def experiments(self) -> list[str]:
        """The experiments that the database holds, the newest last."""
        return list(dict.fromkeys(split_name(name)[0] for name in self.searches()))

    def read(self, experiment: str) -> tuple[StudyHistory, ...]:
        """The searches of an experiment as they are now, in order of creation, without landscapes.

        Raises:
            StudyStoreError: there is no such experiment; the message lists all.
        """
        names = self.searches()
        names_of_experiment = [name for name in names if split_name(name)[0] == experiment]
        if not names_of_experiment:
            experiments = sorted({split_name(name)[0] for name in names})
            listed = ", ".join(experiments) or "none"
            guess = near_miss(experiment, experiments)
            raise StudyStoreError(f"{experiment}: no such experiment{guess}; the database holds: {listed}")
        return self.read_studies(names_of_experiment)

    def read_studies(self, names: Iterable[str]) -> tuple[StudyHistory, ...]:
        """The studies of these names as they are now, in this order; those that were deleted are left out.

        Raises:
            StudyStoreError: a name is not that of one of our studies, or the database cannot be read.
        """
        names = list(names)
        for name in names:
            split_name(name)
        with self._lock:
            file = _file_of(self.storage)
            if file != self._file:  # another database, as a copy from before
                self._cached_storage = get_storage(self.storage)
                self._file = file
                self._studies = {}
            studies = our_studies(self.storage)
            running = in_database(self.storage, lambda: locked(self.storage, names))
            return tuple(
                self._read(name, studies[name], is_running=name in running) for name in names if name in studies
            )

    def read_study(self, name: str) -> StudyHistory:
        """One study as it is now.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or it was deleted.
        """
        for study in self.read_studies([name]):
            return study
        raise StudyStoreError(f"{name}: was deleted from the database while it was read")

    def answer(self, study: StudyHistory) -> Floats | None:
        """``[K]`` or ``[S, K]`` of the trial that was chosen, else of the best one; ``None`` while there is none."""
        if study.chosen is None:
            return None
        coefficients: Floats = self.coefficients(study, [study.chosen])[0]
        return coefficients

    def coefficients(self, study: StudyHistory, numbers: Sequence[int]) -> Floats:
        """``[m, K]``, or ``[m, S, K]`` with layer groups; NaN where a trial stores none.

        Raises:
            StudyStoreError: there is no trial of one of these numbers.
        """
        trials = {trial.number: trial for trial in self._stored_trials(study.study_id)}
        for number in numbers:
            if number not in trials:
                raise StudyStoreError(f"{study.study}: has no trial {number}; its trials are 0 to {len(trials) - 1}")
        arrays = [coefficients_of(trials[number]) for number in numbers]
        shapes = [array.shape for array in arrays if array.size]
        shape = max(shapes, key=len, default=(len(study.steps),))  # with rows if any of them has rows
        all_coefficients = np.full((len(arrays), *shape), np.nan)
        for place, array in zip(all_coefficients, arrays, strict=True):
            if array.size:
                place[...] = array
        return all_coefficients

    def _stored_trials(self, study_id: int) -> list[FrozenTrial]:
        """The one place where trials are read."""
        return in_database(self.storage, lambda: self._cached_storage.get_all_trials(study_id, deepcopy=False))

    def _read(self, name: str, attributes: Mapping[str, Any], *, is_running: bool) -> StudyHistory:
        """Bring one study up to date."""
        cached = self._cached_study(name, attributes.get("created"))
        before = cached.history
        seen_attributes = {key: value for key, value in attributes.items() if key not in UNSEEN}
        is_changed = seen_attributes != cached.attributes
        study = _with_attributes(before, attributes)
        if is_changed or not before.ended or is_running:
            study, has_new_trials = self._with_trials(cached, study, attributes)
            is_changed = is_changed or has_new_trials
        cached.attributes = seen_attributes
        study = dataclasses.replace(study, holder=None, held_since=0.0)
        if is_running and attributes.get(HOLDER):
            holder = attributes[HOLDER]
            study = dataclasses.replace(study, holder=holder["host"], held_since=holder["since"])
        if is_changed:
            study = dataclasses.replace(study, revision=next(self._revisions))
        cached.history = study
        return study

    def _cached_study(self, name: str, created: Any) -> _CachedStudy:
        """The study as it was last read; an empty history the first time, and if it was created again."""
        cached = self._studies.get(name)
        if cached is not None and cached.created == created:
            return cached
        if cached is not None:  # deleted and created again, perhaps with the same key
            self._cached_storage = get_storage(self.storage)
        stored = StoredStudy.open(self.storage, name)
        no_trials = np.empty(0, dtype=TRIAL)
        history = StudyHistory(stored.key, name, *split_name(name), no_trials)
        self._studies[name] = _CachedStudy(stored, created, history, no_trials)
        return self._studies[name]

    def _with_trials(
        self, cached: _CachedStudy, study: StudyHistory, attributes: Mapping[str, Any]
    ) -> tuple[StudyHistory, bool]:
        """The study with its trials as they are now, and whether any of them is new or has changed."""
        stored_trials = self._stored_trials(study.study_id)
        ended_trials = cached.trials[is_finished(cached.trials)]  # which never change
        ended_numbers = set(ended_trials["number"].tolist())
        new_trials = [trial for trial in stored_trials if trial.number not in ended_numbers]
        trials = np.concatenate([ended_trials, _trials_as_array(new_trials)])
        trials = trials[np.argsort(trials["number"], kind="stable")]
        is_changed = trials.tobytes() != cached.trials.tobytes()
        cached.trials = trials

        forgotten = (attributes.get("retry") or {}).get("forgotten", ())
        shown_trials = trials[~np.isin(trials["number"], forgotten)]
        shown_trials.setflags(write=False)
        reasons, tracebacks = _failures_of(new_trials)
        shown_numbers = set(shown_trials["number"].tolist())
        all_reasons = {**study.reasons, **reasons}
        study = dataclasses.replace(
            study,
            trials=shown_trials,
            reasons={number: texts for number, texts in all_reasons.items() if number in shown_numbers},
            tracebacks={**study.tracebacks, **tracebacks},
        )
        return _with_names(study, {trial.number: trial for trial in stored_trials}), is_changed


def _file_of(storage: RDBStorage) -> tuple[int, int] | None:
    """Which file an SQLite database is in now: its device and inode; ``None`` for a server, and if it is missing."""
    file = sqlite_file(parse_url(storage.url))
    if file is None:
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _with_attributes(study: StudyHistory, attributes: Mapping[str, Any]) -> StudyHistory:
    """The study updated with its user attributes."""
    specification = attributes.get("specification") or {}
    budget = attributes.get("budget") or {}
    nodes = attributes.get(NODES) or {}
    return dataclasses.replace(
        study,
        steps=tuple(attributes.get("steps") or ()),
        layer_groups=tuple(attributes.get("layer_groups") or ()),
        forked_from=attributes.get("forked_from"),
        settings=specification,
        workers=int(specification.get("workers", 1)),
        ordered=specification.get("tells", "ordered") == "ordered",
        keeps=bool(kept_metric(specification)),
        budget={unit: total for unit, total in budget.items() if total is not None},
        ended=bool(attributes.get("search_ended")),
        held_out=HeldOutReport.from_json(attributes.get("held_out")),
        nodes=tuple(NodeWork(row["name"], row["alive"], row["deaths"]) for row in nodes.get("nodes", ())),
        nodes_seen_at=float(nodes.get("seen_at", 0.0)),
    )


def _with_names(study: StudyHistory, trials: Mapping[int, FrozenTrial]) -> StudyHistory:
    """The study with the name of its loss, and of a baseline's answer."""
    if study.metric == "loss" and not study.keeps and study.best is not None:
        metrics = trials[study.best].user_attrs.get("metrics") or {}
        study = dataclasses.replace(study, metric=_shown_name_of_loss(metrics, study.searched))
    if study.optimizer in BASELINES and study.chosen is not None:
        coefficients = coefficients_of(trials[study.chosen])
        study = dataclasses.replace(study, average=average_name(coefficients, study.steps))
    return study


def _shown_name_of_loss(metrics: Mapping[str, float], loss: float | None) -> str:
    """``FID`` if the loss is the metric ``fid``; ``loss`` if it is none of the metrics."""
    name = next((name for name, value in metrics.items() if value == loss), "loss")
    if name == "loss":
        return name
    formula, at, extractor = short_metric(name).partition("@")
    return f"{formula.upper()}{at}{extractor}"


def _trials_as_array(trials: Sequence[FrozenTrial]) -> Trials:
    """``[n]`` of :data:`TRIAL`."""
    rows = np.zeros(len(trials), dtype=TRIAL)
    for row, trial in zip(rows, trials, strict=True):
        attributes = trial.user_attrs
        row["number"] = trial.number
        row["state"] = trial.state.value
        row["inherited"] = "inherited" in attributes
        row["tell_index"] = attributes.get("tell_index", trial.number)
        row["started"] = _seconds(trial.datetime_start)
        row["ended"] = _seconds(trial.datetime_complete)
        row["loss"] = np.nan
        if trial.state in SUCCEEDED and trial.value is not None:
            row["loss"] = trial.value
        if trial.state == TrialState.FAIL:
            row["asked"] = attributes.get("images") or 0
        cost = attributes.get("cost", {})
        for name in COSTS:
            row[name] = cost.get(name, 0.0)
    return rows


def _seconds(moment: datetime.datetime | None) -> float:
    return np.nan if moment is None else moment.timestamp()


def _failures_of(trials: Sequence[FrozenTrial]) -> tuple[dict[int, tuple[str, ...]], dict[str, str]]:
    """Number of a trial → the reasons of its failed attempts; reason → the traceback of the last such attempt."""
    reasons: dict[int, tuple[str, ...]] = {}
    tracebacks: dict[str, str] = {}
    for trial in trials:
        attempts = _attempts_of(trial)
        if attempts:
            reasons[trial.number] = tuple(str(attempt.get("reason", "unknown")) for attempt in attempts)
        for attempt in attempts:
            if "traceback" in attempt:
                tracebacks[str(attempt["reason"])] = str(attempt["traceback"])
    return reasons, tracebacks


def _attempts_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """The failed attempts of a trial, each with its ``reason``."""
    attempts: list[Mapping[str, Any]] = trial.user_attrs.get("attempts") or []
    if trial.state == TrialState.FAIL and not attempts:
        return [{"reason": trial.user_attrs.get("reason", "unknown")}]
    return attempts
