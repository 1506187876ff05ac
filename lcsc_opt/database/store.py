"""The Optuna study database: open it, write candidates and results, read them back.

One Optuna study stands for one (study file, optimizer, seed) and is called ``digits/LCSC/0``. The number of a trial
is the index of its ask. Everything is reachable with plain Optuna:

=====================  =======================================================================================
trial                  value (the loss), state (``PRUNED``, with the loss as its intermediate value, where that does
                       not compare with others), ``datetime_start``, ``datetime_complete``; for Optuna's plots the
                       parameters ``sum_abs`` (Σ|a|) and ``effective`` (checkpoints that matter)
user attributes        ``coefficients`` [K], ``metrics``, ``cost``, ``tell_index``; ``images`` and ``noise`` where other
                       than the objective's were asked for, ``gradient`` [K] where one was; ``attempts`` that failed,
                       each with its ``traceback``, and the ``reason`` of a failed trial; ``told_failed`` where one is
                       evaluated again, and its optimizer told of the failure; ``held_out``, ``selection`` of trials
                       scored on other noise, ``look_held_out``, ``look_selection`` where this did not become the
                       study's result; ``inherited`` of trials that were taken over from another study;
                       ``tells_before`` where results are told as they are completed
study user attributes  when it is made: ``specification``, ``fingerprint``, ``steps`` [K], ``budget``,
                       ``optimizer_budget``, ``failures``, ``held_out_plan``, ``holds_out``, ``origin``, ``directory``,
                       ``created_by``, ``forked_from``, ``plane`` of landscapes; later: ``parallelism`` (``in_flight``:
                       how many trials may be between ask and tell; ``spread_images``), ``search_ended``, ``held_out``
                       (the report), ``baselines`` (what was measured of EMA* and the like on held-out noise),
                       ``changes``; ``ray`` (which cluster evaluates), ``nodes`` (what the workers of each machine
                       do, written now and then while a search with workers is run)
=====================  =======================================================================================

A candidate is committed, in one transaction, before it is evaluated; its result is committed, in one transaction,
before the optimizer is told. Whoever writes holds the study's lock (:mod:`lcsc_opt.database.lock`).

Every read and write is tried again when the connection was lost. A commit may then have succeeded without its
acknowledgement, so each write first checks whether it was committed already: nothing is lost or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import mimetypes
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import SEARCH, Candidate, Evaluation
from lcsc_opt.database import tables
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.history import HOLDER
from lcsc_opt.database.lock import StudyLock, lock_of
from lcsc_opt.database.names import SUCCEEDED, differences
from lcsc_opt.database.urls import masked

TOLD_FAILED = "told_failed"  # of a trial whose optimizer was told of a failure, and which is evaluated again
RETAKE_SECONDS = 30.0
T = TypeVar("T")


def study_names(storage: RDBStorage) -> list[str]:
    """The names of all studies that lcsc_opt made, in the order in which they were created."""

    def read() -> list[str]:
        with storage.engine.connect() as connection:
            return list(tables.our_studies(connection))

    return in_database(storage, read)


def other_studies(storage: RDBStorage) -> int:
    """How many studies of the database were made by other programs; they are left alone."""

    def count() -> int:
        with storage.engine.connect() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(tables.STUDIES)) or 0)

    return in_database(storage, count) - len(study_names(storage))


@dataclasses.dataclass(frozen=True)
class TrialKey:
    """Which trial: its number in the study, and the database's own key."""

    number: int
    trial_id: int

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialKey:
        """The key of a trial that was read."""
        return cls(trial.number, trial._trial_id)


def candidate_attributes(candidate: Candidate) -> dict[str, Any]:
    """The attributes of a trial that describe its candidate; images and noise only where they differ from the
    defaults.
    """
    attributes: dict[str, Any] = {"coefficients": candidate.coefficients.tolist()}
    if candidate.images is not None:
        attributes["images"] = candidate.images
    if candidate.noise != SEARCH:
        attributes["noise"] = dataclasses.asdict(candidate.noise)
    return attributes


