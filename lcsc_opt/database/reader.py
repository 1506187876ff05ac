"""Reads studies repeatedly, each time only the trials that are new, for pages that refresh while a search runs.

Trials come through Optuna's cache, which never reads a trial again that has ended. Nothing is ever written.
"""

from __future__ import annotations

import contextlib
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
from lcsc_opt.database.history import COSTS, NODES, TRIAL, Floats, StudyHistory, Trials, kept_metric
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import BASELINES, HOLDER, LOGGED, SUCCEEDED, is_search, short_metric, split_name
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.urls import parse_url, sqlite_file

UNSEEN = (HOLDER, NODES, LOGGED)  # attributes whose changes make no new revision


@dataclasses.dataclass
class _Known:
    """A study as it was last read; ``trials`` are all of its trials, also those that the history leaves out."""

    study: StoredStudy
    created: Any
    history: StudyHistory
    trials: Trials
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class HistoryReader:
    """Histories of the studies of one database, as fresh as their last :meth:`read`. Safe to share between threads."""

    def __init__(self, storage: RDBStorage) -> None:
        self.storage, self._lock = storage, threading.Lock()
        self._cached = get_storage(storage)
        self._file = _file_of(storage)
        self._known: dict[str, _Known] = {}
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
            StudyStoreError: there is no such experiment; the message names those that there are.
        """
        names = self.searches()
        known = sorted({split_name(name)[0] for name in names})
        if experiment not in known:
            guess, there = near_miss(experiment, known), ", ".join(known) or "none"
            raise StudyStoreError(f"{experiment}: no such experiment{guess}; the database holds: {there}")
        return self.read_studies([name for name in names if split_name(name)[0] == experiment])

    def read_studies(self, names: Iterable[str]) -> tuple[StudyHistory, ...]:
        """The studies of these names as they are now, in this order; those that are gone are left out.

        Raises:
            StudyStoreError: a name is not that of one of our studies, or the database cannot be read.
        """
        wanted = list(names)
        for name in wanted:
            split_name(name)
        with self._lock:
            if (file := _file_of(self.storage)) != self._file:  # another database, as a copy from before
                self._cached, self._file, self._known = get_storage(self.storage), file, {}
            studies = our_studies(self.storage)
            running = in_database(self.storage, lambda: locked(self.storage, wanted))
            there = [name for name in wanted if name in studies]
            return tuple(self._read(name, studies[name], running=name in running) for name in there)

    def read_study(self, name: str) -> StudyHistory:
        """One study as it is now.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or it is not there any more.
        """
        for study in self.read_studies([name]):
            return study
        raise StudyStoreError(f"{name}: was deleted from the database while it was read")

    def answer(self, study: StudyHistory) -> Floats | None:
        """``[K]`` or ``[S, K]`` of the trial that was chosen, else of the best one; ``None`` while there is none."""
        return None if study.chosen is None else self.coefficients(study, [study.chosen])[0]

    def coefficients(self, study: StudyHistory, numbers: Sequence[int]) -> Floats:
        """``[m, K]``, or ``[m, S, K]`` with layer groups; NaN where a trial stores none.

        Raises:
            StudyStoreError: there is no trial of one of these numbers.
        """
        stored = in_database(self.storage, lambda: self._cached.get_all_trials(study.study_id, deepcopy=False))
        trials = {trial.number: trial for trial in stored}
        if missing := [number for number in numbers if number not in trials]:
            raise StudyStoreError(f"{study.study}: has no trial {missing[0]}; its trials are 0 to {len(trials) - 1}")
        found = [coefficients_of(trials[number]) for number in numbers]
        shape = max((each.shape for each in found if each.size), key=len, default=(len(study.steps),))
        whole = np.full((len(found), *shape), np.nan)
        for place, each in zip(whole, found, strict=True):
            if each.size:
                place[...] = each
        return whole

    def _read(self, name: str, attributes: Mapping[str, Any], *, running: bool) -> StudyHistory:
        """Bring one study up to date."""
        known = self._known.get(name)
        if known is None or known.created != attributes.get("created"):
            if known is not None:  # deleted and made again, perhaps with the same key
                self._cached = get_storage(self.storage)
            stored = StoredStudy.open(self.storage, name)
            nothing = np.empty(0, dtype=TRIAL)
            history = StudyHistory(stored.key, name, *split_name(name), nothing)
            known = self._known[name] = _Known(stored, attributes.get("created"), history, nothing)
        before = known.history
        changed = {key: value for key, value in attributes.items() if key not in UNSEEN} != known.attributes
        study = _with_attributes(before, attributes)
        if changed or not before.ended or running:
            study, is_new = self._with_trials(known, study, attributes)
            changed = changed or is_new
        known.attributes = {key: value for key, value in attributes.items() if key not in UNSEEN}
        held = (running and attributes.get(HOLDER)) or {"host": None, "since": 0.0}
        revision = next(self._revisions) if changed else before.revision
        known.history = dataclasses.replace(study, holder=held["host"], held_since=held["since"], revision=revision)
        return known.history

    def _with_trials(
        self, known: _Known, study: StudyHistory, attributes: Mapping[str, Any]
    ) -> tuple[StudyHistory, bool]:
        """The study with its trials as they are now, and whether any of them is new or has changed."""
        found = in_database(self.storage, lambda: self._cached.get_all_trials(study.study_id, deepcopy=False))
        waiting = [state.value for state in TrialState if not state.is_finished()]
        ended = set(known.trials["number"][~np.isin(known.trials["state"], waiting)].tolist())
        fresh = [trial for trial in found if trial.number not in ended]
        kept = known.trials[np.isin(known.trials["number"], list(ended))]
        trials = np.concatenate([kept, _trials_as_array(fresh)])
        trials = trials[np.argsort(trials["number"], kind="stable")]
        is_new = trials.tobytes() != known.trials.tobytes()
        known.trials = trials
        forgotten = (attributes.get("retry") or {}).get("forgotten", ())
        shown = trials[~np.isin(trials["number"], forgotten)]
        shown.setflags(write=False)
        attempts = {trial.number: made for trial in fresh if (made := _attempts_of(trial))}
        reasons = {n: tuple(str(one.get("reason", "unknown")) for one in made) for n, made in attempts.items()}
        numbers = set(shown["number"].tolist())
        texts = {
            str(one["reason"]): str(one["traceback"])
            for made in attempts.values()
            for one in made
            if "traceback" in one
        }
        study = dataclasses.replace(
            study,
            trials=shown,
            reasons={n: why for n, why in {**study.reasons, **reasons}.items() if n in numbers},
            tracebacks={**study.tracebacks, **texts},
        )
        return self._with_names(study, {trial.number: trial for trial in found}), is_new

    def _with_names(self, study: StudyHistory, trials: Mapping[int, FrozenTrial]) -> StudyHistory:
        """The study with the name of its loss, and of a baseline's answer."""
        if study.metric == "loss" and not study.keeps and study.best is not None:
            metrics = trials[study.best].user_attrs.get("metrics") or {}
            name = next((name for name, value in metrics.items() if value == study.searched), "loss")
            formula, at, extractor = short_metric(name).partition("@")
            shown = name if name == "loss" else f"{formula.upper()}{at}{extractor}"
            study = dataclasses.replace(study, metric=shown)
        if study.optimizer in BASELINES and study.chosen is not None:
            study = dataclasses.replace(study, average=average_name(coefficients_of(trials[study.chosen]), study.steps))
        return study


