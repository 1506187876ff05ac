"""Statements on Optuna's tables, of which the transactions of a study store consist.

Everything here happens inside a transaction that the caller begins and ends. The statements are made once and sent by
the connection: with objects of Optuna's classes in a session, a trial took twice as long (``benchmarks/store.py``).
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages._rdb import models as models  # all of Optuna's own classes that lcsc_opt touches
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import effective_count, sum_abs

LARGEST_SUM_ABS = 1e6  # of the parameter that Optuna's plots show; the coefficients themselves have no bound
ARTIFACT_PREFIX = "artifacts:"  # Optuna's key of a system attribute that describes an artifact

STUDIES, STUDY_ATTRIBUTES = models.StudyModel.__table__, models.StudyUserAttributeModel.__table__
DIRECTIONS = models.StudyDirectionModel.__table__
TRIALS, VALUES = models.TrialModel.__table__, models.TrialValueModel.__table__
INTERMEDIATE = models.TrialIntermediateValueModel.__table__
ATTRIBUTES, PARAMETERS = models.TrialUserAttributeModel.__table__, models.TrialParamModel.__table__
SYSTEM_ATTRIBUTES, HEARTBEATS = models.TrialSystemAttributeModel.__table__, models.TrialHeartbeatModel.__table__

_WRITTEN = (
    STUDIES,
    DIRECTIONS,
    STUDY_ATTRIBUTES,
    TRIALS,
    VALUES,
    INTERMEDIATE,
    ATTRIBUTES,
    PARAMETERS,
    SYSTEM_ATTRIBUTES,
)
_INSERT = {table: sa.insert(table) for table in _WRITTEN}
_STUDY: sa.BindParameter[int] = sa.bindparam("of_study")
_TRIAL: sa.BindParameter[int] = sa.bindparam("of_trial")
_KEYS: sa.BindParameter[list[str]] = sa.bindparam("keys", expanding=True)
_COUNT = sa.select(sa.func.count()).select_from(TRIALS).where(TRIALS.c.study_id == _STUDY)
_OURS = (
    sa.select(STUDIES.c.study_name, STUDIES.c.study_id)
    .join(STUDY_ATTRIBUTES, STUDY_ATTRIBUTES.c.study_id == STUDIES.c.study_id)
    .where(STUDY_ATTRIBUTES.c.key == "created_by", STUDY_ATTRIBUTES.c.value_json.startswith('"lcsc_opt'))
    .order_by(STUDIES.c.study_id)
)
_NUMBERED = sa.select(TRIALS.c.trial_id).where(
    TRIALS.c.study_id == _STUDY, TRIALS.c.number == sa.bindparam("numbered"), TRIALS.c.state == TrialState.RUNNING
)
_NUMBERS = sa.select(TRIALS.c.number, TRIALS.c.trial_id).where(TRIALS.c.study_id == _STUDY)
_STATE = sa.select(TRIALS.c.state).where(TRIALS.c.trial_id == _TRIAL).with_for_update()
_END = sa.update(TRIALS).where(TRIALS.c.trial_id == _TRIAL)
_VALUE = sa.select(VALUES.c.value).where(VALUES.c.trial_id == _TRIAL)
_ATTRIBUTES = sa.select(ATTRIBUTES.c.key, ATTRIBUTES.c.value_json).where(ATTRIBUTES.c.trial_id == _TRIAL)
_FORGET = sa.delete(ATTRIBUTES).where(ATTRIBUTES.c.trial_id == _TRIAL, ATTRIBUTES.c.key.in_(_KEYS))
_ARTIFACTS = sa.select(SYSTEM_ATTRIBUTES.c.key, SYSTEM_ATTRIBUTES.c.value_json).where(
    SYSTEM_ATTRIBUTES.c.trial_id == _TRIAL, SYSTEM_ATTRIBUTES.c.key.startswith(ARTIFACT_PREFIX)
)
_FORGET_ARTIFACTS = sa.delete(SYSTEM_ATTRIBUTES).where(
    SYSTEM_ATTRIBUTES.c.trial_id == _TRIAL, SYSTEM_ATTRIBUTES.c.key.in_(_KEYS)
)


def our_studies(connection: sa.Connection) -> dict[str, int]:
    """Name → key of the studies that lcsc_opt made, in order of creation."""
    return {str(name): int(key) for name, key in connection.execute(_OURS)}


def unreadable_attributes(connection: sa.Connection, study_id: int) -> list[tuple[int | None, str]]:
    """Each user attribute that is not JSON: number of its trial (``None``: of the study itself), and its name."""
    own = sa.select(sa.null(), STUDY_ATTRIBUTES.c.key, STUDY_ATTRIBUTES.c.value_json)
    trials = sa.select(TRIALS.c.number, ATTRIBUTES.c.key, ATTRIBUTES.c.value_json).join(
        TRIALS, TRIALS.c.trial_id == ATTRIBUTES.c.trial_id
    )
    found = []
    for statement in (own.where(STUDY_ATTRIBUTES.c.study_id == study_id), trials.where(TRIALS.c.study_id == study_id)):
        for number, name, text in connection.execute(statement):
            try:
                json.loads(text)
            except (TypeError, ValueError, RecursionError):
                found.append((number, str(name)))
    return found


def named_artifacts(connection: sa.Connection, study_id: int | None) -> list[tuple[int, str, str]]:
    """Number of the trial, artifact id and file name of each artifact of a study's trials.

    With ``None`` for the study, all artifacts in the database, those of studies and of optuna-dashboard included; the
    number is then 0.
    """
    trial = sa.select(TRIALS.c.number, SYSTEM_ATTRIBUTES.c.key, SYSTEM_ATTRIBUTES.c.value_json).join(
        TRIALS, TRIALS.c.trial_id == SYSTEM_ATTRIBUTES.c.trial_id
    )
    if study_id is not None:
        statements = [trial.where(TRIALS.c.study_id == study_id, SYSTEM_ATTRIBUTES.c.key.startswith(ARTIFACT_PREFIX))]
    else:
        kinds = (models.TrialSystemAttributeModel.__table__, models.StudySystemAttributeModel.__table__)
        statements = [
            sa.select(sa.literal(0), kind.c.key, kind.c.value_json).where(kind.c.key.contains(ARTIFACT_PREFIX))
            for kind in kinds
        ]
    rows = (row for statement in statements for row in connection.execute(statement))
    return [(int(number), str(key).rpartition(":")[2], _shown_filename(text)) for number, key, text in rows]


def _shown_filename(value_json: Any) -> str:
    try:
        return _filename(value_json)
    except (TypeError, ValueError, KeyError):
        return "without a readable description"


def versions(connection: sa.Connection) -> str:
    """Which version of Optuna made the tables."""
    return str(connection.scalar(sa.select(models.VersionInfoModel.library_version)))


def create_study(
    connection: sa.Connection, name: str, attributes: Mapping[str, Any], trials: Sequence[FrozenTrial] = ()
) -> None:
    """A study that minimizes, with its user attributes and with trials that have ended, numbered from 0.

    Raises:
        sqlalchemy.exc.IntegrityError: when a study of that name exists.
    """
    study_id = _key(connection.execute(_INSERT[STUDIES], {"study_name": name}))
    minimize = {"study_id": study_id, "objective": 0, "direction": StudyDirection.MINIMIZE}
    connection.execute(_INSERT[DIRECTIONS], minimize)
    _insert(connection, STUDY_ATTRIBUTES, _attribute_rows("study_id", study_id, attributes))
    _insert_ended(connection, study_id, trials)


def _insert_ended(connection: sa.Connection, study_id: int, trials: Sequence[FrozenTrial]) -> None:
    rows = [
        {
            **{"study_id": study_id, "number": number, "state": trial.state},
            **{"datetime_start": _utc(trial.datetime_start), "datetime_complete": _utc(trial.datetime_complete)},
        }
        for number, trial in enumerate(trials)
    ]
    _insert(connection, TRIALS, rows)
    ids = {number: int(key) for number, key in connection.execute(_NUMBERS, {"of_study": study_id})}
    attributes = [_attribute_rows("trial_id", ids[number], trial.user_attrs) for number, trial in enumerate(trials)]
    _insert(connection, ATTRIBUTES, [row for rows in attributes for row in rows])
    _insert_values(connection, [(ids[number], trial.state, trial.value) for number, trial in enumerate(trials)])


def delete_study(connection: sa.Connection, study_id: int) -> None:
    """Delete a study and all that belongs to it or its trials; nothing where it is gone already."""
    for table, of_study in reversed(_of_study(study_id)):
        connection.execute(sa.delete(table).where(of_study))


def stored_bytes(connection: sa.Connection, study_id: int) -> int:
    """About how much a study takes: the lengths of its texts, which are nearly all of it."""
    texts = [
        sa.select(sa.func.sum(sa.func.length(column))).where(of_study)
        for table, of_study in _of_study(study_id)
        for column in table.c
        if isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
    ]
    return sum(connection.scalar(text) or 0 for text in texts)


def _of_study(study_id: int) -> list[tuple[sa.Table, sa.ColumnElement[bool]]]:
    """Optuna's tables with rows of studies, and which rows are this study's. Tables that others refer to come first."""
    trials = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
    found = []
    for table in models.BaseModel.metadata.sorted_tables:
        if "study_id" in table.c:
            found.append((table, table.c.study_id == study_id))
        elif "trial_id" in table.c:
            found.append((table, table.c.trial_id.in_(trials)))
    return found


def insert_running(
    connection: sa.Connection, study_id: int, attributes: Mapping[str, Any], coefficients: Coefficients
) -> tuple[int, int]:
    """Insert a RUNNING trial with the next number. Returns its number and its key.

    Beside its user attributes it has two parameters for Optuna's own plots: Σ|a| and the effective number of
    checkpoints.
    """
    number = int(connection.execute(_COUNT, {"of_study": study_id}).scalar_one())
    started = datetime.datetime.now(datetime.timezone.utc)
    row = {"study_id": study_id, "number": number, "state": TrialState.RUNNING, "datetime_start": _utc(started)}
    trial_id = _key(connection.execute(_INSERT[TRIALS], row))
    _insert(connection, ATTRIBUTES, _attribute_rows("trial_id", trial_id, attributes))
    _insert(connection, PARAMETERS, _summary_rows(trial_id, coefficients))
    return number, trial_id


def find_running(connection: sa.Connection, study_id: int, number: int, attributes: Mapping[str, Any]) -> int | None:
    """The key of the RUNNING trial with this number and these attributes, if there is one."""
    keys = connection.scalars(_NUMBERED, {"of_study": study_id, "numbered": number}).all()
    return next((int(key) for key in keys if _has_attributes(connection, key, attributes)), None)


def end_trial(
    connection: sa.Connection, trial_id: int, state: TrialState, attributes: Mapping[str, Any], *, value: float | None
) -> bool:
    """End a RUNNING trial with its attributes, which take the place of earlier ones, and its value.

    Returns:
        Whether the trial now has exactly this result: it may have got it before, by an attempt whose commit was not
        acknowledged. ``False`` where it is gone, or has ended otherwise.
    """
    before = connection.execute(_STATE, {"of_trial": trial_id}).scalar_one_or_none()
    if before != TrialState.RUNNING:
        return before == state and _has_result(connection, trial_id, attributes, value)
    replace_attributes(connection, trial_id, attributes)
    _insert_values(connection, [(trial_id, state, value)])
    ended = datetime.datetime.now(datetime.timezone.utc)
    connection.execute(_END, {"of_trial": trial_id, "state": state, "datetime_complete": _utc(ended)})
    return True


def reopen_trial(connection: sa.Connection, trial_id: int, *, forget: Sequence[str]) -> None:
    """Make a failed trial RUNNING again, without these attributes."""
    connection.execute(_END, {"of_trial": trial_id, "state": TrialState.RUNNING, "datetime_complete": None})
    connection.execute(_FORGET, {"of_trial": trial_id, "keys": list(forget)})


def delete_trials(connection: sa.Connection, trial_ids: Sequence[int]) -> None:
    """Remove trials, with all that belongs to them."""
    for table in (VALUES, INTERMEDIATE, ATTRIBUTES, PARAMETERS, SYSTEM_ATTRIBUTES, HEARTBEATS, TRIALS):
        for trial_id in trial_ids:
            connection.execute(sa.delete(table).where(table.c.trial_id == trial_id))


def replace_attributes(connection: sa.Connection, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Write user attributes of a trial, in place of earlier ones of the same names."""
    rows = _attribute_rows("trial_id", trial_id, attributes)
    connection.execute(_FORGET, {"of_trial": trial_id, "keys": list(attributes)})
    _insert(connection, ATTRIBUTES, rows)


