"""The Optuna study database: open it, write candidates and results, read them back.

One Optuna study stands for one (study file, optimizer, seed) and is called ``digits/LCSC/0``. The number of a trial
is the index of its ask. Everything is reachable with plain Optuna:

=====================  =======================================================================================
trial                  value (the loss), state, ``datetime_start``, ``datetime_complete``; for Optuna's plots the
                       parameters ``sum_abs`` (Σ|a|) and ``effective`` (checkpoints that matter)
user attributes        ``coefficients`` [K], ``metrics``, ``cost``, ``tell_index``; ``images`` and ``noise`` where other
                       than the objective's were asked for, ``gradient`` [K] where one was; ``attempts`` that failed,
                       and the ``reason`` of a failed trial; ``held_out``, ``selection`` of trials scored on other
                       noise; ``inherited`` of trials that were taken over from another study
study user attributes  ``specification``, ``fingerprint``, ``budget``, ``steps`` [K], ``search_ended``, ``held_out``
=====================  =======================================================================================

A candidate is committed, in one transaction, before it is evaluated; its result is committed, in one transaction,
before the optimizer is told. Whoever writes holds the study's lease (:mod:`lcsc_opt.lease`).

Every read and write is tried again when the connection was lost. A commit may then have succeeded without its
acknowledgement, so each write looks first whether it is there already: nothing is lost or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import mimetypes
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import orm

import lcsc_opt
from lcsc_opt.coefficients import effective_count, sum_abs
from lcsc_opt.database import created_once, in_database, masked
from lcsc_opt.errors import LeaseLostError, StudyMismatchError, StudyStoreError
from lcsc_opt.lease import Lease, create_table, hold
from lcsc_opt.records import SEARCH, Candidate, Coefficients, Evaluation

INHERITED_ATTRIBUTES = ("coefficients", "images", "noise", "metrics", "cost", "gradient", "reason", "attempts")
LARGEST_SUM_ABS = 1e6  # of the parameter that Optuna's plots show; the coefficients themselves have no bound
ARTIFACT_PREFIX = "artifacts:"  # Optuna's key of a system attribute that describes an artifact

T = TypeVar("T")


def study_names(storage: RDBStorage) -> list[str]:
    """The names of all studies, in the order in which they were created."""
    return [str(study.study_name) for study in in_database(storage, storage.get_all_studies)]


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
    """What a trial says of its candidate; of images and noise only what is not the objective's and the search's."""
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

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredStudy:
        """Open an existing study.

        Raises:
            StudyStoreError: when it is not there, naming what is.
        """
        try:
            return cls(storage, name, in_database(storage, lambda: storage.get_study_id_from_name(name)))
        except KeyError as error:
            known = ", ".join(study_names(storage)) or "none"
            raise StudyStoreError(f"{name}: no such study in {masked(storage.url)}; it holds: {known}") from error

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredStudy:
        """Open a study, or create it with ``attributes``, all of which are then there or none.

        Two processes may race for it: one of them creates it.
        """

        def create_if_missing() -> None:
            try:
                storage.get_study_id_from_name(name)
            except KeyError:
                with contextlib.suppress(sa.exc.IntegrityError):
                    _create(storage, name, attributes)

        in_database(storage, create_if_missing)
        return cls.open(storage, name)

    @property
    def attributes(self) -> dict[str, Any]:
        """The study's user attributes."""
        return in_database(self.storage, lambda: self.storage.get_study_user_attrs(self._study_id))

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one user attribute of the study."""
        in_database(self.storage, lambda: self.storage.set_study_user_attr(self._study_id, name, value))

    def require(self, attribute: str, expected: Any, *, part: str | None = None) -> None:
        """Check that the study was made with these settings, in an attribute or one part of it.

        Raises:
            StudyMismatchError: naming every difference.
        """
        stored = self.attributes.get(attribute)
        if part is not None and isinstance(stored, Mapping):
            attribute, stored = f"{attribute}.{part}", stored.get(part)
        differences = list(_differences(stored, json.loads(json.dumps(expected)), attribute))
        if differences:
            raise StudyMismatchError(
                f"{self.name}: the stored study differs: {'; '.join(differences)}. "
                "Give the study another name, or another --storage"
            )

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers."""
        trials = in_database(self.storage, lambda: self.storage.get_all_trials(self._study_id, deepcopy=False))
        return sorted(trials, key=lambda trial: trial.number)

    @contextlib.contextmanager
    def hold(self, *, take_over: bool = False) -> Iterator[None]:
        """Be the only one who writes this study: every transaction of this storage then checks the lease.

        Raises:
            StudyHeldError: at once, saying who holds it.
        """
        engine = self.storage.engine
        in_database(self.storage, lambda: created_once(lambda: create_table(engine)))
        sessions, since = self.storage.scoped_session.session_factory, time.time()
        with contextlib.ExitStack() as held:

            def take() -> Lease:
                return held.enter_context(hold(engine, self.name, self._study_id, take_over=take_over, since=since))

            lease = in_database(self.storage, take)
            sa.event.listen(sessions, "before_commit", lease.check)
            try:
                yield
            finally:
                sa.event.remove(sessions, "before_commit", lease.check)

    def add_candidate(self, candidate: Candidate, *, tells_before: int | None = None) -> TrialKey:
        """Commit what will be evaluated, as a RUNNING trial with its exact coefficients.

        ``tells_before``, where the order of tells is not that of the asks, is how many were told before this ask.
        """
        attributes = candidate_attributes(candidate)
        if tells_before is not None:
            attributes["tells_before"] = tells_before
        number: int | None = None  # of an attempt whose commit was not acknowledged

        def add(session: orm.Session) -> TrialKey:
            nonlocal number
            if number is not None and (trial_id := self._running(session, number, attributes)) is not None:
                return TrialKey(number, trial_id)
            model = models.TrialModel
            counted = sa.select(sa.func.count()).select_from(model).where(model.study_id == self._study_id)
            number = session.execute(counted).scalar_one()
            row = model(study_id=self._study_id, number=number, state=TrialState.RUNNING)
            row.datetime_start = datetime.datetime.now()
            session.add(row)
            session.flush()
            key = TrialKey(number, int(row.trial_id))
            _add_attributes(session, key.trial_id, attributes)
            _add_summary(session, key.trial_id, candidate.coefficients)
            return key

        return self._write(add)

    def _running(self, session: orm.Session, number: int, attributes: Mapping[str, Any]) -> int | None:
        """The database's key of the RUNNING trial with this number and these attributes, if there is one."""
        model = models.TrialModel
        chosen = sa.select(model.trial_id).where(
            model.study_id == self._study_id, model.number == number, model.state == TrialState.RUNNING
        )
        same = [key for key in session.scalars(chosen) if _has_attributes(session, key, attributes)]
        return int(same[0]) if same else None

    def finish(self, trial: TrialKey, evaluation: Evaluation, *, tell_index: int) -> None:
        """Commit a result: value, metrics, cost, gradient and the COMPLETE state, together."""
        attributes: dict[str, Any] = {
            "metrics": dict(evaluation.metrics),
            "cost": evaluation.cost.as_dict(),
            "tell_index": tell_index,
        }
        if evaluation.gradient is not None:
            attributes["gradient"] = evaluation.gradient.tolist()
        self._close(trial, TrialState.COMPLETE, attributes, value=evaluation.loss)

    def fail(self, trial: TrialKey, attempts: Sequence[Mapping[str, Any]], *, tell_index: int) -> None:
        """Commit a failure with its attempts, each a ``reason`` and its ``seconds``; the last one's is the trial's."""
        attributes = {
            "reason": attempts[-1]["reason"],
            "attempts": list(attempts),
            "cost": {"seconds": sum(attempt["seconds"] for attempt in attempts)},
            "tell_index": tell_index,
        }
        self._close(trial, TrialState.FAIL, attributes, value=None)

    def _close(self, trial: TrialKey, state: TrialState, attributes: Mapping[str, Any], *, value: float | None) -> None:
        """One transaction, through Optuna's own tables; its interface would need one for each attribute."""

        def close(session: orm.Session) -> None:
            row = session.get(models.TrialModel, trial.trial_id, with_for_update=True)
            if row is not None and _is_closed(session, row, state, attributes, value):
                return  # by an attempt whose commit was not acknowledged
            if row is None or row.state != TrialState.RUNNING:
                raise LeaseLostError(f"{self.name}: trial {trial.number} was finished by another process")
            row.state = state
            row.datetime_complete = datetime.datetime.now()
            _replace_attributes(session, trial.trial_id, attributes)
            if value is not None:
                session.add(_value(trial.trial_id, value))

        self._write(close)

    def annotate(self, trial: TrialKey, attributes: Mapping[str, Any]) -> None:
        """Write user attributes of a trial that has ended, such as its held-out metrics, in one transaction."""
        self._write(lambda session: _replace_attributes(session, trial.trial_id, attributes))

    def copy_to(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Create another study that holds every finished trial of this one, marked as inherited, in one transaction.

        Raises:
            StudyStoreError: when a study of that name exists.
        """
        finished = [trial for trial in self.trials() if trial.state.is_finished()]
        inherited = [self._inheritance(trial) for trial in finished]
        attempts = 0

        def create() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                _create(self.storage, name, attributes, inherited)
            except sa.exc.IntegrityError:
                return False
            return True

        if in_database(self.storage, create):
            return
        # it exists: perhaps by an attempt whose commit was not acknowledged
        if attempts == 1 or not StoredStudy.open(self.storage, name)._holds(attributes, len(inherited)):
            raise StudyStoreError(f"{name}: exists already; give the fork another name")

    def _holds(self, attributes: Mapping[str, Any], trials: int) -> bool:
        """Whether the study has these attributes, among others, and so many trials."""
        stored = self.attributes
        same = {key: stored.get(key) for key in attributes} == json.loads(json.dumps(dict(attributes)))
        return same and len(self.trials()) == trials

    def _inheritance(self, trial: FrozenTrial) -> FrozenTrial:
        origin = trial.user_attrs.get("inherited") or {"study": self.name, "trial": trial.number}
        kept = {key: trial.user_attrs[key] for key in INHERITED_ATTRIBUTES if key in trial.user_attrs}
        copied = create_trial(
            state=trial.state,
            value=trial.value,
            user_attrs={**kept, "inherited": origin},
        )
        copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
        return copied

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
        row = {
            "trial_id": trial.trial_id,
            "key": f"{ARTIFACT_PREFIX}{artifact_id}",
            "value_json": json.dumps(json.dumps(described)),
        }
        replaced: set[str] = set()  # over all attempts: the first may have been committed

        def name_it(session: orm.Session) -> None:
            known = {str(artifact.key): artifact for artifact in _artifacts_named(session, trial.trial_id, path.name)}
            if known.pop(str(row["key"]), None) is None:
                session.add(models.TrialSystemAttributeModel(**row))
            for artifact in known.values():
                session.delete(artifact)
            replaced.update(known)

        self._write(name_it)
        for old in replaced:
            with contextlib.suppress(optuna.artifacts.exceptions.ArtifactNotFound):
                store.remove(old.removeprefix(ARTIFACT_PREFIX))

    def _write(self, change: Callable[[orm.Session], T]) -> T:
        """One transaction; ``change`` is called again where it was not committed, or not known to be."""

        def attempt() -> T:
            with self.storage.scoped_session.session_factory.begin() as session:
                return change(session)

        return in_database(self.storage, attempt)


def _create(storage: RDBStorage, name: str, attributes: Mapping[str, Any], trials: Sequence[FrozenTrial] = ()) -> None:
    """One transaction: a study never exists without the specification that it was made from."""
    created = {**attributes, "created_by": f"lcsc_opt {lcsc_opt.__version__}"}
    direction = models.StudyDirectionModel(objective=0, direction=optuna.study.StudyDirection.MINIMIZE)
    with orm.Session(storage.engine) as session, session.begin():
        study = models.StudyModel(study_name=name, directions=[direction])
        session.add(study)
        session.flush()
        for key, value in created.items():
            row = {"study_id": study.study_id, "key": key, "value_json": json.dumps(value)}
            session.add(models.StudyUserAttributeModel(**row))
        for number, trial in enumerate(trials):
            _add_finished(session, int(study.study_id), number, trial)


def _add_finished(session: orm.Session, study_id: int, number: int, trial: FrozenTrial) -> None:
    row = models.TrialModel(study_id=study_id, number=number, state=trial.state)
    row.datetime_start, row.datetime_complete = trial.datetime_start, trial.datetime_complete
    session.add(row)
    session.flush()
    trial_id = int(row.trial_id)
    _replace_attributes(session, trial_id, trial.user_attrs)
    if trial.value is not None:
        session.add(_value(trial_id, trial.value))


def _add_summary(session: orm.Session, trial_id: int, coefficients: Coefficients) -> None:
    """Σ|a| and the effective number of checkpoints as Optuna parameters, which Optuna's own plots are drawn over."""
    rows = []
    ranges = {"sum_abs": (1.0, LARGEST_SUM_ABS), "effective": (1.0, float(len(coefficients)))}
    measured = {"sum_abs": sum_abs(coefficients), "effective": effective_count(coefficients)}
    for name, (low, high) in ranges.items():
        distribution = FloatDistribution(low, high, log=name == "sum_abs")
        value = min(max(measured[name], low), high)
        row = {"param_name": name, "param_value": value, "distribution_json": distribution_to_json(distribution)}
        rows.append({"trial_id": trial_id, **row})
    session.execute(sa.insert(models.TrialParamModel), rows)


def _value(trial_id: int, value: float) -> models.TrialValueModel:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return models.TrialValueModel(trial_id=trial_id, objective=0, value=stored, value_type=kind)


def _replace_attributes(session: orm.Session, trial_id: int, attributes: Mapping[str, Any]) -> None:
    model = models.TrialUserAttributeModel
    session.execute(sa.delete(model).where(model.trial_id == trial_id, model.key.in_(list(attributes))))
    _add_attributes(session, trial_id, attributes)


def _add_attributes(session: orm.Session, trial_id: int, attributes: Mapping[str, Any]) -> None:
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    session.execute(sa.insert(models.TrialUserAttributeModel), rows)


def _has_attributes(session: orm.Session, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Whether a trial has exactly these attributes, among others."""
    model = models.TrialUserAttributeModel
    stored = session.execute(sa.select(model.key, model.value_json).where(model.trial_id == trial_id))
    known = {str(key): str(value_json) for key, value_json in stored}
    return all(known.get(key) == json.dumps(value) for key, value in attributes.items())


def _is_closed(
    session: orm.Session, row: models.TrialModel, state: TrialState, attributes: Mapping[str, Any], value: float | None
) -> bool:
    """Whether a trial has ended already with exactly this result."""
    model = models.TrialValueModel
    stored = session.scalars(sa.select(model.value).where(model.trial_id == row.trial_id)).one_or_none()
    return bool(row.state == state and stored == value and _has_attributes(session, int(row.trial_id), attributes))


def _artifacts_named(session: orm.Session, trial_id: int, filename: str) -> list[Any]:
    model = models.TrialSystemAttributeModel
    chosen = sa.select(model).where(model.trial_id == trial_id, model.key.startswith(ARTIFACT_PREFIX))
    return [row for row in session.scalars(chosen) if _filename(str(row.value_json)) == filename]


def _filename(value_json: str) -> str:
    described = json.loads(json.loads(value_json))  # Optuna stores the description as a string of JSON
    return str(described["filename"])


def _differences(stored: Any, expected: Any, path: str) -> Iterable[str]:
    if isinstance(stored, Mapping) and isinstance(expected, Mapping):
        for key in sorted({*stored, *expected}):
            yield from _differences(stored.get(key), expected.get(key), f"{path}.{key}")
    elif stored != expected:
        yield f"{path} was {_short(stored)}, is now {_short(expected)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