def _file_of(storage: RDBStorage) -> tuple[int, int] | None:
    """Which file an SQLite database is in now: its device and inode; ``None`` for a server, and while there is none."""
    file = sqlite_file(parse_url(storage.url))
    with contextlib.suppress(OSError):
        return None if file is None else (file.stat().st_dev, file.stat().st_ino)
    return None


def _with_attributes(study: StudyHistory, attributes: Mapping[str, Any]) -> StudyHistory:
    """The study updated with its user attributes."""
    specification, seen = attributes.get("specification") or {}, attributes.get(NODES) or {}
    return dataclasses.replace(
        study,
        steps=tuple(attributes.get("steps") or ()),
        layer_groups=tuple(attributes.get("layer_groups") or ()),
        forked_from=attributes.get("forked_from"),
        settings=specification,
        workers=int(specification.get("workers", 1)),
        ordered=specification.get("tells", "ordered") == "ordered",
        keeps=bool(kept_metric(specification)),
        budget={unit: n for unit, n in (attributes.get("budget") or {}).items() if n is not None},
        ended=bool(attributes.get("search_ended")),
        held_out=HeldOutReport.from_json(attributes.get("held_out")),
        nodes=tuple(NodeWork(row["name"], row["alive"], row["deaths"]) for row in seen.get("nodes", ())),
        nodes_seen_at=float(seen.get("seen_at", 0.0)),
    )


def _trials_as_array(trials: Sequence[FrozenTrial]) -> Trials:
    """``[n]`` of :data:`TRIAL`."""
    found = np.zeros(len(trials), dtype=TRIAL)
    for row, trial in zip(found, trials, strict=True):
        known = trial.user_attrs
        row["number"], row["state"], row["inherited"] = trial.number, trial.state.value, "inherited" in known
        row["tell_index"] = known.get("tell_index", trial.number)
        row["started"], row["ended"] = _seconds(trial.datetime_start), _seconds(trial.datetime_complete)
        row["loss"] = trial.value if trial.state in SUCCEEDED and trial.value is not None else np.nan
        row["asked"] = (known.get("images") or 0) if trial.state == TrialState.FAIL else 0
        for name in COSTS:
            row[name] = known.get("cost", {}).get(name, 0.0)
    return found


def _seconds(moment: datetime.datetime | None) -> float:
    return np.nan if moment is None else moment.timestamp()


def _attempts_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """The failed attempts of a trial, each with its ``reason``."""
    attempts = trial.user_attrs.get("attempts") or []
    failed = trial.state == TrialState.FAIL and not attempts
    return [{"reason": trial.user_attrs.get("reason", "unknown")}] if failed else attempts