class StoredStudy:
    """One study of the database: written by one runner, read by anybody.

    Attributes:
        storage: Optuna's.
        name: ``experiment/optimizer/seed``.
    """

    def __init__(self, storage: RDBStorage, name: str, study_id: int) -> None:
        self.storage, self.name, self._study_id = storage, name, study_id
        self._lock: StudyLock | None = None
        self._holder: dict[str, Any] = {}

    @property
    def key(self) -> int:
        """The database's own key of the study."""
        return self._study_id

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredStudy:
        """Open an existing study.

        Raises:
            StudyStoreError: it is not there, and the message names what is; or another program made it.
        """
        try:
            study = cls(storage, name, in_database(storage, lambda: storage.get_study_id_from_name(name)))
        except KeyError as error:
            known = ", ".join(study_names(storage)) or "none"
            raise StudyStoreError(f"{name}: no such study in {masked(storage.url)}; it holds: {known}") from error
        if name not in study_names(storage):
            raise StudyStoreError(f"{name}: is a study of another program; give yours another name, or --storage")
        return study

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredStudy:
        """Open a study, or create it with all of ``attributes`` at once.

        Two processes may race for it: one of them creates it.
        """

        def create_if_missing() -> None:
            try:
                storage.get_study_id_from_name(name)
            except KeyError:
                with contextlib.suppress(sa.exc.IntegrityError):
                    create(storage, name, attributes)

        in_database(storage, create_if_missing)
        return cls.open(storage, name)

    @property
    def attributes(self) -> dict[str, Any]:
        """The study's user attributes."""
        return in_database(self.storage, lambda: self.storage.get_study_user_attrs(self._study_id))

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one user attribute of the study."""

        def write() -> None:
            self._keep_lock()
            self.storage.set_study_user_attr(self._study_id, name, value)

        in_database(self.storage, write)

    def require(self, attribute: str, expected: Any, *, part: str | None = None) -> None:
        """Check that the study was made with these settings, in an attribute or one part of it.

        Raises:
            StudyStoreError: it was made with others; the message names every difference.
        """
        stored = self.attributes.get(attribute)
        if part is not None and isinstance(stored, Mapping):
            attribute, stored = f"{attribute}.{part}", stored.get(part)
        found = list(differences(stored, json.loads(json.dumps(expected)), attribute))
        if found:
            raise StudyStoreError(
                f"{self.name}: the stored study differs: {'; '.join(found)}. "
                "Give the study another name, or another --storage"
            )

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers."""
        trials = in_database(self.storage, lambda: self.storage.get_all_trials(self._study_id, deepcopy=False))
        return sorted(trials, key=lambda trial: trial.number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the study's lock while this is open; each write sees first that it is still held.

        Raises:
            StudyStoreError: within seconds; the message says who holds it.
        """
        lock = lock_of(self.storage, self.name)
        if not in_database(self.storage, lock.take):
            holder = self.attributes.get(HOLDER) or {"host": "another machine", "process": "?", "since": 0.0}
            since = datetime.datetime.fromtimestamp(holder["since"]).astimezone().isoformat(" ", "seconds")
            who = f"on {holder['host']} by process {holder['process']} since {since}"
            raise StudyStoreError(f"{self.name}: is being run {who}; wait for it, or end it")
        self._lock, self._holder = lock, {"host": platform.node(), "process": os.getpid(), "since": time.time()}
        try:
            self.set_attribute(HOLDER, self._holder)
            yield
        finally:
            self._lock = None
            lock.free()

    def _keep_lock(self) -> None:
        """Take the lock again where it was lost with a connection, unless somebody else ran the study meanwhile.

        Raises:
            StudyStoreError: somebody did.
        """
        if self._lock is None or self._lock.is_held():
            return
        deadline = time.monotonic() + RETAKE_SECONDS  # a server may not have noticed yet that the connection is lost
        while not (taken := self._lock.take()) and time.monotonic() < deadline:
            time.sleep(RETAKE_SECONDS / 100)
        if not taken or self.storage.get_study_user_attrs(self._study_id).get(HOLDER) != self._holder:
            self._lock.free()
            raise StudyStoreError(f"{self.name}: another process runs this study; nothing more was written from here")

    def add_candidate(self, candidate: Candidate, *, tells_before: int | None = None) -> TrialKey:
        """Commit a candidate before its evaluation, as a RUNNING trial with the exact coefficients.

        ``tells_before`` is how many results were told before this ask, where tells do not follow the order of asks.
        """
        attributes = candidate_attributes(candidate)
        if tells_before is not None:
            attributes["tells_before"] = tells_before
        number: int | None = None  # of an attempt whose commit was not acknowledged

        def add(connection: sa.Connection) -> TrialKey:
            nonlocal number
            if number is not None:
                trial_id = tables.find_running(connection, self._study_id, number, attributes)
                if trial_id is not None:
                    return TrialKey(number, trial_id)
            number, trial_id = tables.insert_running(connection, self._study_id, attributes, candidate.coefficients)
            return TrialKey(number, trial_id)

        return self._write(add)

    def finish(self, trial: TrialKey, evaluation: Evaluation, *, tell_index: int, compares: bool = True) -> None:
        """Commit a result: value, metrics, cost, gradient and the state, together.

        The state is COMPLETE; PRUNED where the loss does not compare with those of other trials.
        """
        attributes: dict[str, Any] = {
            "metrics": dict(evaluation.metrics),
            "cost": evaluation.cost.as_dict(),
            "tell_index": tell_index,
        }
        if evaluation.gradient is not None:
            attributes["gradient"] = evaluation.gradient.tolist()
        if evaluation.excess is not None:
            attributes["excess"] = evaluation.excess
        state = TrialState.COMPLETE if compares else TrialState.PRUNED
        self._close(trial, state, attributes, value=evaluation.loss)

    def fail(self, trial: TrialKey, attempts: Sequence[Mapping[str, Any]], *, tell_index: int) -> None:
        """Commit a failure with its attempts, each with ``reason`` and ``seconds``; the last reason is the trial's."""
        attributes = {
            "reason": attempts[-1]["reason"],
            "attempts": list(attempts),
            "cost": {"seconds": sum(attempt["seconds"] for attempt in attempts)},
            "tell_index": tell_index,
        }
        self._close(trial, TrialState.FAIL, attributes, value=None)

    def retry_failed(self) -> tuple[int, int]:
        """Reopen failed trials, so that they are evaluated again when the study continues. The caller holds the study.

        Failures after the last success are forgotten; their candidates are asked anew. A trial that failed before the
        last success keeps its candidate. Its optimizer is told of the failure again, since all later candidates depend
        on that; the new result counts everywhere else.

        Returns:
            How many trials are evaluated again, and how many were forgotten.
        """
        own = [trial for trial in self.trials() if "inherited" not in trial.user_attrs]
        last = max((trial.number for trial in own if trial.state in SUCCEEDED), default=-1)
        again = [trial for trial in own if trial.number < last and trial.state == TrialState.FAIL]
        tail = [trial for trial in own if trial.number > last]
        forgotten = tail if any(trial.state == TrialState.FAIL for trial in tail) else []

        def change(connection: sa.Connection) -> None:
            for trial in again:
                tables.reopen_trial(connection, trial._trial_id, forget=("reason", "attempts", "cost"))
                tables.replace_attributes(connection, trial._trial_id, {TOLD_FAILED: True})
            tables.delete_trials(connection, [trial._trial_id for trial in forgotten])

        if again or forgotten:
            self.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            self.set_attribute("held_out", None)
            self._write(change)
        return len(again), len(forgotten)

    def _close(self, trial: TrialKey, state: TrialState, attributes: Mapping[str, Any], *, value: float | None) -> None:
        """End a trial in one transaction on Optuna's tables; Optuna's interface would need one for each attribute."""

        def close(connection: sa.Connection) -> None:
            if not tables.end_trial(connection, trial.trial_id, state, attributes, value=value):
                raise StudyStoreError(f"{self.name}: trial {trial.number} was finished by another process")

        self._write(close)

    def annotate(self, trial: TrialKey, attributes: Mapping[str, Any]) -> None:
        """Write user attributes of a trial that has ended, such as its held-out metrics, in one transaction."""
        self._write(lambda connection: tables.replace_attributes(connection, trial.trial_id, attributes))

    def artifacts(self) -> list[str]:
        """The ids of the artifacts of its trials."""
        named = self._read(lambda connection: tables.named_artifacts(connection, self._study_id))
        return [artifact for _, artifact, _ in named]

    def stored_bytes(self) -> int:
        """About how many bytes of the database it takes."""
        return self._read(lambda connection: tables.stored_bytes(connection, self._study_id))

    def delete(self) -> None:
        """Delete the study with its trials, in one transaction."""
        self._write(lambda connection: tables.delete_study(connection, self._study_id))

    def attach(self, trial: TrialKey, store: FileSystemArtifactStore, path: Path) -> None:
        """Store a file as an Optuna artifact of a trial, in place of an earlier one of the same name.

        Optuna's own ``upload_artifact`` refuses trials that have ended. The file is stored before it is named in the
        database, and forgotten by the database before it is removed.
        """
        artifact_id = str(uuid.uuid4())
        with path.open("rb") as content:
            store.write(artifact_id, content)
        mimetype, encoding = mimetypes.guess_type(path)
        names = {"artifact_id": artifact_id, "filename": path.name}
        described = {**names, "mimetype": mimetype or "application/octet-stream", "encoding": encoding}
        replaced: set[str] = set()  # over all attempts: the first may have been committed
        self._write(lambda connection: replaced.update(tables.name_artifact(connection, trial.trial_id, described)))
        for old in replaced:
            with contextlib.suppress(optuna.artifacts.exceptions.ArtifactNotFound):
                store.remove(old)

    def _read(self, read: Callable[[sa.Connection], T]) -> T:
        def attempt() -> T:
            with self.storage.engine.connect() as connection:
                return read(connection)

        return in_database(self.storage, attempt)

    def _write(self, change: Callable[[sa.Connection], T]) -> T:
        """Call ``change`` in one transaction, and again where it was not committed, or where that is not known."""

        def attempt() -> T:
            self._keep_lock()
            with self.storage.scoped_session.session_factory.begin() as session:
                return change(session.connection())

        return in_database(self.storage, attempt)


def create(storage: RDBStorage, name: str, attributes: Mapping[str, Any], trials: Sequence[FrozenTrial] = ()) -> None:
    """Create a study in one transaction: it never exists without the specification that it was made from."""
    created = {**attributes, "created_by": f"lcsc_opt {VERSION}"}
    with storage.engine.begin() as connection:
        tables.create_study(connection, name, created, trials)
