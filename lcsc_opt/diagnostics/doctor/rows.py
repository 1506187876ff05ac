"""What the database says of its studies, row by row, without trusting any of it.

Optuna's own reading stops at the first attribute that is no JSON; here such an attribute is named and left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from lcsc_opt.database.tables import ARTIFACT_PREFIX, models


@dataclasses.dataclass(frozen=True)
class TrialRows:
    """One trial.

    Attributes:
        key: the database's own.
        number: ``None`` or no number at all where it is damaged.
        state: the name of Optuna's state.
        values: ``(value, type)`` of each, the type by Optuna's name: ``FINITE``, ``INF_POS``, …
        attributes: those that could be read.
        unreadable: the names of those that could not.
        artifacts: artifact id → file name, ``None`` where its description cannot be read.
    """

    key: int
    number: Any
    state: str
    values: tuple[tuple[Any, str], ...]
    attributes: Mapping[str, Any]
    unreadable: tuple[str, ...]
    artifacts: Mapping[str, str | None]

    @property
    def own(self) -> bool:
        """Whether this study asked it, rather than taking it over from another one."""
        return "inherited" not in self.attributes

    @property
    def finished(self) -> bool:
        """Whether it has a result, be it a failure."""
        return self.state not in ("RUNNING", "WAITING")

    def lacks(self, attribute: str) -> bool:
        """Whether an attribute is not there at all."""
        return attribute not in self.attributes and attribute not in self.unreadable


@dataclasses.dataclass(frozen=True)
class StudyRows:
    """One study with all its trials, in the order in which they were created."""

    key: int
    name: str
    attributes: Mapping[str, Any]
    unreadable: tuple[str, ...]
    trials: tuple[TrialRows, ...]


def read_names(engine: sa.Engine) -> list[str]:
    """The names of all studies, in the order in which they were created."""
    with snapshot(engine) as connection:
        chosen = sa.select(models.StudyModel.study_name).order_by(models.StudyModel.study_id)
        return [str(name) for name in connection.scalars(chosen)]


def read_studies(engine: sa.Engine, names: Iterable[str]) -> list[StudyRows]:
    """The studies of these names, all as they were at one moment."""
    model = models.StudyModel
    with snapshot(engine) as connection:
        known = connection.execute(sa.select(model.study_name, model.study_id).order_by(model.study_id)).all()
        wanted = set(names)
        return [_study(connection, name, key) for name, key in known if name in wanted]


def named_artifacts(engine: sa.Engine) -> set[str]:
    """The ids of all artifacts that any study or trial of the database names, those of optuna-dashboard included."""
    kinds = (models.TrialSystemAttributeModel, models.StudySystemAttributeModel)
    with snapshot(engine) as connection:
        chosen = [sa.select(kind.key).where(kind.key.contains(ARTIFACT_PREFIX)) for kind in kinds]
        return {str(key).rpartition(":")[2] for statement in chosen for key in connection.scalars(statement)}


@contextlib.contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection whose reads are all of one moment, though somebody may be writing."""
    with engine.connect() as connection:
        if connection.dialect.name != "sqlite":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        else:
            raw: Any = connection.connection.dbapi_connection
            connection.begin()  # which a storage for writing turns into BEGIN IMMEDIATE
            if not raw.in_transaction:
                connection.exec_driver_sql("BEGIN")
        yield connection


def _study(connection: sa.Connection, name: str, key: int) -> StudyRows:
    model = models.StudyUserAttributeModel
    rows = connection.execute(sa.select(model.key, model.value_json).where(model.study_id == key))
    attributes, unreadable = _parsed((str(name), text) for name, text in rows)
    return StudyRows(key, name, attributes, unreadable, tuple(_trials(connection, key)))


def _trials(connection: sa.Connection, study: int) -> Iterator[TrialRows]:
    trial, value = models.TrialModel, models.TrialValueModel
    values = _grouped(connection, study, value, value.value, sa.cast(value.value_type, sa.String))
    user, system = (
        _grouped(connection, study, kind, kind.key, kind.value_json)
        for kind in (models.TrialUserAttributeModel, models.TrialSystemAttributeModel)
    )
    columns = (trial.trial_id, trial.number, sa.cast(trial.state, sa.String))
    chosen = sa.select(*columns).where(trial.study_id == study).order_by(trial.trial_id)
    for key, number, state in connection.execute(chosen):
        attributes, unreadable = _parsed(user.get(key, ()))
        artifacts = {
            name.removeprefix(ARTIFACT_PREFIX): _filename(text)
            for name, text in system.get(key, ())
            if name.startswith(ARTIFACT_PREFIX)
        }
        yield TrialRows(key, number, state, tuple(values.get(key, ())), attributes, unreadable, artifacts)


def _grouped(connection: sa.Connection, study: int, model: Any, *columns: Any) -> dict[int, list[tuple[Any, Any]]]:
    """Two columns of a table of things that trials have, by trial."""
    trial = models.TrialModel
    chosen = sa.select(model.trial_id, *columns).join(trial, trial.trial_id == model.trial_id)
    found: dict[int, list[tuple[Any, Any]]] = {}
    for key, first, second in connection.execute(chosen.where(trial.study_id == study)):
        found.setdefault(key, []).append((first, second))
    return found


def _parsed(rows: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    readable, unreadable = {}, []
    for name, text in rows:
        try:
            readable[name] = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            unreadable.append(name)
    return readable, tuple(unreadable)


def _filename(text: Any) -> str | None:
    try:
        return str(json.loads(json.loads(text))["filename"])  # Optuna stores a string of JSON
    except (TypeError, ValueError, KeyError):
        return None
