"""The Optuna study database: written by the process that runs a study, read by anybody.

One Optuna study stands for one (study file, optimizer, seed) and is called ``digits/LCSC/0``. The number of a trial
is the index of its ask, until failed trials are forgotten. Everything is reachable with plain Optuna:

=====================  =======================================================================================
trial                  value (the loss; of a maximized score the score, in a study of that direction), state
                       (``PRUNED`` where the loss does not compare with others),
                       ``datetime_start``, ``datetime_complete``; for Optuna's plots one parameter, ``sum_abs`` (Σ|a|)
user attributes        ``coefficients`` [K] or [S, K] (see :mod:`lcsc_opt.database.arrays`), of steps [S, K] only
                       ``coefficients_sha256``; ``metrics``, ``cost``;
                       ``images`` and ``noise`` where other than the objective's were asked for, ``unbiased`` where
                       that was, ``gradient`` where one was, like ``coefficients``; ``violation``, and the loss's
                       ``without_groups``, where that is known (:class:`lcsc_opt.base.records.Evaluation`);
                       ``attempts`` that failed, each with its ``traceback``, and the ``reason`` of a failed trial
study user attributes  when it is made: ``specification`` (but what its experiment has), ``environment``,
                       ``maximize``, ``steps`` [K], ``budget``, ``optimizer_budget``, ``origin``, ``created``,
                       ``created_by``, ``schema``, ``key`` (what its losses are of),
                       ``parallelism``, ``layer_groups`` (layer → its rows); later:
                       ``holder``, ``search_ended``, ``retry``, ``summary``
                       (see :mod:`lcsc_opt.database.summary`)
=====================  =======================================================================================

A candidate is committed, in one transaction, before it is evaluated. Its result is committed in another one, before the
optimizer is told: a trial without its state is evaluated again. Whoever writes holds the study's lock
(:mod:`lcsc_opt.database.lock`).

Every read and write is tried again when the connection was lost. Each write can be repeated, since its commit may have
succeeded without its acknowledgement: nothing is lost or doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients, Cost, Evaluation, as_json
from lcsc_opt.coefficients.profiles import sum_abs
from lcsc_opt.database import names
from lcsc_opt.database.arrays import array_of, digest_of, stored_array
from lcsc_opt.database.connection import in_database, one_transaction, quiet_optuna
from lcsc_opt.database.history import sign_of
from lcsc_opt.database.lock import Coordinator
from lcsc_opt.database.states import COEFFICIENTS, SUCCEEDED, compared_trials, forgotten_trials, shown_trials
from lcsc_opt.database.summary import SUMMARY, Summary
from lcsc_opt.database.urls import masked

SCHEMA = 3
"""The version of the stored format, as the table above describes it."""

_ARTIFACT = "artifacts:"  # Optuna's key of a system attribute that describes an artifact
_SUM_ABS_RANGE = FloatDistribution(1.0, 1e6, log=True)  # the coefficients have no bound
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What lcsc_opt has made in a database, in the order in which it was created.

    Attributes:
        studies: the name of a search or a grid → its user attributes.
        experiments: the name of an experiment → its user attributes (:mod:`lcsc_opt.database.experiment`).
    """

    studies: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    experiments: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def of(self, experiment: str) -> dict[str, dict[str, Any]]:
        """Name → attributes of the studies of an experiment."""
        return {
            name: attributes for name, attributes in self.studies.items() if names.split_name(name)[0] == experiment
        }

    def experiment(self, name: str) -> dict[str, Any]:
        """The attributes of an experiment.

        Raises:
            StudyStoreError: there is none; or only its searches are left.
        """
        if name in self.experiments:
            return self.experiments[name]
        if not self.of(name):
            raise StudyStoreError(f"{name}: no such experiment; lcsc list has them")
        raise StudyStoreError(
            f"{name}: the Optuna study of this name was deleted, which says what its searches are of; lcsc run with "
            "its study file makes it again"
        )

    def searches(self, experiment: str) -> dict[str, dict[str, Any]]:
        """Name → attributes of its studies, without those that are of another problem."""
        foreign = self.foreign(experiment)
        return {name: attributes for name, attributes in self.of(experiment).items() if name not in foreign}

    def foreign(self, experiment: str) -> dict[str, dict[str, Any]]:
        """Name → attributes of the studies that have the experiment's name and another key: copies of others."""
        if experiment not in self.experiments:
            return {}
        key = self.experiments[experiment]["key"]["decides"]
        return {name: attributes for name, attributes in self.of(experiment).items() if attributes.get("key") != key}