def name_artifact(connection: sa.Connection, trial_id: int, described: Mapping[str, Any]) -> list[str]:
    """Name a file in the database once, and forget others of the same filename. Returns the artifact ids of these.

    Args:
        connection: in a transaction.
        trial_id: whose file it is.
        described: Optuna's description with ``artifact_id`` and ``filename``.
    """
    known = connection.execute(_ARTIFACTS, {"of_trial": trial_id})
    same = {str(key) for key, text in known if _filename(str(text)) == described["filename"]}
    key = f"{ARTIFACT_PREFIX}{described['artifact_id']}"
    if key not in same:
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(json.dumps(described))}
        _insert(connection, SYSTEM_ATTRIBUTES, [row])
    if others := sorted(same - {key}):
        connection.execute(_FORGET_ARTIFACTS, {"of_trial": trial_id, "keys": others})
    return [other.removeprefix(ARTIFACT_PREFIX) for other in others]


def _filename(value_json: str) -> str:
    described = json.loads(json.loads(value_json))  # Optuna stores the description as a string of JSON
    return str(described["filename"])


def _has_result(connection: sa.Connection, trial_id: int, attributes: Mapping[str, Any], value: float | None) -> bool:
    stored = connection.execute(_VALUE, {"of_trial": trial_id}).scalar_one_or_none()
    return stored == value and _has_attributes(connection, trial_id, attributes)


