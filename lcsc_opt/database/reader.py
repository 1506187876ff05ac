"""Reads studies repeatedly, each time only the trials that are new, for pages that refresh while a search runs.

Trials come through Optuna's cache, which never reads a trial again that has ended. Nothing is ever written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import NodeWork
from lcsc_opt.base.settings import near_miss
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.experiment import search_yardstick
from lcsc_opt.database.history import (
    NODES,
    TRIAL,
    AnyStudy,
    Floats,
    History,
    Standing,
    Trials,
    in_tell_order,
    is_finished,
    sign_of,
)
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import BASELINES, HOLDER, is_ranked, split_name
from lcsc_opt.database.report import REPORT
from lcsc_opt.database.rows import name_of_loss, trial_rows
from lcsc_opt.database.states import is_ours, with_losses
from lcsc_opt.database.store import StoredStudy, our_studies, trial_count
from lcsc_opt.database.summary import SUMMARY, Summary
from lcsc_opt.database.urls import parse_url, sqlite_file

MOST_READ_ONE_BY_ONE = 500  # trials that a summary does not cover; all at once is faster for more
_NO_RESULT = (TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)
T = TypeVar("T")
UNSEEN = (HOLDER, NODES, SUMMARY)  # attributes whose changes make no new revision


@dataclasses.dataclass(frozen=True)
class Failures:
    """The failed attempts of a study, also those of trials that succeeded later, or are evaluated again now.

    Attributes:
        failed: the numbers of the trials that failed in the end.
        reasons: number of a trial → the reasons of its failed attempts.
        tracebacks: reason → the traceback of the last exception with that reason.
    """

    failed: tuple[int, ...]
    reasons: Mapping[int, tuple[str, ...]]
    tracebacks: Mapping[str, str]


@dataclasses.dataclass
class _Cached:
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
    history: History
    trials: Trials
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _CachedSummary:
    """A study without its trials as it was last read.

    Attributes:
        study_id: the database's key of it.
        created: when it was created, to notice that a study was deleted and created again.
        study: what readers get; ``None`` before it was read.
        attributes: its summary, and its attributes without :data:`UNSEEN`.
        rows: of the trials that the summary does not cover.
        ended: those of these trials that have ended, by number: they are read only once.
        count: how many trials there were.
    """

    study_id: int
    created: Any
    study: Standing | None = None
    attributes: tuple[Any, ...] = ()
    rows: bytes = b""
    ended: dict[int, FrozenTrial] = dataclasses.field(default_factory=dict)
    count: int = 0


class HistoryReader:
    """Histories of the studies of one database, as fresh as their last :meth:`read`. Safe to share between threads.

    All methods raise :class:`StudyStoreError` where the database cannot be read, or a newer lcsc_opt has made one of
    its studies. Of a study that was deleted since it was read, more cannot be read: that raises :class:`KeyError`.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._cached_storage = get_storage(storage)
        self._file = _file_of(storage)
        self._studies: dict[str, _Cached] = {}
        self._summaries: dict[str, _CachedSummary] = {}
        self._averages: dict[tuple[Any, ...], str | None] = {}
        self._revisions = itertools.count(1)
        self._moment = threading.local()  # ``studies`` while at_one_moment is open in this thread

    @contextlib.contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """While this is open, all studies' names and attributes are read once, by the first call of this thread.

        Trials are always read as they are.
        """
        if hasattr(self._moment, "studies"):  # inside another one
            yield
            return
        self._moment.studies = None
        try:
            yield
        finally:
            del self._moment.studies

    def _our_studies(self) -> dict[str, dict[str, Any]]:
        """Name → attributes of all our studies, as they are now or as :meth:`at_one_moment` has read them."""
        if not hasattr(self._moment, "studies"):
            return our_studies(self.storage)
        if self._moment.studies is None:
            self._moment.studies = our_studies(self.storage)
        studies: dict[str, dict[str, Any]] = self._moment.studies
        return studies

    def names(self) -> list[str]:
        """The names of our studies, in the order in which they were created."""
        return list(self._our_studies())

    def searches(self) -> list[str]:
        """The names of our searches and grids: of all but landscapes."""
        return [name for name in self.names() if is_ranked(name)]

    def experiments(self) -> list[str]:
        """The experiments that the database holds, the newest last."""
        return list(dict.fromkeys(split_name(name)[0] for name in self.searches()))

    def read(self, experiment: str) -> tuple[History, ...]:
        """The searches of an experiment as they are now, in order of creation, without landscapes.

        Raises:
            StudyStoreError: there is no such experiment, and the message lists all; or it has no search.
        """
        return self.read_studies(self._names_of(experiment))

    def read_summaries(self, experiment: str) -> tuple[Standing, ...]:
        """As :meth:`read`, without the trials (:meth:`summaries`).

        Raises:
            StudyStoreError: there is no such experiment, and the message lists all; or it has no search.
        """
        return self.summaries(self._names_of(experiment))

    def _names_of(self, experiment: str) -> list[str]:
        """The names of an experiment's searches and grids; raises as :meth:`read`."""
        names = self.searches()
        names_of_experiment = [name for name in names if split_name(name)[0] == experiment]
        if not names_of_experiment:
            if any(split_name(name)[0] == experiment for name in self.names()):
                landscape_alone = f"{experiment}: has a landscape and no search, so there is nothing to compare"
                raise StudyStoreError(f"{landscape_alone}; lcsc dashboard shows the landscape")
            experiments = sorted({split_name(name)[0] for name in names})
            listed = ", ".join(experiments) or "none"
            guess = near_miss(experiment, experiments)
            raise StudyStoreError(f"{experiment}: no such experiment{guess}; the database holds: {listed}")
        return names_of_experiment

    def summaries(self, names: Iterable[str] | None = None) -> tuple[Standing, ...]:
        """The studies of these names as they are now, without their trials; those that were deleted are left out.

        A study whose summary is missing, or contradicts its trials, is read with all of them.

        Args:
            names: ``None`` for all studies.

        Raises:
            StudyStoreError: a name is not ``experiment/optimizer/seed``, or the database cannot be read.
        """
        with self._lock:
            self._notice_another_file()
            studies = self._our_studies()
            wanted = list(studies) if names is None else _checked(names)
            running = locked(self.storage, wanted)
            return self._each(wanted, studies, running, self._summarized)

    def _summarized(self, name: str, attributes: Mapping[str, Any], *, is_running: bool) -> Standing:
        """A study without its trials, if its summary allows that."""
        study = self._summary(name, attributes, is_running=is_running)
        if study is None:
            return self._read(name, attributes, is_running=is_running)
        return _with_holder(study, attributes, is_running=is_running)

    def _each(
        self,
        names: Iterable[str],
        studies: Mapping[str, Mapping[str, Any]],
        running: Collection[str],
        read: Callable[..., T],
    ) -> tuple[T, ...]:
        """What ``read`` gives of each study, by its name, its attributes and ``is_running``; not of deleted ones.

        The caller holds the lock of this reader, as ``read`` needs it.
        """
        results: list[T] = []
        for name in names:
            if name not in studies:
                continue
            read_study = functools.partial(read, name, studies[name], is_running=name in running)
            result = self._unless_deleted(name, read_study)
            if result is not None:
                results.append(result)
        return tuple(results)

    def _unless_deleted(self, name: str, read: Callable[[], T]) -> T | None:
        """What ``read`` gives of a study; ``None`` if it was deleted since the names were read."""
        try:
            return read()
        except (KeyError, StudyStoreError):
            if name in our_studies(self.storage):
                raise
            return None

    def read_studies(self, names: Iterable[str]) -> tuple[History, ...]:
        """The studies of these names as they are now, in this order; those that do not exist are left out.

        Raises:
            StudyStoreError: a name is not ``experiment/optimizer/seed``, or the database cannot be read.
        """
        names = _checked(names)
        with self._lock:
            self._notice_another_file()
            studies = self._our_studies()
            running = locked(self.storage, names)
            return self._each(names, studies, running, self._read)

    def read_study(self, name: str) -> History:
        """One study as it is now.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or there is no such study.
        """
        for study in self.read_studies([name]):
            return study
        raise StudyStoreError(f"{name}: is not in the database, or was deleted while it was read")

    def read_summary(self, name: str) -> Standing:
        """:meth:`read_study` without the trials, which are not read.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or there is no such study.
        """
        for study in self.summaries([name]):
            return study
        raise StudyStoreError(f"{name}: is not in the database, or was deleted while it was read")

    def failures(self, study: Standing) -> Failures:
        """Why attempts failed; of a study without its trials, only those are read that may have a failed attempt."""
        if isinstance(study, History):
            return Failures(tuple(study.failed["number"].tolist()), study.reasons, study.tracebacks)
        forgotten = _forgotten(in_database(self.storage, lambda: self.storage.get_study_user_attrs(study.study_id)))
        trials = [self._trial(study.study_id, number) for number in study.summary.retried]
        if study.summary.failed or study.summary.trials > study.evaluations:
            stored_trials = in_database(
                self.storage, lambda: self.storage.get_all_trials(study.study_id, deepcopy=False, states=_NO_RESULT)
            )
            trials += [trial for trial in stored_trials if trial.number not in forgotten]
        trials.sort(key=lambda trial: trial.number)
        failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
        return Failures(tuple(failed), *_failures_of(trials))

    def answer(self, study: Standing) -> Floats | None:
        """The coefficients, ``[K]`` or ``[S, K]``, of :attr:`Standing.chosen`; ``None`` while no trial is."""
        if study.chosen is None:
            return None
        coefficients: Floats = self.coefficients(study, [study.chosen])[0]
        return coefficients

    def coefficients(self, study: Standing, numbers: Sequence[int]) -> Floats:
        """``[m, K]``, or ``[m, S, K]`` with layer groups; NaN where a trial stores none.

        Of a study without its trials, only these are read, one by one.

        Raises:
            StudyStoreError: there is no trial of one of these numbers.
        """
        arrays = [coefficients_of(trial) for trial in self._trials_of(study, numbers)]
        shapes = [array.shape for array in arrays if array.size]
        shape = max(shapes, key=len, default=(len(study.steps),))  # with rows if any of them has rows
        all_coefficients = np.full((len(arrays), *shape), np.nan)
        for place, array in zip(all_coefficients, arrays, strict=True):
            if array.size:
                place[...] = array
        return all_coefficients

    def _trials_of(self, study: Standing, numbers: Sequence[int]) -> list[FrozenTrial]:
        """The trials of these numbers; of a study whose trials were read they are in Optuna's cache.

        Raises:
            StudyStoreError: one does not exist, or no search asked it.
        """
        stored_trials: dict[int, FrozenTrial] = {}
        if isinstance(study, History):
            stored_trials = {trial.number: trial for trial in self._stored_trials(study.study_id)}
        else:
            for number in numbers:
                with contextlib.suppress(KeyError):
                    stored_trials[number] = self._trial(study.study_id, number)
        for number in numbers:
            if number not in stored_trials or not is_ours(stored_trials[number]):
                count = trial_count(self.storage, study.study_id)
                raise StudyStoreError(
                    f"{study.study}: has no trial {number} of a search; its trials are 0 to {count - 1}"
                )
        return [stored_trials[number] for number in numbers]

    def _notice_another_file(self) -> None:
        """Forget what was read if another file has the database's name by now, as a copy from before."""
        file = _file_of(self.storage)
        if file != self._file:
            self._cached_storage = get_storage(self.storage)
            self._file = file
            self._studies = {}
            self._summaries = {}
            self._averages = {}

    def _summary(self, name: str, attributes: Mapping[str, Any], *, is_running: bool) -> Standing | None:
        """A study from its summary and the trials that it does not cover; ``None`` where that cannot be done."""
        try:
            summary = Summary.from_json(attributes[SUMMARY])
        except (KeyError, TypeError):  # none, or of another version
            return None
        cached = self._cached_summary(name, attributes.get("created"))
        read_attributes = (summary, {key: value for key, value in attributes.items() if key not in UNSEEN})
        is_changed = read_attributes != cached.attributes
        if cached.study is not None and cached.study.ended and not is_running and not is_changed:
            return cached.study  # nobody adds trials
        newer_trials = self._newer_trials(cached, summary, _forgotten(attributes))
        if newer_trials is None:
            return None
        if sign_of(attributes) < 0:
            newer_trials = with_losses(newer_trials)
        rows = trial_rows(newer_trials)
        if cached.study is not None and not is_changed and rows.tobytes() == cached.rows:
            return cached.study

        finished = in_tell_order(rows[is_finished(rows)])
        summary = summary.extended(finished, unfinished=len(rows) - len(finished))
        study = _with_attributes(Standing(cached.study_id, name, *split_name(name), summary=summary), attributes)
        study = dataclasses.replace(study, metric=_name_for_people(study, self._metric(summary, newer_trials)))
        if study.optimizer in BASELINES and study.chosen is not None:
            study = dataclasses.replace(study, average=self._average(study, attributes.get("created")))
        cached.study = dataclasses.replace(study, revision=next(self._revisions))
        cached.attributes = read_attributes
        cached.rows = rows.tobytes()
        return cached.study

    def _cached_summary(self, name: str, created: Any) -> _CachedSummary:
        """The study as it was last read; an empty one the first time, and if it was created again.

        Raises:
            KeyError: it was deleted.
        """
        cached = self._summaries.get(name)
        if cached is None or cached.created != created:
            study_id = in_database(self.storage, lambda: self.storage.get_study_id_from_name(name))
            cached = _CachedSummary(study_id, created)
            self._summaries[name] = cached
        return cached

    def _newer_trials(
        self, cached: _CachedSummary, summary: Summary, forgotten: Collection[int]
    ) -> list[FrozenTrial] | None:
        """The trials that a summary does not cover; ``None`` if it contradicts them, or if they are many."""
        if len(forgotten) != summary.forgotten:  # made before trials were forgotten
            return None
        count = trial_count(self.storage, cached.study_id, at_least=max(summary.covers, cached.count))
        if count < summary.covers or count - summary.covers > MOST_READ_ONE_BY_ONE:
            return None
        newer_trials = []
        for number in range(summary.covers, count):
            if number not in forgotten:
                trial = cached.ended.get(number)
                newer_trials.append(trial or self._trial(cached.study_id, number))
        newer_trials = [trial for trial in newer_trials if is_ours(trial)]
        cached.ended = {trial.number: trial for trial in newer_trials if trial.state.is_finished()}
        cached.count = count
        return newer_trials

    def _trial(self, study_id: int, number: int) -> FrozenTrial:
        """One trial as it is in the database now.

        Raises:
            KeyError: there is none of this number.
        """

        def trial() -> FrozenTrial:
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return self.storage.get_trial(trial_id)

        return in_database(self.storage, trial)

    @staticmethod
    def _metric(summary: Summary, newer_trials: Sequence[FrozenTrial]) -> str:
        """What the loss is called, by the best trial, or by the summary if that covers it."""
        for trial in newer_trials:
            if trial.number == summary.best:
                return name_of_loss(trial.user_attrs.get("metrics") or {}, summary.loss)
        return summary.metric

    def _average(self, study: Standing, created: Any) -> str | None:
        """What the answer of a baseline is called; its trial is read only once."""
        assert study.chosen is not None
        key = (study.study_id, created, study.chosen)
        if key not in self._averages:
            coefficients = coefficients_of(self._trial(study.study_id, study.chosen))
            self._averages[key] = _average_name(study, coefficients)
        return self._averages[key]

    def _stored_trials(self, study_id: int) -> list[FrozenTrial]:
        """All of our trials of a study, by Optuna's cache."""
        trials = in_database(self.storage, lambda: self._cached_storage.get_all_trials(study_id, deepcopy=False))
        return [trial for trial in trials if is_ours(trial)]

    def _read(self, name: str, attributes: Mapping[str, Any], *, is_running: bool) -> History:
        """One study with its trials as they are now; it replaces the cached one.

        Raises:
            KeyError, StudyStoreError: it was deleted.
        """
        cached = self._cached_study(name, attributes.get("created"))
        before = cached.history
        seen_attributes = {key: value for key, value in attributes.items() if key not in UNSEEN}
        is_changed = seen_attributes != cached.attributes
        study = _with_attributes(before, attributes)
        if is_changed or not before.ended or is_running:  # else nobody adds trials
            study, has_new_trials = self._with_trials(cached, study, attributes)
            is_changed = is_changed or has_new_trials
        cached.attributes = seen_attributes
        study = _with_holder(study, attributes, is_running=is_running)
        if is_changed:
            study = dataclasses.replace(study, revision=next(self._revisions))
        cached.history = study
        return study

    def _cached_study(self, name: str, created: Any) -> _Cached:
        """The study as it was last read; an empty history the first time, and if it was created again.

        Raises:
            StudyStoreError: it was deleted.
        """
        cached = self._studies.get(name)
        if cached is not None and cached.created == created:
            return cached
        if cached is not None:  # deleted and created again, perhaps with the same key
            self._cached_storage = get_storage(self.storage)
        stored = StoredStudy.open(self.storage, name)
        no_trials = np.empty(0, dtype=TRIAL)
        history = History(stored.key, name, *split_name(name), no_trials)
        self._studies[name] = _Cached(stored, created, history, no_trials)
        return self._studies[name]

    def _with_trials(self, cached: _Cached, study: History, attributes: Mapping[str, Any]) -> tuple[History, bool]:
        """The study with its trials as they are now, also in the cache, and whether any of them is new or changed."""
        stored_trials = self._stored_trials(study.study_id)
        if study.sign < 0:
            stored_trials = with_losses(stored_trials)
        ended_trials = cached.trials[is_finished(cached.trials)]  # which never change
        ended_numbers = set(ended_trials["number"].tolist())
        refreshed_trials = [trial for trial in stored_trials if trial.number not in ended_numbers]
        trials = np.concatenate([ended_trials, trial_rows(refreshed_trials)])
        trials = trials[np.argsort(trials["number"], kind="stable")]
        is_changed = trials.tobytes() != cached.trials.tobytes()
        cached.trials = trials

        shown_trials = trials[~np.isin(trials["number"], list(_forgotten(attributes)))]
        shown_trials.setflags(write=False)
        reasons, tracebacks = _failures_of(refreshed_trials)
        shown_numbers = set(shown_trials["number"].tolist())
        all_reasons = {**study.reasons, **reasons}
        study = dataclasses.replace(
            study,
            trials=shown_trials,
            reasons={number: texts for number, texts in all_reasons.items() if number in shown_numbers},
            tracebacks={**study.tracebacks, **tracebacks},
        )
        return _with_names(study, {trial.number: trial for trial in stored_trials}), is_changed