def read_contents(storage: RDBStorage) -> Contents:
    """Read the user attributes of all studies.

    Raises:
        StudyStoreError: another version of lcsc_opt made one of them, in another format.
    """
    studies: dict[str, dict[str, Any]] = {}
    experiments: dict[str, dict[str, Any]] = {}
    for study in in_database(storage, storage.get_all_studies):
        is_ours = _is_made_by_us(study.user_attrs)
        if is_ours and names.has_study_form(study.study_name):  # a copy may have any name
            _check_schema(study.study_name, study.user_attrs)
            studies[study.study_name] = study.user_attrs
        elif is_ours and names.KEYS in study.user_attrs:
            _check_schema(study.study_name, study.user_attrs)
            experiments[study.study_name] = study.user_attrs
    return Contents(studies, experiments)


def read_attributes(storage: RDBStorage, names_of_studies: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name → user attributes of those studies that exist; no others are read."""
    found = {}
    for name in names_of_studies:
        with contextlib.suppress(KeyError):  # it does not exist
            _, found[name] = read_study(storage, name)
    return found


def no_such_study(storage: RDBStorage, contents: Contents, name: str) -> StudyStoreError:
    """Says which studies there are: those of this experiment or optimizer, else all; and what shows an experiment."""
    related = [other_name for other_name in contents.studies if other_name.startswith(f"{name}/")]
    relation = "its studies are" if related else "it holds"
    listed = ", ".join(related or contents.studies) or "none"
    message = f"{name}: no such study in {masked(storage.url)}; {relation}: {listed}"
    if name in contents.experiments:
        message += f". The whole experiment: lcsc compare {name}"
    return StudyStoreError(message)


def _is_made_by_us(attributes: Mapping[str, Any]) -> bool:
    return str(attributes.get("created_by")).startswith("lcsc_opt")


def _check_schema(name: str, attributes: Mapping[str, Any]) -> None:
    schema = attributes["schema"]
    if schema != SCHEMA:
        raise StudyStoreError(
            f"{name}: was stored by {attributes['created_by']} in schema {schema}, and lcsc_opt {VERSION} reads schema "
            f"{SCHEMA}; use that version, or give another --storage"
        )


CANDIDATE_ATTRIBUTES = (*COEFFICIENTS, "images", "noise", "unbiased")
"""All that a trial may store of its candidate."""


def candidate_attributes(candidate: Candidate) -> dict[str, Any]:
    """The attributes of a trial that describe its candidate; all but coefficients only if they are not the defaults.

    Of a step of many rows only a digest is stored: replay gives its coefficients again.
    """
    attributes: dict[str, Any] = {}
    if candidate.unbiased and candidate.coefficients.ndim > 1:
        attributes["coefficients_sha256"] = digest_of(candidate.coefficients)
    else:
        attributes["coefficients"] = stored_array(candidate.coefficients)
    if candidate.images is not None:
        attributes["images"] = candidate.images
    if candidate.noise != SEARCH:
        attributes["noise"] = dataclasses.asdict(candidate.noise)
    if candidate.unbiased:
        attributes["unbiased"] = True
    return attributes


def evaluation_of(trial: FrozenTrial) -> Evaluation:
    """The evaluation of a trial that has a value, which is a loss."""
    attributes = trial.user_attrs
    gradient = None
    if "gradient" in attributes:
        gradient = array_of(attributes["gradient"])
    columns = attributes.get("without_groups", {})
    return Evaluation(
        trial.value or 0.0,
        attributes.get("metrics", {}),
        Cost(**attributes.get("cost", {})),
        gradient=gradient,
        violation=attributes.get("violation"),
        unseen=attributes.get("unseen"),
        without_groups={name: array_of(column).tolist() for name, column in columns.items()},
    )


def _result_attributes(evaluation: Evaluation, *, every_error: bool = False) -> dict[str, Any]:
    """The attributes of a trial that describe its result, apart from the value.

    A search compares nothing but losses, so that it stores the errors of these alone.
    """
    attributes: dict[str, Any] = {
        "metrics": dict(evaluation.metrics),
        "cost": as_json(dataclasses.asdict(evaluation.cost)),
    }
    if evaluation.gradient is not None:
        attributes["gradient"] = stored_array(evaluation.gradient)
    if evaluation.violation is not None:
        attributes["violation"] = evaluation.violation
    if evaluation.unseen is not None:
        attributes["unseen"] = evaluation.unseen
    columns = {name: column for name, column in evaluation.without_groups.items() if every_error or name == "loss"}
    if columns:
        attributes["without_groups"] = {name: stored_array(np.asarray(column)) for name, column in columns.items()}
    return attributes


def _sum_abs_of(coefficients: Coefficients) -> tuple[dict[str, float], dict[str, BaseDistribution]]:
    """The one parameter of a trial, for Optuna's plots, and its distribution."""
    value = min(max(sum_abs(coefficients), _SUM_ABS_RANGE.low), _SUM_ABS_RANGE.high)
    return {"sum_abs": value}, {"sum_abs": _SUM_ABS_RANGE}


class StoredStudy:
    """One study of the database, ``experiment/optimizer/seed``; ``key`` is the database's own key of it.

    All methods raise :class:`StudyStoreError` where the database cannot be used, and those that write also where
    :meth:`hold` was open and another process has taken the lock, or where :attr:`guard` does.

    Attributes:
        storage, name, key: the same.
        attributes: its user attributes, as they were when it was opened or :meth:`hold` began, and as written since.
        sign: −1 where the loss is a score times −1, which is maximized; else 1.
        guard: is called before each write, by :func:`~lcsc_opt.database.connection.in_database`; raises if nothing may
            be written any more.
    """

    def __init__(self, storage: RDBStorage, name: str, study_id: int, attributes: Mapping[str, Any]) -> None:
        self.guard: Callable[[], None] = lambda: None
        self.storage = storage
        self.name = name
        self.key = study_id
        self.attributes = dict(attributes)
        self.sign = sign_of(attributes)
        self._coordinator: Coordinator | None = None
        self._trial_count: int | None = None  # also those of other programs; None while it is not known
        self._is_deleted = False
        self._trial_ids: dict[int, int] = {}  # number of a trial → the database's key

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredStudy:
        """Open an existing study.

        Raises:
            StudyStoreError: there is no such study, and the message lists all; or another program, or a newer version
                of lcsc_opt made it.
        """
        try:
            study = cls(storage, name, *read_study(storage, name))
        except KeyError as error:
            raise no_such_study(storage, read_contents(storage), name) from error
        if names.KEYS in study.attributes:  # an experiment, none of its studies
            raise no_such_study(storage, read_contents(storage), name)
        if not (_is_made_by_us(study.attributes) and names.has_study_form(name)):
            raise StudyStoreError(f"{name}: is a study of another program; give yours another name, or --storage")
        _check_schema(name, study.attributes)
        return study

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredStudy:
        """Open a study, or create it with ``attributes``; of two processes that race for it, one creates it.

        Raises:
            StudyStoreError: as :meth:`open`, for a study that exists.
        """
        return cls.created(storage, name, attributes) or cls.open(storage, name)

    @classmethod
    def created(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredStudy | None:
        """A study that was created with these attributes and no trials; ``None`` if there is one of this name."""
        ours = {"created": time.time(), "schema": SCHEMA, "created_by": f"lcsc_opt {VERSION}"}
        written = as_json({**attributes, **ours})
        key = in_database(storage, lambda: _create(storage, name, written))
        return None if key is None else cls(storage, name, key, written)

    # the study's attributes

    def stored_attributes(self) -> dict[str, Any]:
        """Its user attributes as they are now, which another process may have written. KeyError if it is gone."""
        return in_database(self.storage, lambda: self.storage.get_study_user_attrs(self.key))

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one user attribute of the study."""
        written = as_json(value)
        self._write(lambda: self.storage.set_study_user_attr(self.key, name, written))
        self.attributes[name] = written

    @property
    def summary(self) -> Summary:
        """The stored summary; while a search runs, and after a kill, there is none, and all trials are read."""
        return Summary.stored(self.attributes) or Summary.of(self.trials())

    # who may write

    def check_free(self) -> None:
        """Raise as :meth:`hold` would; nothing is written."""
        coordinator = Coordinator(self.storage, self.name, self.key)
        coordinator.take()
        coordinator.end()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the study's lock while this is open; each write checks first that it is still held. Not to be nested.

        Raises:
            StudyStoreError: within seconds; the message says who holds it.
        """
        self._coordinator = Coordinator(self.storage, self.name, self.key)
        self._trial_count = None  # others may have added some
        try:
            self._coordinator.begin()
            self.attributes = self.stored_attributes()  # nobody else writes them now
            try:
                yield
            finally:
                self._store_summary()
        finally:
            self._coordinator.end()
            self._coordinator = None

    def _write(self, change: Callable[[], T]) -> T:
        """Call ``change``, and again if its commit failed or may have; with a lock, first check that it is held."""

        def attempt() -> T:
            if self._coordinator is not None:
                self._coordinator.check()
            self.guard()
            return change()

        return in_database(self.storage, attempt)

    def _write_trial(self, change: Callable[[], T]) -> T:
        """:meth:`_write` a trial; first take away the summary, which does not count it: readers make another."""
        if self.attributes.get(SUMMARY) is not None:
            self.set_attribute(SUMMARY, None)
        return self._write(change)

    def _store_summary(self) -> None:
        """Store the summary of all trials, unless there is one. Where that fails, readers make it."""
        with contextlib.suppress(StudyStoreError):
            if not self._is_deleted and Summary.stored(self.attributes) is None:
                self.set_attribute(SUMMARY, self.summary.to_json())

    # its trials

    def trials(self) -> list[FrozenTrial]:
        """Our trials in the order of their numbers, with losses as values, without those that were forgotten.

        They are not to be changed: Optuna may share them.
        """
        trials = in_database(self.storage, lambda: self.storage.get_all_trials(self.key, deepcopy=False))
        self._trial_count = len(trials)
        return shown_trials(trials, sign=self.sign, forgotten=forgotten_trials(self.attributes))

    def trial(self, number: int) -> FrozenTrial:
        """One trial as Optuna reads it: of a maximized score, the value is the score.

        Raises:
            KeyError: there is no such trial.
        """
        trial_id = self._trial_id(number)
        return in_database(self.storage, lambda: self.storage.get_trial(trial_id))

    def add_candidate(self, candidate: Candidate) -> int:
        """Commit a candidate before its evaluation, as a RUNNING trial with the exact coefficients.

        Returns:
            The trial's number.
        """
        params, distributions = _sum_abs_of(candidate.coefficients)
        trial = create_trial(
            state=TrialState.RUNNING,
            user_attrs=candidate_attributes(candidate),
            params=params,
            distributions=distributions,
        )
        return self._add(trial)

    def add_ended(
        self, attributes: Mapping[str, Any], result: Evaluation | Mapping[str, Any], *, compares: bool
    ) -> FrozenTrial:
        """Commit a trial that was evaluated already, in one transaction.

        Args:
            attributes: of its candidate, and further ones.
            result: the evaluation; of a failed trial its attempt, with ``reason`` and ``seconds``.
            compares: whether its loss compares with those of other trials.

        Returns:
            The trial as :meth:`trials` has it, but for its number, which is not read.
        """
        value = None
        state = TrialState.FAIL
        if isinstance(result, Evaluation):
            value = self.sign * result.loss
            state = TrialState.COMPLETE if compares else TrialState.PRUNED
            of_result = _result_attributes(result, every_error=True)
        else:
            of_result = {"attempts": [result], "reason": result["reason"], "cost": {"seconds": result["seconds"]}}
        params, distributions = _sum_abs_of(array_of(attributes["coefficients"]))
        trial = create_trial(
            state=state,
            value=value,
            user_attrs=as_json({**attributes, **of_result}),
            params=params,
            distributions=distributions,
        )
        self._write(lambda: self.storage.create_new_trial(self.key, trial))
        [shown] = shown_trials([trial], sign=self.sign, forgotten=())
        return shown

    def _add(self, trial: FrozenTrial) -> int:
        """Commit a new trial and return its number, which is the next one unless plain Optuna has added others."""
        if self._trial_count is None:
            self._trial_count = in_database(self.storage, lambda: self.storage.get_n_trials(self.key))
        expected_number = self._trial_count
        is_first_attempt = True

        def add() -> tuple[int, int]:
            """The database's key, and the number."""
            nonlocal is_first_attempt
            if not is_first_attempt:  # an earlier attempt may have been committed
                with contextlib.suppress(KeyError):
                    key = self.storage.get_trial_id_from_study_id_trial_number(self.key, expected_number)
                    return key, expected_number
            is_first_attempt = False
            key = self.storage.create_new_trial(self.key, trial)
            with contextlib.suppress(KeyError):  # cheaper than the number, for which Optuna reads the whole trial
                if self.storage.get_trial_id_from_study_id_trial_number(self.key, expected_number) == key:
                    return key, expected_number
            return key, self.storage.get_trial_number_from_id(key)

        trial_id, number = self._write_trial(add)
        self._trial_ids[number] = trial_id
        self._trial_count = number + 1
        return number

    def finish(self, number: int, evaluation: Evaluation, *, compares: bool = True) -> None:
        """Commit a result: metrics, cost and gradient, then the value and the state.

        The state is COMPLETE; PRUNED where the loss does not compare with those of other trials.
        """
        state = TrialState.COMPLETE if compares else TrialState.PRUNED
        self._end(number, state, _result_attributes(evaluation), value=evaluation.loss)

    def fail(self, number: int, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Commit a failure with its attempts, one or more, each with ``reason`` and ``seconds``; the last is why."""
        attributes = {
            "attempts": list(attempts),
            "reason": attempts[-1]["reason"],
            "cost": {"seconds": sum(attempt["seconds"] for attempt in attempts)},
        }
        self._end(number, TrialState.FAIL, attributes)

    def note_attempts(self, number: int, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Commit the failed attempts of a trial that is evaluated again."""
        trial_id = self._trial_id(number)
        self._write_trial(lambda: self.storage.set_trial_user_attr(trial_id, "attempts", list(attempts)))

    def _end(
        self,
        number: int,
        state: TrialState,
        attributes: dict[str, Any],
        value: float | None = None,
    ) -> None:
        """Commit a result: attributes, state, and the loss as ``value``, in one transaction."""
        trial_id = self._trial_id(number)
        values = None
        if value is not None:
            values = [self.sign * value]

        def end() -> None:
            try:
                with one_transaction(self.storage):
                    for name, attribute in attributes.items():
                        self.storage.set_trial_user_attr(trial_id, name, attribute)
                    self.storage.set_trial_state_values(trial_id, state, values)
            except RuntimeError:  # it has ended: by an attempt whose commit was not acknowledged?
                stored = self.storage.get_trial(trial_id)
                if (stored.state, stored.values) != (state, values):
                    raise StudyStoreError(f"{self.name}: trial {number} was finished by another process") from None

        self._write_trial(end)

    def _trial_id(self, number: int) -> int:
        """The database's key of a trial."""
        if number not in self._trial_ids:
            self._trial_ids[number] = in_database(
                self.storage, lambda: self.storage.get_trial_id_from_study_id_trial_number(self.key, number)
            )
        return self._trial_ids[number]

    def retry_failed(self) -> int:
        """Forget the failures after the last success: their candidates are asked again. The caller holds the study.

        Where there are any, the study counts as unfinished again, and loses its summary.
        A trial that failed before the last success stays failed, since all later candidates depend on that.

        Returns:
            How many of the forgotten trials had failed; others were running when the search ended.
        """
        trials = self.trials()
        last_success = max((trial.number for trial in trials if trial.state in SUCCEEDED), default=-1)
        later_trials = [trial for trial in trials if trial.number > last_success]
        failed = sum(trial.state == TrialState.FAIL for trial in later_trials)
        if not failed:
            return 0
        forgotten = forgotten_trials(self.attributes).union(trial.number for trial in later_trials)
        self.set_attribute(SUMMARY, None)
        self.set_attribute("search_ended", None)  # before the others: a crash in between must leave work to do
        self.set_attribute("retry", {"forgotten": sorted(forgotten)})
        return failed

    def trial_or_best(self, number: int | None = None) -> FrozenTrial:
        """The complete trial of this number; without one, the best of the search. Its value is the loss.

        Raises:
            StudyStoreError: there is no such complete trial.
        """
        trials = self.trials()
        if number is None:
            best = min(compared_trials(trials), key=lambda trial: (trial.value, trial.number), default=None)
            if best is None:
                raise StudyStoreError(f"{self.name}: no comparable trial has finished yet; continue the search")
            return best
        trial = next((trial for trial in trials if trial.number == number), None)
        if trial is None:
            raise StudyStoreError(f"{self.name}: there is no trial {number}; it has {len(trials)}, from 0")
        if trial.value is None:
            raise StudyStoreError(f"{self.name}: trial {number} is not complete")
        return trial

    # its files

    def artifacts(self) -> list[dict[str, Any]]:
        """``artifact_id``, ``filename`` and ``mimetype`` of each file, by filename."""
        system_attributes = in_database(self.storage, lambda: self.storage.get_study_system_attrs(self.key))
        artifacts = [json.loads(text) for name, text in system_attributes.items() if name.startswith(_ARTIFACT)]
        return sorted(artifacts, key=lambda artifact: str(artifact.get("filename")))

    def attach(self, folder: Path, name: str, content: bytes) -> None:
        """Store a PNG under this name with the study; it replaces one of the same name.

        It lies in the folder of Optuna's artifacts.

        Raises:
            OSError: the folder is missing or cannot be written.
        """
        # the same for a file of this name; another one for a study that was deleted and made again
        identity = f"{self.name} {self.attributes['created']} {name}"
        artifact_id = str(uuid.uuid5(uuid.NAMESPACE_URL, identity))
        with replacing(folder / artifact_id) as pending:
            pending.write_bytes(content)
        artifact = {
            "artifact_id": artifact_id,
            "filename": name,
            "mimetype": "image/png",
            "encoding": None,
        }
        key = f"{_ARTIFACT}{artifact_id}"
        self._write(lambda: self.storage.set_study_system_attr(self.key, key, json.dumps(artifact)))

    # all of it

    def delete(self) -> None:
        """Delete the study with its trials, in one transaction; no error where it is gone already."""

        def write() -> None:
            with contextlib.suppress(KeyError):
                # SQLite gives the key of a deleted study to the next one
                if self.storage.get_study_id_from_name(self.name) == self.key:
                    self.storage.delete_study(self.key)

        self._write(write)
        self._is_deleted = True


def has_succeeded(storage: RDBStorage, name: str) -> bool:
    """Whether a trial of a study has a loss. The database is asked for its best one: reading all takes long.

    Raises:
        StudyStoreError: as :meth:`StoredStudy.open`.
    """
    study = StoredStudy.open(storage, name)
    try:
        in_database(storage, lambda: storage.get_best_trial(study.key))
    except ValueError:  # none is complete; others may have a loss that does not compare
        return in_database(storage, lambda: storage.get_n_trials(study.key, (TrialState.PRUNED,))) > 0
    return True


def write_together(storage: RDBStorage, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write user attributes of several studies, by their names, in one transaction; of deleted ones none."""

    def write() -> None:
        with one_transaction(storage):
            for name, written in attributes.items():
                with contextlib.suppress(KeyError):
                    key = storage.get_study_id_from_name(name)
                    for attribute, value in written.items():
                        storage.set_study_user_attr(key, attribute, value)

    if any(attributes.values()):
        in_database(storage, write)


def _create(storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> int | None:
    """The database's key of a study that is created in one transaction; ``None`` if there is one of this name."""
    # there may be one, of another process or of an earlier attempt whose commit was not acknowledged
    with contextlib.suppress(DuplicatedStudyError), one_transaction(storage), quiet_optuna():
        direction = StudyDirection.MAXIMIZE if attributes.get("maximize") else StudyDirection.MINIMIZE
        key = storage.create_new_study([direction], name)
        for attribute, value in attributes.items():
            storage.set_study_user_attr(key, attribute, value)
        return key
    return None


def read_study(storage: RDBStorage, name: str) -> tuple[int, dict[str, Any]]:
    """The database's key of a study, and its user attributes. Raises KeyError if there is none."""

    def read() -> tuple[int, dict[str, Any]]:
        key = storage.get_study_id_from_name(name)
        return key, storage.get_study_user_attrs(key)

    return in_database(storage, read)