def _has_attributes(connection: sa.Connection, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Whether a trial has these attributes with exactly these values; it may have others, too."""
    known = {str(key): str(text) for key, text in connection.execute(_ATTRIBUTES, {"of_trial": trial_id})}
    return all(known.get(key) == json.dumps(value) for key, value in attributes.items())


def _insert(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(_INSERT[table], rows)


def _key(inserted: sa.CursorResult[Any]) -> int:
    assert inserted.inserted_primary_key is not None
    return int(inserted.inserted_primary_key[0])


def _attribute_rows(owner: str, key: int, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{owner: key, "key": name, "value_json": json.dumps(value)} for name, value in attributes.items()]


def _insert_values(connection: sa.Connection, ended: Sequence[tuple[int, TrialState, float | None]]) -> None:
    """Insert the losses of trials; that of a pruned one also as its last intermediate value, as Optuna does."""
    known = [(trial_id, state, value) for trial_id, state, value in ended if value is not None]
    _insert(connection, VALUES, [_value_row(trial_id, value) for trial_id, _, value in known])
    pruned = [_intermediate_row(trial_id, value) for trial_id, state, value in known if state == TrialState.PRUNED]
    _insert(connection, INTERMEDIATE, pruned)


def _value_row(trial_id: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": 0, "value": stored, "value_type": kind}


def _intermediate_row(trial_id: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return {"trial_id": trial_id, "step": 0, "intermediate_value": stored, "intermediate_value_type": kind}


def _summary_rows(trial_id: int, coefficients: Coefficients) -> list[dict[str, Any]]:
    measured = {"sum_abs": sum_abs(coefficients), "effective": effective_count(coefficients)}
    rows = []
    for name, low, high, distribution in _summary_ranges(len(coefficients)):
        value = min(max(measured[name], low), high)
        row = {"param_name": name, "param_value": value, "distribution_json": distribution}
        rows.append({"trial_id": trial_id, **row})
    return rows


@functools.lru_cache(maxsize=8)
def _summary_ranges(count: int) -> tuple[tuple[str, float, float, str], ...]:
    ranges = (("sum_abs", 1.0, LARGEST_SUM_ABS), ("effective", 1.0, float(count)))
    return tuple(
        (name, low, high, distribution_to_json(FloatDistribution(low, high, log=name == "sum_abs")))
        for name, low, high in ranges
    )


def _utc(moment: datetime.datetime | None) -> datetime.datetime | None:
    """The time as Optuna's tables hold it: UTC, without a time zone. A time given without a time zone is local."""
    return None if moment is None else moment.astimezone(datetime.timezone.utc).replace(tzinfo=None)
