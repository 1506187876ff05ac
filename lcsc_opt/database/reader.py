"""Reads studies, repeatedly for pages that refresh while a search runs. Nothing is ever written.

Of a study that has a summary no trial is read. All trials come through Optuna's cache, which never reads a trial again
that has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.settings import near_miss
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.experiment import search_yardstick
from lcsc_opt.database.history import Floats, Standing, Trials, sign_of
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import BASELINES, HOLDER, split_name
from lcsc_opt.database.report import REPORT
from lcsc_opt.database.rows import summary_of, trial_rows
from lcsc_opt.database.states import forgotten_trials, is_ours, shown_trials
from lcsc_opt.database.store import our_studies
from lcsc_opt.database.summary import Summary
from lcsc_opt.database.urls import parse_url, sqlite_file


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

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> Failures:
        """The failed attempts of these trials."""
        failed: list[int] = []
        reasons: dict[int, tuple[str, ...]] = {}
        tracebacks: dict[str, str] = {}
        for trial in trials:
            attempts = trial.user_attrs.get("attempts") or []
            if trial.state == TrialState.FAIL:
                failed.append(trial.number)
                attempts = attempts or [{"reason": "unknown"}]  # another program ended it
            for attempt in attempts:
                reasons[trial.number] = (*reasons.get(trial.number, ()), str(attempt["reason"]))
                if "traceback" in attempt:
                    tracebacks[str(attempt["reason"])] = str(attempt["traceback"])
        return cls(tuple(failed), reasons, tracebacks)


@dataclasses.dataclass(frozen=True)
class _Cached:
    """A study as it was last read, and the attributes that it had then, without its holder."""

    study: Standing
    attributes: Mapping[str, Any]


class HistoryReader:
    """The studies of one database, as fresh as their last :meth:`read`. Safe to share between threads.

    All methods raise :class:`StudyStoreError` where the database cannot be read, or a newer lcsc_opt has made one of
    its studies. Of a study that was deleted since it was read, more cannot be read: that raises :class:`KeyError`.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._cached_storage = get_storage(storage)
        self._file = _file_of(storage)
        self._studies: dict[str, _Cached] = {}
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

    def experiments(self) -> list[str]:
        """The experiments that the database holds, the newest last."""
        return list(dict.fromkeys(split_name(name)[0] for name in self.names()))

    def read(self, experiment: str) -> tuple[Standing, ...]:
        """How the searches of an experiment stand now, without their trials, in order of creation.

        Raises:
            StudyStoreError: there is no such experiment, and the message lists all.
        """
        names = self.names()
        names_of_experiment = [name for name in names if split_name(name)[0] == experiment]
        if not names_of_experiment:
            experiments = sorted({split_name(name)[0] for name in names})
            listed = ", ".join(experiments) or "none"
            guess = near_miss(experiment, experiments)
            raise StudyStoreError(f"{experiment}: no such experiment{guess}; the database holds: {listed}")
        return self.read_studies(names_of_experiment)

    def read_studies(self, names: Iterable[str] | None = None) -> tuple[Standing, ...]:
        """The studies of these names as they are now, in this order; those that do not exist are left out.

        Args:
            names: ``None`` for all studies.

        Raises:
            StudyStoreError: a name is not ``experiment/optimizer/seed``, or the database cannot be read.
        """
        with self._lock:
            studies = self._our_studies()
            self._forget_what_is_gone(studies)
            wanted_names = list(studies if names is None else names)
            running = locked(self.storage, wanted_names)
            standings = []
            for name in wanted_names:
                split_name(name)  # raises
                if name not in studies:
                    continue
                try:
                    standings.append(self._read(name, studies[name], is_running=name in running))
                except (KeyError, StudyStoreError):
                    if name in our_studies(self.storage):
                        raise
                    # else it was deleted since the names were read
        return tuple(standings)

    def read_study(self, name: str) -> Standing:
        """One study as it is now.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or there is no such study.
        """
        for study in self.read_studies([name]):
            return study
        raise StudyStoreError(f"{name}: is not in the database, or was deleted while it was read")

    def trials(self, study: Standing) -> Trials:
        """``[n]`` of :data:`TRIAL`, the trials of a study by number, as they are now."""
        return trial_rows(self._trials(study))

    def failures(self, study: Standing) -> Failures:
        """Why attempts failed. The trials are read only where one has failed, or may have."""
        summary = study.summary
        if not summary.failed and not summary.retried and summary.evaluations == summary.trials:
            return Failures.of([])
        return Failures.of(self._trials(study))

    def answer(self, study: Standing) -> Floats | None:
        """The coefficients, ``[K]`` or ``[S, K]``, of the study's best model; ``None`` while there is none.

        That is the one that a report found, else the best trial.
        """
        if study.found is not None and study.found.model.trial is None:  # a mean of several
            return study.found.model.coefficients
        if study.chosen is None:
            return None
        coefficients: Floats = self.coefficients(study, [study.chosen])[0]
        return coefficients

    def coefficients(self, study: Standing, numbers: Sequence[int]) -> Floats:
        """``[m, K]``, or ``[m, S, K]`` with layer groups; NaN where a trial stores none. Only these trials are read.

        Raises:
            StudyStoreError: there is no trial of one of these numbers.
        """
        arrays = [coefficients_of(self._trial(study, number)) for number in numbers]
        shapes = [array.shape for array in arrays if array.size]
        shape = max(shapes, key=len, default=(len(study.steps),))  # with rows if any of them has rows
        all_coefficients = np.full((len(arrays), *shape), np.nan)
        for place, array in zip(all_coefficients, arrays, strict=True):
            if array.size:
                place[...] = array
        return all_coefficients

    def _trial(self, study: Standing, number: int) -> FrozenTrial:
        """One trial.

        Raises:
            StudyStoreError: it does not exist, or no search asked it.
        """

        def read() -> FrozenTrial:
            trial_id = self._cached_storage.get_trial_id_from_study_id_trial_number(study.study_id, number)
            return self._cached_storage.get_trial(trial_id)

        with contextlib.suppress(KeyError):
            trial = in_database(self.storage, read)
            if is_ours(trial):
                return trial
        raise StudyStoreError(f"{study.study}: has no trial {number} of a search")

    def _trials(self, study: Standing) -> list[FrozenTrial]:
        """The trials that a study shows, as they are now, with losses as values.

        Raises:
            KeyError: it was deleted.
        """
        trials = in_database(self.storage, lambda: self._cached_storage.get_all_trials(study.study_id, deepcopy=False))
        return shown_trials(trials, sign=study.sign, forgotten=study.forgotten)

    def _forget_what_is_gone(self, studies: Mapping[str, Mapping[str, Any]]) -> None:
        """Forget what was read if another file has the database's name by now, or a study that was read is gone.

        Another one may have its name, or its key. Optuna's cache would mix their trials.
        """
        file = _file_of(self.storage)
        was_made = {name: cached.attributes.get("created") for name, cached in self._studies.items()}
        is_made = {name: studies.get(name, {}).get("created") for name in was_made}
        if file != self._file or was_made != is_made:
            self._cached_storage = get_storage(self.storage)
            self._file = file
            self._studies = {}

    def _read(self, name: str, attributes: Mapping[str, Any], *, is_running: bool) -> Standing:
        """One study as it is now. Its trials are read only while it has no summary.

        Raises:
            KeyError: it was deleted.
        """
        seen_attributes = {key: value for key, value in attributes.items() if key != HOLDER}
        cached = self._studies.get(name)
        if cached is not None and cached.attributes == seen_attributes:
            study = cached.study
            if not study.ended:  # else nobody adds trials
                summary = self._summary(study, attributes)
                if summary != study.summary:
                    study = self._with_summary(study, summary)
        else:
            study_id = in_database(self.storage, lambda: self.storage.get_study_id_from_name(name))
            study = _standing(study_id, name, attributes)
            study = self._with_summary(study, self._summary(study, attributes))
        self._studies[name] = _Cached(study, seen_attributes)
        return _with_holder(study, attributes, is_running=is_running)

    def _summary(self, study: Standing, attributes: Mapping[str, Any]) -> Summary:
        """The stored summary of a study, or that of its trials as they are now."""
        return Summary.stored(attributes) or summary_of(self._trials(study))

    def _with_summary(self, study: Standing, summary: Summary) -> Standing:
        """The study with a new summary, and the names of its loss and of a baseline's answer."""
        study = dataclasses.replace(study, summary=summary, revision=next(self._revisions))
        study = dataclasses.replace(study, metric=_name_for_people(study, summary.metric))
        if study.optimizer in BASELINES:
            coefficients = self.answer(study)
            if coefficients is not None:  # other coefficients than those of averages have no name
                study = dataclasses.replace(study, average=average_name(coefficients, study.steps))
        return study


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