def _checked(names: Iterable[str]) -> list[str]:
    """The names of studies.

    Raises:
        StudyStoreError: one is not ``experiment/optimizer/seed``.
    """
    names = list(names)
    for name in names:
        split_name(name)
    return names


def _forgotten(attributes: Mapping[str, Any]) -> set[int]:
    """The numbers of the trials that ``--retry-failed`` has forgotten."""
    return set((attributes.get("retry") or {}).get("forgotten", ()))


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


def _with_holder(study: AnyStudy, attributes: Mapping[str, Any], *, is_running: bool) -> AnyStudy:
    """The study with the machine that runs it now, if one does."""
    if not is_running or not attributes.get(HOLDER):
        return dataclasses.replace(study, holder=None, held_since=0.0)
    holder = attributes[HOLDER]
    return dataclasses.replace(study, holder=holder["host"], held_since=holder["since"])


def _with_attributes(study: AnyStudy, attributes: Mapping[str, Any]) -> AnyStudy:
    """The study with all that its user attributes say, but its holder and the names of its loss and answer."""
    specification = attributes.get("specification") or {}
    budget = attributes.get("budget") or {}
    nodes = attributes.get(NODES) or {}
    yardstick = search_yardstick(attributes)
    return dataclasses.replace(
        study,
        steps=tuple(attributes.get("steps") or ()),
        layer_groups=tuple(attributes.get("layer_groups") or ()),
        start=specification.get("start"),
        settings=specification,
        workers=_worker_count(specification.get("workers", 1)),
        sign=sign_of(attributes),
        keeps=yardstick is not None and yardstick.kept is not None,
        budget={unit: int(total) for unit, total in budget.items() if total is not None},
        ended=bool(attributes.get("search_ended")),
        report=attributes.get(REPORT),
        nodes=tuple(NodeWork(row["name"], row["alive"], row["deaths"]) for row in nodes.get("nodes", ())),
        nodes_seen_at=float(nodes.get("seen_at", 0.0)),
    )


