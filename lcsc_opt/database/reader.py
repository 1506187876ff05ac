"""Reads studies repeatedly, each time only what is new, for pages that refresh while a search runs.

A refresh is a handful of SELECTs over all studies at once, through Optuna's own tables: new trials, trials that had not
succeeded last time, attributes of studies that can change, and locks. Coefficients, most of a database, are read only
for requested trials. Nothing is ever written.

The state of a trial is read before, or together with, what its end committed, so no snapshot is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.settings import near_miss
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.comparing import EMA_GRID
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.history import (
    HOLDER,
    TRIAL,
    Floats,
    Rows,
    StudyHistory,
    parse,
    seconds,
    with_attributes,
    with_trials,
)
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import SUCCEEDED, is_ours, is_search, split_name
from lcsc_opt.database.nodes import NODES
from lcsc_opt.database.tables import (
    ARTIFACT_PREFIX,
    ATTRIBUTES,
    PARAMETERS,
    STUDY_ATTRIBUTES,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    VALUES,
    our_studies,
)

BATCH = 400  # conditions of one statement, which databases limit
FIXED_ATTRIBUTES = ("steps", "specification", "forked_from")
CHANGING_ATTRIBUTES = ("budget", "search_ended", "held_out", HOLDER, NODES)


class HistoryReader:
    """Histories of the studies of one database, as fresh as their last :meth:`read`. Safe to share between threads."""

    def __init__(self, storage: RDBStorage) -> None:
        self.storage, self._lock = storage, threading.Lock()
        self._known: dict[str, StudyHistory] = {}
        self._revisions = itertools.count(1)

    def names(self) -> list[str]:
        """The names of our studies, in the order in which they were created."""
        return list(in_database(self.storage, self._study_ids))

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
            guess = near_miss(experiment, known)
            raise StudyStoreError(
                f"{experiment}: no such experiment{guess}; the database holds: {', '.join(known) or 'none'}"
            )
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
            in_database(self.storage, lambda: self._refresh(wanted))
            return tuple(self._known[name] for name in wanted if name in self._known)

    def read_study(self, name: str) -> StudyHistory:
        """One study as it is now.

        Raises:
            StudyStoreError: its name is not ``experiment/optimizer/seed``, or it is not there any more.
        """
        for study in self.read_studies([name]):
            return study
        raise StudyStoreError(f"{name}: was deleted from the database while it was read")

    def answer(self, study: StudyHistory) -> Floats | None:
        """``[K]`` coefficients of the trial that was chosen, else of the best one; ``None`` while there is none."""
        return None if study.chosen is None else self.coefficients(study, [study.chosen])[0]

    def coefficients(self, study: StudyHistory, numbers: Sequence[int]) -> Floats:
        """``[m, K]``, a row for each number; NaN where a trial stores none."""
        ids = trial_ids(study, numbers)
        found = {key: json.loads(text) for key, _, text in self._attributes(ids, ["coefficients"])}
        count = len(study.steps) or max(map(len, found.values()), default=0)
        missing = [np.nan] * count
        return np.array([found.get(key, missing) for key in ids], dtype=np.float64).reshape(len(ids), count)

    def parameters(self, study: StudyHistory, numbers: Sequence[int]) -> dict[str, Floats]:
        """``sum_abs`` and ``effective`` of trials, ``[m]`` each; NaN where they are not stored."""
        ids = trial_ids(study, numbers)
        place = {key: i for i, key in enumerate(ids)}
        found = {name: np.full(len(ids), np.nan) for name in ("sum_abs", "effective")}

        def chosen(batch: list[int]) -> sa.Select[Any]:
            columns = (PARAMETERS.c.trial_id, PARAMETERS.c.param_name, PARAMETERS.c.param_value)
            named = PARAMETERS.c.param_name.in_(list(found))
            return sa.select(*columns).where(PARAMETERS.c.trial_id.in_(batch), named)

        for key, name, value in self._in_batches(ids, chosen):
            found[name][place[key]] = value
        return found

    def artifacts(self, study: StudyHistory, number: int) -> list[dict[str, Any]]:
        """``artifact_id``, ``filename``, ``mimetype`` of each file that is stored beside a trial, by filename."""

        def chosen(batch: list[int]) -> sa.Select[Any]:
            named = SYSTEM_ATTRIBUTES.c.key.startswith(ARTIFACT_PREFIX, autoescape=True)
            return sa.select(SYSTEM_ATTRIBUTES.c.value_json).where(SYSTEM_ATTRIBUTES.c.trial_id.in_(batch), named)

        texts = [row[0] for row in self._in_batches(trial_ids(study, [number]), chosen)]
        described = [json.loads(json.loads(text)) for text in texts]  # Optuna stores a string of JSON
        return sorted(described, key=lambda meta: str(meta.get("filename")))

    def _attributes(self, ids: Sequence[int], keys: Sequence[str]) -> Rows:
        def chosen(batch: list[int]) -> sa.Select[Any]:
            columns = (ATTRIBUTES.c.trial_id, ATTRIBUTES.c.key, ATTRIBUTES.c.value_json)
            return sa.select(*columns).where(ATTRIBUTES.c.trial_id.in_(batch), ATTRIBUTES.c.key.in_(keys))

        return self._in_batches(ids, chosen)

    def _in_batches(self, ids: Sequence[int], chosen: Any) -> Rows:
        statements = [chosen(batch) for batch in _batches(ids)]

        def fetch() -> Rows:
            with self.storage.engine.connect() as connection:
                return _fetch(connection, statements)

        return in_database(self.storage, fetch) if statements else []

    def _study_ids(self) -> dict[str, int]:
        with self.storage.engine.connect() as connection:
            return {name: key for name, key in our_studies(connection).items() if is_ours(name)}

    def _refresh(self, names: Sequence[str]) -> None:
        """Bring the studies of these names up to date; nothing changes unless everything could be read."""
        ids = self._study_ids()
        known = {name: study for name, study in self._known.items() if ids.get(name) == study.study_id}
        running = locked(self.storage, names)
        with self.storage.engine.connect() as connection:
            wanted = {name: ids[name] for name in names if name in ids}
            before = {name: known[name] for name in wanted if name in known}
            again = _unsettled(connection, before)
            before = {name: study for name, study in before.items() if not _is_another(study, again)}
            studies = [before.get(name) or _empty(name, key) for name, key in wanted.items()]
            attributes = _study_attributes(connection, studies, {study.study_id for study in before.values()})
            described = [with_attributes(study, attributes[study.study_id]) for study in studies]
            rows = _new_trials(connection, described, again)
            extras = _extras(connection, described, rows)
            updated = [with_trials(study, rows.get(study.study_id, []), extras) for study in described]
            updated = [_with_metric(connection, study) for study in updated]
            updated = [_with_average(connection, old, new) for old, new in zip(studies, updated, strict=True)]
        now = time.time()
        for old, new in zip(studies, updated, strict=True):
            revision = next(self._revisions) if _is_changed(old, new) else old.revision
            known[new.study] = dataclasses.replace(
                new, holder=new.holder if new.study in running else None, revision=revision, read_at=now
            )
        self._known = known


def trial_ids(study: StudyHistory, numbers: Sequence[int]) -> list[int]:
    """The database's keys of trials.

    Raises:
        StudyStoreError: the study has no trial of that number.
    """
    known = dict(zip(study.trials["number"].tolist(), study.trials["trial_id"].tolist(), strict=True))
    for number in numbers:
        if number not in known:
            raise StudyStoreError(f"{study.study}: has no trial {number}; its trials are 0 to {len(known) - 1}")
    return [known[number] for number in numbers]


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def _fetch(connection: sa.Connection, statements: Iterable[Any]) -> Rows:
    return [tuple(row) for statement in statements for row in connection.execute(statement)]


def _empty(name: str, study_id: int) -> StudyHistory:
    experiment, optimizer, seed = split_name(name)
    return StudyHistory(study_id, name, experiment, optimizer, seed, np.empty(0, dtype=TRIAL))


def _select_trials(*conditions: Any) -> sa.Select[Any]:
    """Study, trial, number, state, start, end, value, its cost and its attempts, as far as committed."""
    attributes = [ATTRIBUTES.alias(key) for key in ("cost", "attempts")]
    joined: Any = TRIALS.outerjoin(VALUES, (VALUES.c.trial_id == TRIALS.c.trial_id) & (VALUES.c.objective == 0))
    for attribute in attributes:
        joined = joined.outerjoin(
            attribute, (attribute.c.trial_id == TRIALS.c.trial_id) & (attribute.c.key == attribute.name)
        )
    own = [TRIALS.c[name] for name in ("study_id", "trial_id", "number", "state", "datetime_start")]
    found = [attribute.c.value_json for attribute in attributes]
    columns = (*own, TRIALS.c.datetime_complete, VALUES.c.value, *found)
    return sa.select(*columns).select_from(joined).where(*conditions)


def _unsettled(connection: sa.Connection, studies: Mapping[str, StudyHistory]) -> dict[int, tuple[Any, ...]]:
    """Trials that had not ended, or had failed and may be tried again, and each study's last one.

    Returns:
        Trial → its row as it is now.
    """
    ids = []
    for study in studies.values():
        succeeded = np.isin(study.trials["state"], [state.value for state in SUCCEEDED])
        open_ones = study.trials["trial_id"][~succeeded].tolist()
        ids += sorted({*open_ones, *study.trials["trial_id"][-1:].tolist()})
    statements = (_select_trials(TRIALS.c.trial_id.in_(batch)) for batch in _batches(ids))
    return {row[1]: row for row in _fetch(connection, statements)}


def _is_another(study: StudyHistory, rows: Mapping[int, tuple[Any, ...]]) -> bool:
    """Whether a study was deleted and made again since it was read: its last trial is gone, or is not the same one."""
    if not len(study.trials):
        return False
    last = study.trials[-1]
    row = rows.get(int(last["trial_id"]))
    if row is None:
        return True
    same = (study.study_id, int(last["number"])) == (row[0], row[2])
    return not (same and np.array_equal(seconds([row[4]]), [last["started"]], equal_nan=True))


def _new_trials(
    connection: sa.Connection, studies: Sequence[StudyHistory], again: Mapping[int, tuple[Any, ...]]
) -> dict[int, Rows]:
    """Study → rows of trials that are new, or that were read again."""
    last = {study.study_id: int(study.trials["trial_id"].max(initial=-1)) for study in studies}
    rows = [row for row in again.values() if row[1] <= last.get(row[0], -1)]
    for batch in _batches(list(last.items())):
        newer = [(TRIALS.c.study_id == study_id) & (TRIALS.c.trial_id > key) for study_id, key in batch]
        rows += _fetch(connection, [_select_trials(sa.or_(*newer))])
    grouped: dict[int, Rows] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(row)
    return grouped


def _extras(
    connection: sa.Connection, studies: Sequence[StudyHistory], rows: Mapping[int, Rows]
) -> dict[int, dict[str, Any]]:
    """Trial → ``inherited``, ``reason``, ``tell_index`` and ``images``, where it has them; read only where one may."""
    ids = [
        row[1]
        for study in studies
        for row in rows.get(study.study_id, ())
        if study.forked_from or not study.ordered or row[3] == TrialState.FAIL
    ]
    found: dict[int, dict[str, Any]] = {}
    for batch in _batches(ids):
        columns = (ATTRIBUTES.c.trial_id, ATTRIBUTES.c.key, ATTRIBUTES.c.value_json)
        named = ATTRIBUTES.c.key.in_(["inherited", "reason", "tell_index", "images"])
        for key, name, text in connection.execute(sa.select(*columns).where(ATTRIBUTES.c.trial_id.in_(batch), named)):
            found.setdefault(key, {})[name] = parse(text, None)
    return found


def _study_attributes(
    connection: sa.Connection, studies: Sequence[StudyHistory], known: set[int]
) -> dict[int, dict[str, Any]]:
    """Study → name → value. Attributes that never change are read only of studies that are not known yet."""
    found: dict[int, dict[str, Any]] = {study.study_id: {} for study in studies}
    columns = (STUDY_ATTRIBUTES.c.study_id, STUDY_ATTRIBUTES.c.key, STUDY_ATTRIBUTES.c.value_json)
    for batch in _batches(list(found)):
        unknown = [key for key in batch if key not in known]
        wanted = STUDY_ATTRIBUTES.c.study_id.in_(batch) & STUDY_ATTRIBUTES.c.key.in_(CHANGING_ATTRIBUTES)
        fixed = STUDY_ATTRIBUTES.c.study_id.in_(unknown) & STUDY_ATTRIBUTES.c.key.in_(FIXED_ATTRIBUTES)
        chosen = sa.select(*columns).where(sa.or_(wanted, fixed))
        for study_id, name, text in connection.execute(chosen):
            found[study_id][name] = parse(text, None)
    return found


def _with_average(connection: sa.Connection, before: StudyHistory, study: StudyHistory) -> StudyHistory:
    """An EMA grid with the name of the average that is its answer, read where it has another answer than before."""
    if study.optimizer != EMA_GRID or study.chosen in (None, before.chosen):
        return study
    chosen = sa.select(ATTRIBUTES.c.value_json).where(
        ATTRIBUTES.c.trial_id == trial_ids(study, [study.chosen])[0], ATTRIBUTES.c.key == "coefficients"
    )
    found = np.array(parse(connection.scalar(chosen), []), dtype=np.float64)
    return dataclasses.replace(study, average=average_name(found, study.steps))


def _with_metric(connection: sa.Connection, study: StudyHistory) -> StudyHistory:
    """The study with the name of the metric that is its loss, found in its best trial."""
    if study.metric != "loss" or study.keeps or study.best is None:
        return study
    chosen = sa.select(ATTRIBUTES.c.value_json).where(
        ATTRIBUTES.c.trial_id == trial_ids(study, [study.best])[0], ATTRIBUTES.c.key == "metrics"
    )
    metrics = parse(connection.scalar(chosen), {}) or {}
    name = next((name for name, value in metrics.items() if value == study.searched), "loss")
    formula, at, extractor = name.partition("@")  # an extractor of one's own is called module:factory: too long to show
    name = name if name == "loss" else f"{formula.upper()}{at}{extractor.rpartition(':')[2]}"
    return dataclasses.replace(study, metric=name)


def _is_changed(before: StudyHistory, after: StudyHistory) -> bool:
    same = all(getattr(before, name) == getattr(after, name) for name in ("budget", "ended", "held_out", "steps"))
    return not (same and _bytes(before.trials) == _bytes(after.trials))


def _bytes(trials: npt.NDArray[Any]) -> bytes:
    return bytes(trials.tobytes())