def _with_holder(study: Standing, attributes: Mapping[str, Any], *, is_running: bool) -> Standing:
    """The study with the machine that runs it now, if one does."""
    holder = None
    if is_running:
        holder = attributes.get(HOLDER)
    return dataclasses.replace(study, holder=None if holder is None else holder["host"])


def _standing(study_id: int, name: str, attributes: Mapping[str, Any]) -> Standing:
    """A study with all that its user attributes say, without its trials' summary and who runs it."""
    specification = attributes.get("specification") or {}
    budget = attributes.get("budget") or {}
    yardstick = search_yardstick(attributes)
    return Standing(
        study_id,
        name,
        *split_name(name),
        steps=tuple(attributes.get("steps") or ()),
        layer_groups=tuple(attributes.get("layer_groups") or ()),
        start=specification.get("start"),
        settings=specification,
        workers=_worker_count(specification.get("workers", 1)),
        sign=sign_of(attributes),
        forgotten=forgotten_trials(attributes),
        holds_out=attributes.get("holds_out") is not False,
        keeps=yardstick is not None and yardstick.kept is not None,
        budget={unit: int(total) for unit, total in budget.items() if total is not None},
        ended=bool(attributes.get("search_ended")),
        report=attributes.get(REPORT),
    )


def _worker_count(workers: Any) -> int:
    """How many workers a stored specification has; ``auto`` counts as one."""
    if isinstance(workers, Mapping):
        return int(workers["ray"])
    if isinstance(workers, Sequence) and not isinstance(workers, str):
        return len(workers)
    if isinstance(workers, int):
        return workers
    return 1


def _name_for_people(study: Standing, name: str) -> str:
    """What the loss of a study is called: with a penalty it is no metric; and a maximized one is a score."""
    if study.keeps:
        return "loss"
    if study.sign < 0 and name == "loss":
        return "score"
    return name
