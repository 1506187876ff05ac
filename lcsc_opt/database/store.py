"""The Optuna study database: written by the process that runs a study, read by anybody.

One Optuna study stands for one (study file, optimizer, seed) and is called ``digits/LCSC/0``. The number of a trial
is the index of its ask, until failed trials are forgotten. Everything is reachable with plain Optuna:

=====================  =======================================================================================
trial                  value (the loss), state (``PRUNED`` where the loss does not compare with others),
                       ``datetime_start``, ``datetime_complete``; for Optuna's plots the parameters ``sum_abs`` (Σ|a|)
                       and ``effective`` (checkpoints that matter)
user attributes        ``coefficients`` [K] or [S, K] (see :mod:`lcsc_opt.database.arrays`), ``metrics``, ``cost``,
                       ``tell_index``; ``images`` and ``noise`` where other than the objective's were asked for,
                       ``gradient`` where one was, like ``coefficients``; ``attempts`` that failed, each with its
                       ``traceback``, and the ``reason`` of a failed trial; ``inherited`` of trials that were taken
                       over from another study;
                       ``tells_before`` where results are told as they are completed
study user attributes  when it is made: ``specification``, ``fingerprint``, ``steps`` [K], ``budget``,
                       ``optimizer_budget``, ``failures``, ``held_out_plan``, ``holds_out``, ``origin``, ``directory``,
                       ``created``, ``created_by``, ``forked_from``, ``parallelism``, ``layer_groups`` [S] by name,
                       ``plane`` of landscapes; later:
                       ``holder``, ``search_ended``, ``measured`` (models on other noise), ``held_out`` (the report),
                       ``retry``, ``changes``, ``ray``, ``nodes``, ``log``, ``notify``, ``logged``
=====================  =======================================================================================

A candidate is committed, in one transaction, before it is evaluated. Of its result, the attributes are committed first
and the state last, before the optimizer is told: a trial without its state is evaluated again. Whoever writes holds the
study's lock (:mod:`lcsc_opt.database.lock`).

Every read and write is tried again when the connection was lost. Each write can be repeated, since its commit may have
succeeded without its acknowledgement: nothing is lost or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import mimetypes
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients, Evaluation
from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.arrays import array_of, stored_array
from lcsc_opt.database.connection import in_database, quiet_optuna
from lcsc_opt.database.lock import Coordinator, lock_of
from lcsc_opt.database.names import SUCCEEDED, compared_trials
from lcsc_opt.database.urls import masked

_ARTIFACT = "artifacts:"  # Optuna's key of a system attribute that describes an artifact
_SUM_ABS = {"sum_abs": FloatDistribution(1.0, 1e6, log=True)}  # for Optuna's plots; the coefficients have no bound
_OF_ITS_STUDY = ("tell_index", "tells_before", "inherited")  # attributes that a copy of a trial lacks
_MAKING_SECONDS = 30.0  # how long another process may take to make a study
T = TypeVar("T")


def our_studies(storage: RDBStorage) -> dict[str, dict[str, Any]]:
    """Name → user attributes of the studies that lcsc_opt made, in the order in which they were created."""
    studies = in_database(storage, storage.get_all_studies)
    return {study.study_name: study.user_attrs for study in studies if _is_made_by_us(study.user_attrs)}


def _is_made_by_us(attributes: Mapping[str, Any]) -> bool:
    return str(attributes.get("created_by")).startswith("lcsc_opt")


def candidate_attributes(candidate: Candidate) -> dict[str, Any]:
    """The attributes of a trial that describe its candidate; images and noise only if they are not the defaults."""
    attributes: dict[str, Any] = {"coefficients": stored_array(candidate.coefficients)}
    if candidate.images is not None:
        attributes["images"] = candidate.images
    if candidate.noise != SEARCH:
        attributes["noise"] = dataclasses.asdict(candidate.noise)
    return attributes


class StoredStudy:
    """One study of the database, ``experiment/optimizer/seed``; ``key`` is the database's own key of it."""

    def __init__(self, storage: RDBStorage, name: str, study_id: int) -> None:
        self.storage, self.name, self.key = storage, name, study_id
        self._coordinator: Coordinator | None = None
        self._count: int | None = None  # of trials
        self._known: dict[str, Any] | None = None  # attributes, while nobody else writes them
        self._ids: dict[int, int] = {}  # number of a trial → the database's key

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredStudy:
        """Open an existing study.

        Raises:
            StudyStoreError: it is not there, and the message names what is; or another program made it.
        """
        try:
            study = cls(storage, name, in_database(storage, lambda: storage.get_study_id_from_name(name)))
        except KeyError as error:
            known = ", ".join(our_studies(storage)) or "none"
            raise StudyStoreError(f"{name}: no such study in {masked(storage.url)}; it holds: {known}") from error
        if not _is_made_by_us(study.attributes):
            raise StudyStoreError(f"{name}: is a study of another program; give yours another name, or --storage")
        return study

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredStudy:
        """Open a study, or create it with ``attributes``; of two processes that race for it, one creates it."""
        if name not in our_studies(storage):
            create(storage, name, attributes, exist_ok=True)
        return cls.open(storage, name)

    @property
    def attributes(self) -> dict[str, Any]:
        """The study's user attributes. While :meth:`hold` is open they are read once: nobody else writes them."""
        if self._known is not None:
            return dict(self._known)
        attributes = in_database(self.storage, lambda: self.storage.get_study_user_attrs(self.key))
        if self._coordinator is not None:
            self._known = dict(attributes)
        return attributes

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one user attribute of the study."""
        self._write(lambda: self.storage.set_study_user_attr(self.key, name, value))
        if self._known is not None:
            self._known[name] = json.loads(json.dumps(value))

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers, but those that :meth:`retry_failed` has forgotten."""
        forgotten = set((self.attributes.get("retry") or {}).get("forgotten", ()))
        trials = in_database(self.storage, lambda: self.storage.get_all_trials(self.key, deepcopy=False))
        return sorted((trial for trial in trials if trial.number not in forgotten), key=lambda trial: trial.number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the study's lock while this is open; each write sees first that it is still held.

        Raises:
            StudyStoreError: within seconds; the message says who holds it.
        """
        self._coordinator, self._count = Coordinator(self.storage, self.name, self.key), None
        try:
            self._coordinator.begin()
            yield
        finally:
            self._coordinator.end()
            self._coordinator = self._known = None

    def add_candidate(self, candidate: Candidate, *, tells_before: int | None = None) -> int:
        """Commit a candidate before its evaluation, as a RUNNING trial with the exact coefficients.

        Args:
            candidate: what is evaluated.
            tells_before: how many results were told before this ask, where tells do not follow the order of asks.

        Returns:
            The trial's number.
        """
        attributes = {**candidate_attributes(candidate), "tell_index": self._next}
        if tells_before is not None:
            attributes["tells_before"] = tells_before
        ranges = {**_SUM_ABS, "effective": FloatDistribution(1.0, float(candidate.coefficients.shape[-1]))}
        found = {"sum_abs": sum_abs(candidate.coefficients), "effective": effective_count(candidate.coefficients)}
        params = {name: min(max(float(found[name]), known.low), known.high) for name, known in ranges.items()}
        how: dict[str, Any] = {"params": params, "distributions": ranges}
        return self._add(create_trial(state=TrialState.RUNNING, user_attrs=attributes, **how))

    @property
    def _next(self) -> int:
        """The number of the next trial."""
        if self._count is None:
            self._count = in_database(self.storage, lambda: self.storage.get_n_trials(self.key))
        return self._count

    def _add(self, trial: FrozenTrial) -> int:
        number, attempts = self._next, itertools.count()

        def add() -> int:
            if next(attempts):  # an earlier attempt may have been committed
                with contextlib.suppress(KeyError):
                    return self.storage.get_trial_id_from_study_id_trial_number(self.key, number)
            return self.storage.create_new_trial(self.key, trial)

        self._ids[number] = self._write(add)
        self._count = number + 1
        return number

    def finish(self, number: int, evaluation: Evaluation, *, tell_index: int, compares: bool = True) -> None:
        """Commit a result: metrics, cost and gradient, then the value and the state.

        The state is COMPLETE; PRUNED where the loss does not compare with those of other trials.
        """
        attributes: dict[str, Any] = {"metrics": dict(evaluation.metrics), "cost": dataclasses.asdict(evaluation.cost)}
        if evaluation.gradient is not None:
            attributes["gradient"] = stored_array(evaluation.gradient)
        optional = {"violation": evaluation.violation, "unseen": evaluation.unseen}
        attributes |= {name: value for name, value in optional.items() if value is not None}
        state = TrialState.COMPLETE if compares else TrialState.PRUNED
        self._end(number, state, attributes, tell_index, value=evaluation.loss)

    def fail(self, number: int, attempts: Sequence[Mapping[str, Any]], *, tell_index: int) -> None:
        """Commit a failure with its attempts, each with ``reason`` and ``seconds``; the last one is marked ``last``."""
        attributes = {
            "attempts": [*attempts[:-1], {**attempts[-1], "last": True}],  # first: a search that goes on looks there
            "reason": attempts[-1]["reason"],
            "cost": {"seconds": sum(attempt["seconds"] for attempt in attempts)},
        }
        self._end(number, TrialState.FAIL, attributes, tell_index)

    def note_attempts(self, number: int, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Commit the failed attempts of a trial that is evaluated again."""
        self._annotate(number, {"attempts": list(attempts)})

    def _end(
        self, number: int, state: TrialState, attributes: dict[str, Any], tell_index: int, value: float | None = None
    ) -> None:
        if tell_index != number:
            attributes["tell_index"] = tell_index
        json.dumps(attributes)  # whatever cannot be written fails before anything is
        trial_id = self._trial_id(number)

        def end() -> None:
            try:
                self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
            except RuntimeError:  # it has ended: by an attempt whose commit was not acknowledged?
                stored = self.storage.get_trial(trial_id)
                if (stored.state, stored.value) != (state, value):
                    raise StudyStoreError(f"{self.name}: trial {number} was finished by another process") from None

        with contextlib.suppress(RuntimeError):  # it has ended, see below
            self._annotate(number, attributes)
        self._write(end)

    def _annotate(self, number: int, attributes: Mapping[str, Any]) -> None:
        trial_id = self._trial_id(number)
        for name, value in attributes.items():
            self._write(functools.partial(self.storage.set_trial_user_attr, trial_id, name, value))

    def _trial_id(self, number: int) -> int:
        if number not in self._ids:
            found = self.storage.get_trial_id_from_study_id_trial_number
            self._ids[number] = in_database(self.storage, lambda: found(self.key, number))
        return self._ids[number]

    def retry_failed(self) -> int:
        """Forget the failures after the last success: their candidates are asked anew. The caller holds the study.

        A trial that failed before the last success stays failed, since all later candidates depend on that.

        Returns:
            How many trials were forgotten.
        """
        trials = [trial for trial in self.trials() if "inherited" not in trial.user_attrs]
        last = max((trial.number for trial in trials if trial.state in SUCCEEDED), default=-1)
        after = [trial for trial in trials if trial.number > last]
        tail = [trial.number for trial in after] if any(one.state == TrialState.FAIL for one in after) else []
        if tail:
            before = self.attributes.get("retry") or {}
            self.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            self.set_attribute("held_out", None)
            self.set_attribute("retry", {"forgotten": [*before.get("forgotten", ()), *tail]})
        return len(tail)

    def chosen_trial(self, number: int | None = None) -> tuple[int, Coefficients, dict[str, Any]]:
        """The trial to export: the given one, else the one chosen on other noise, else the best of the search.

        Returns:
            Its number, its coefficients and its user attributes with ``loss``, and with ``held_out`` if the
            report is of this trial.

        Raises:
            StudyStoreError: there is no such complete trial.
        """
        trials, report = self.trials(), self.attributes.get("held_out") or {}
        if number is None:
            best = min(compared_trials(trials), key=lambda trial: (trial.value, trial.number), default=None)
            if best is None:
                raise StudyStoreError(f"{self.name}: no complete trial on the search's noise yet; let it run on")
            number = int(report.get("trial", best.number))
        known = {trial.number: {**trial.user_attrs, "loss": trial.value} for trial in trials if trial.value is not None}
        if number not in known:
            raise StudyStoreError(f"{self.name}: trial {number} is not complete")
        if report.get("trial") == number:
            known[number]["held_out"] = {key: report.get(key) for key in ("loss", "metrics", "images", "groups")}
        return number, array_of(known[number]["coefficients"]), known[number]

    def artifacts(self, number: int | None = None) -> list[dict[str, Any]]:
        """``artifact_id``, ``filename``, ``mimetype`` and ``trial`` of each file of a trial, or of all, by filename."""
        stored = in_database(self.storage, lambda: self.storage.get_study_system_attrs(self.key))
        found = [json.loads(text) for name, text in stored.items() if name.startswith(_ARTIFACT)]
        wanted = [meta for meta in found if number is None or meta.get("trial") == number]
        return sorted(wanted, key=lambda meta: str(meta.get("filename")))

    def attach(self, number: int, folder: Path, path: Path) -> None:
        """Store a file of a trial in the folder of Optuna's artifacts, in place of an earlier one of this name."""
        own = f"{self.name} {self.attributes['created']} {number} {path.name}"
        artifact_id = str(uuid.uuid5(uuid.NAMESPACE_URL, own))
        with replacing(folder / artifact_id) as pending:
            pending.write_bytes(path.read_bytes())
        mimetype, encoding = mimetypes.guess_type(path)
        names = {"artifact_id": artifact_id, "filename": path.name, "trial": number}
        meta = {**names, "mimetype": mimetype or "application/octet-stream", "encoding": encoding}
        self._write(lambda: self.storage.set_study_system_attr(self.key, f"{_ARTIFACT}{artifact_id}", json.dumps(meta)))

    def copy(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Create another study, with these attributes, and every finished trial of this one, marked as inherited.

        Raises:
            StudyStoreError: a study of that name exists.
        """
        copies = []
        for trial in (trial for trial in self.trials() if trial.state.is_finished()):
            origin = trial.user_attrs.get("inherited") or {"study": self.name, "trial": trial.number}
            kept = {key: value for key, value in trial.user_attrs.items() if key not in _OF_ITS_STUDY}
            copies.append(create_trial(state=trial.state, value=trial.value, user_attrs={**kept, "inherited": origin}))
            copies[-1].datetime_start, copies[-1].datetime_complete = trial.datetime_start, trial.datetime_complete
        create(self.storage, name, attributes, copies)

    def delete(self) -> None:
        """Delete the study with its trials, in one transaction."""

        def delete() -> None:
            with contextlib.suppress(KeyError):  # deleted by an attempt that was not acknowledged
                self.storage.delete_study(self.key)

        self._write(delete)

    def _write(self, change: Callable[[], T]) -> T:
        """Call ``change``, which may be repeated, and again where it was not committed, or where that is not known."""

        def attempt() -> T:
            if self._coordinator is not None:
                self._coordinator.check()
            return change()

        return in_database(self.storage, attempt)


def create(
    storage: RDBStorage,
    name: str,
    attributes: Mapping[str, Any],
    trials: Sequence[FrozenTrial] = (),
    *,
    exist_ok: bool = False,
) -> None:
    """Create a study with trials that have ended. It is one of ours when all of it is there, not before.

    Raises:
        StudyStoreError: a study of that name exists, or another process creates it.
    """
    lock = lock_of(storage, name)
    deadline = time.monotonic() + _MAKING_SECONDS
    while not in_database(storage, lock.take):
        if exist_ok and name in our_studies(storage):
            return
        if time.monotonic() > deadline:
            raise StudyStoreError(f"{name}: is being made by another process")
        time.sleep(0.05)
    try:
        study = StoredStudy(storage, name, in_database(storage, lambda: _create_empty(storage, name)))
        known = study.attributes
        if exist_ok and _is_made_by_us(known):
            return
        if known or study._next:
            if "created" not in known or _is_made_by_us(known):
                raise StudyStoreError(f"{name}: exists already; give the study another name")
            study.delete()  # whoever began to make it was killed
            study = StoredStudy(storage, name, in_database(storage, lambda: _create_empty(storage, name)))
        study.set_attribute("created", time.time())
        for attribute, value in attributes.items():
            if attribute not in ("created", "created_by"):
                study.set_attribute(attribute, value)
        for trial in trials:
            study._add(trial)
        study.set_attribute("created_by", f"lcsc_opt {VERSION}")
    finally:
        lock.free()


def _create_empty(storage: RDBStorage, name: str) -> int:
    """The key of a study of this name, which is made where there is none."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        with quiet_optuna():
            return storage.create_new_study([StudyDirection.MINIMIZE], name)