def _worker_count(workers: Any) -> int:
    """How many workers a stored specification has; ``auto`` counts as one."""
    if isinstance(workers, Mapping):
        return int(workers["ray"])
    if isinstance(workers, Sequence) and not isinstance(workers, str):
        return len(workers)
    return workers if isinstance(workers, int) else 1


def _name_for_people(study: Standing, name: str) -> str:
    """What the loss of a study is called: with a penalty it is no metric; and a maximized one is a score."""
    if study.keeps:
        return "loss"
    if study.sign < 0 and name == "loss":
        return "score"
    return name


def _with_names(study: History, trials: Mapping[int, FrozenTrial]) -> History:
    """The study with the name of its loss, and of a baseline's answer, from its trials by number."""
    if study.metric == "loss" and not study.keeps and study.best is not None:
        metrics = trials[study.best].user_attrs.get("metrics") or {}
        study = dataclasses.replace(study, metric=_name_for_people(study, name_of_loss(metrics, study.lowest_loss)))
    if study.optimizer in BASELINES and study.chosen is not None:
        coefficients = coefficients_of(trials[study.chosen])
        study = dataclasses.replace(study, average=_average_name(study, coefficients))
    return study


def _average_name(study: Standing, coefficients: Floats) -> str | None:
    """What a baseline's answer is called; ``None`` for coefficients that no baseline has at these steps."""
    return average_name(coefficients, study.steps)


def _failures_of(trials: Sequence[FrozenTrial]) -> tuple[dict[int, tuple[str, ...]], dict[str, str]]:
    """Number of a trial → the reasons of its failed attempts; reason → the traceback of the last such attempt."""
    reasons: dict[int, tuple[str, ...]] = {}
    tracebacks: dict[str, str] = {}
    for trial in trials:
        attempts = _attempts_of(trial)
        if attempts:
            reasons[trial.number] = tuple(str(attempt["reason"]) for attempt in attempts)
        for attempt in attempts:
            if "traceback" in attempt:
                tracebacks[str(attempt["reason"])] = str(attempt["traceback"])
    return reasons, tracebacks


def _attempts_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """The failed attempts of a trial, each with its ``reason``."""
    attempts: list[Mapping[str, Any]] = trial.user_attrs.get("attempts") or []
    if trial.state == TrialState.FAIL and not attempts:  # another program ended it
        return [{"reason": "unknown"}]
    return attempts
