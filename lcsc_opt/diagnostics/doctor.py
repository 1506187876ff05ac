"""Checks a study database, says what it found, and repairs what can be repaired without guessing.

Checking writes nothing. Repairing holds the lease of every study that it changes, and leaves a study alone that
somebody is running. Stored trials are checked where they are used: a search that continues asks every stored candidate
again, and each must be the same bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sqlite3
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, StudyHeldError, StudyStoreError, TrajectoryError
from lcsc_opt.base.settings import near_miss
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.lease import has_table, holder
from lcsc_opt.database.locks import when_unlocked
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, other_studies, study_names
from lcsc_opt.database.tables import named_artifacts, unreadable_attributes, versions
from lcsc_opt.database.urls import masked
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.experiment import Experiment, experiments
from lcsc_opt.search.plan import StudyPlan, stored_plan
from lcsc_opt.views.artifacts import artifact_directory

Severity = Literal["problem", "note"]
LEASE, ORPHAN_FILE = "dead lease", "orphan file"  # the kinds of findings that can be repaired
NO_REPAIR, NOTHING = "cannot be repaired", "nothing to do"
SQLITE_MAGIC = b"SQLite format 3\x00"
OPTUNA_TABLES = ("studies", "trials", "version_info", "alembic_version")
SETTLED_SECONDS = 600.0  # an artifact's file is there a moment before the database names it
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check noticed.

    Attributes:
        kind: which check.
        severity: with a problem, a study cannot be continued or trusted; a note is harmless.
        text: one line that says what is there.
        advice: what ``--repair`` would do, or what to do otherwise.
        study: its name; ``None`` for what belongs to the database.
        trial: its number.
        file: the artifact's, where the finding is about one.
    """

    kind: str
    severity: Severity
    text: str
    advice: str = NO_REPAIR
    study: str | None = None
    trial: int | None = None
    file: str | None = None

    @property
    def repairable(self) -> bool:
        """Whether ``--repair`` does something about it."""
        return self.kind in (LEASE, ORPHAN_FILE)

    def as_row(self) -> dict[str, Any]:
        """The row that ``lcsc doctor --format json`` prints."""
        return {**dataclasses.asdict(self), "repairable": self.repairable}


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings that remain, and those that were repaired."""

    found: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()

    @property
    def problems(self) -> int:
        """How many problems remain."""
        return sum(finding.severity == "problem" for finding in self.found)


def diagnose(url: str, study: str | None = None, *, deep: bool = False, mend: bool = False) -> Report:
    """Check a database, or one study of it.

    Args:
        url: of the database.
        study: the only one to check, by name.
        deep: load the objectives, too, and hash their trajectories, which takes as long as reading them.
        mend: repair what can be repaired.

    Raises:
        StudyStoreError: the database cannot be opened, or has no such study.
    """
    if damage := list(_check_file(url)):
        return Report(tuple(damage))
    storage = open_storage(url, write=False)
    found = examine(storage, study)
    deeper = list(_check_objectives(storage, _chosen(storage, study))) if deep else []
    repaired: list[Finding] = []
    if mend and any(finding.repairable for finding in found):
        storage = open_storage(url, write=True)
        repaired = repair(storage, found)
        found = examine(storage, study)
    return Report((*found, *deeper), tuple(repaired))


def examine(storage: RDBStorage, study: str | None = None) -> list[Finding]:
    """Every check that needs nothing but the database and its folder of artifacts. Writes nothing."""
    found = [in_database(storage, lambda: _schema(storage)), *in_database(storage, lambda: _references(storage))]
    for name in _chosen(storage, study):
        found += _examine_study(StoredStudy.open(storage, name))
    if study is not None:
        return found
    if others := other_studies(storage):
        found.append(Finding("other programs", "note", f"{others} studies of other programs", "left alone"))
    return [*found, *_orphan_files(storage)]


def repair(storage: RDBStorage, found: Iterable[Finding]) -> list[Finding]:
    """Repair what can be repaired, except in a study that a process runs. Returns the findings that were repaired.

    Args:
        storage: opened for writing.
        found: what :func:`examine` found.
    """
    done: list[Finding] = []
    for finding in (finding for finding in found if finding.kind == LEASE):
        with contextlib.suppress(StudyHeldError), StoredStudy.open(storage, finding.study or "").hold():
            done.append(finding)  # taken from the dead process, and given up here
    if any(finding.kind == ORPHAN_FILE for finding in found):
        with contextlib.suppress(StudyHeldError):
            done += _remove_orphan_files(storage)
    return done


def _chosen(storage: RDBStorage, study: str | None) -> list[str]:
    names = study_names(storage)
    if study is None:
        return names
    if study not in names:
        raise StudyStoreError(f"{study}: no such study{near_miss(study, names)} in {masked(storage.url)}")
    return [study]


def _check_file(url: str) -> Iterator[Finding]:
    """SQLite's own check of the file. It runs before Optuna opens the file, since Optuna would create missing tables.

    Raises:
        StudyStoreError: the file cannot be read at all, or is another program's database.
    """
    path = _sqlite_file(url)
    if path is None:
        return
    rescue = f"go back to a copy, or try `sqlite3 {path} .recover`"
    try:
        lines, tables = when_unlocked(url, lambda: _look_into(path))
    except sqlite3.Error as error:
        raise StudyStoreError(f"{path}: {error}; {rescue}") from error
    if lines != ["ok"]:
        advice = f"{NO_REPAIR}, and nothing else was checked; {rescue}"
        for line in lines[:SHOWN]:
            yield Finding("integrity", "problem", f"{path}: {' '.join(line.split())}", advice)
    elif missing := [name for name in OPTUNA_TABLES if name not in tables]:
        raise StudyStoreError(f"{path}: is no study database, it has no table {missing[0]}; give another --storage")


def _look_into(path: Path) -> tuple[list[str], set[str]]:
    """What SQLite says of the file, and the names of its tables."""
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        lines = [str(line) for (line,) in connection.execute("PRAGMA integrity_check")]
        return lines, {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _sqlite_file(url: str) -> Path | None:
    """The file, where it exists and is SQLite's; otherwise ``None``, and opening the storage says what is wrong."""
    with contextlib.suppress(sa.exc.ArgumentError, OSError):
        parsed = sa.make_url(url)
        path = Path(parsed.database or "")
        if parsed.get_backend_name() == "sqlite" and _is_sqlite(path):
            return path
    return None


def _is_sqlite(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    return False


def _schema(storage: RDBStorage) -> Finding:
    """Which tables there are. Optuna has opened them already, so it can read their version."""
    with storage.engine.connect() as connection:
        by = versions(connection)
    leases = "a table of leases" if has_table(storage.engine) else "no table of leases yet, which the next run makes"
    text = f"{masked(storage.url)}: tables of version {storage.get_current_version()}, made by optuna {by}; {leases}"
    return Finding("schema", "note", text, NOTHING)


def _references(storage: RDBStorage) -> list[Finding]:
    """Rows that belong to a trial or a study that is gone; SQLite permits them, unlike other databases."""
    if storage.engine.dialect.name != "sqlite":
        return []
    with storage.engine.connect() as connection:
        rows = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    counted = collections.Counter((str(table), str(parent)) for table, _, parent, _ in rows)
    return [
        Finding("references", "problem", f"{times} rows of {table} belong to a row of {parent} that is gone")
        for (table, parent), times in sorted(counted.items())
    ]


def _examine_study(study: StoredStudy) -> list[Finding]:
    found = [*_lease(study), *_unreadable(study)]
    if any(finding.kind == "attribute" for finding in found):
        return found  # nothing else of it can be read
    try:
        stored_plan(study)
    except StudyStoreError as error:
        found.append(Finding("plan", "problem", str(error).removeprefix(f"{study.name}: "), study=study.name))
    return [*found, *_unfinished(study), *_artifacts(study)]


def _lease(study: StoredStudy) -> Iterator[Finding]:
    """Who runs the study, or did and died."""
    held = in_database(study.storage, lambda: holder(study.storage.engine, study.key))
    if held is None:
        return
    heard = f"last heard of {time.time() - held.heartbeat_at:.0f} s ago"
    where = f"process {held.process} on {held.host}"
    if held.alive:
        yield Finding(
            "lease", "note", f"is being run by {where}, {heard}", "nothing, while it is being run", study.name
        )
    else:
        yield Finding(LEASE, "note", f"is held by {where}, which is dead; {heard}", "release it", study.name)


def _unreadable(study: StoredStudy) -> Iterator[Finding]:
    """Attributes that are not JSON; Optuna's own reading stops at the first of them."""

    def read() -> list[tuple[int | None, str]]:
        with study.storage.engine.connect() as connection:
            return unreadable_attributes(connection, study.key)

    for number, name in in_database(study.storage, read)[:SHOWN]:
        yield Finding("attribute", "problem", f"the attribute {name} is no JSON", study=study.name, trial=number)


def _unfinished(study: StoredStudy) -> Iterator[Finding]:
    [history] = HistoryReader(study.storage).read_studies([study.name]) or [None]
    if history is None or history.running:
        return
    waiting = [int(number) for number in history.trials["number"] if number not in history.finished["number"]]
    if waiting:
        more = f" and {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else ""
        text = f"nobody runs it, and trials are unfinished: {', '.join(map(str, waiting[:SHOWN]))}{more}"
        advice = f"{NOTHING}: `lcsc resume {study.name}` evaluates them again under the same numbers"
        yield Finding("running", "note", text, advice, study.name)


def _artifacts(study: StoredStudy) -> Iterator[Finding]:
    """Whether each artifact that a trial names has its file."""
    folder = artifact_directory(study.storage.url)
    with study.storage.engine.connect() as connection:
        named = named_artifacts(connection, study.key)
    for number, artifact, filename in named:
        if not (folder / artifact).is_file():
            text = f"its artifact {filename} has no file {artifact} in {folder}"
            advice = f"put the file back; `lcsc evaluate {study.name} --keep` draws figures again"
            yield Finding("artifact", "problem", text, advice, study.name, number, artifact)


def _orphan_files(storage: RDBStorage) -> Iterator[Finding]:
    """Files of artifacts that no row names: a process died after it wrote the file and before it wrote the row.

    The files are listed before the rows are read, so that a row which is written meanwhile counts. A folder that other
    databases may use, too, is left alone.
    """
    files = _artifact_files(storage.url)
    with storage.engine.connect() as connection:
        named = {artifact for _, artifact, _ in named_artifacts(connection, None)}
    others = _other_databases(storage.url)
    for path in (path for path in files if path.name not in named):
        text = f"no trial names the file {path}"
        if others is None:
            yield Finding(ORPHAN_FILE, "note", text, "remove it", file=path.name)
        else:
            yield Finding("file", "note", text, f"{NOTHING}: {others} may use this folder, too", file=path.name)


def _artifact_files(url: str) -> list[Path]:
    """The files of artifacts that have been there for a while; their names are uuids."""
    folder = artifact_directory(url)
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        return [path for path in paths if _is_uuid4(path.name) and _is_settled(path)]
    except OSError as error:
        raise StudyStoreError(f"{folder}: cannot be read: {error.strerror}") from error


def _is_settled(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_mtime < time.time() - SETTLED_SECONDS
    return False


def _is_uuid4(name: str) -> bool:
    try:
        return str(uuid.UUID(name, version=4)) == name
    except ValueError:
        return False


def _other_databases(url: str) -> str | None:
    own, folder = _sqlite_file(url), artifact_directory(url)
    if own is None:
        return "another database"
    near = (path for path in sorted(folder.parent.iterdir()) if path.with_suffix(folder.suffix).name == folder.name)
    return next((path.name for path in near if path.name != own.name and _is_sqlite(path)), None)


def _remove_orphan_files(storage: RDBStorage) -> list[Finding]:
    """Remove them while this process holds every study of the database, since any study may own such a file."""
    with contextlib.ExitStack() as leases:
        for name in study_names(storage):
            leases.enter_context(StoredStudy.open(storage, name).hold())
        found = [finding for finding in _orphan_files(storage) if finding.repairable]
        for finding in found:
            path = artifact_directory(storage.url) / (finding.file or "")
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StudyStoreError(f"{path}: cannot be removed: {error.strerror}") from error
    return found


def _check_objectives(storage: RDBStorage, names: Sequence[str]) -> Iterator[Finding]:
    """Load each objective, once for all studies that share it, and check that they were made with it."""
    plans: list[StudyPlan] = []
    for name in names:
        with contextlib.suppress(StudyStoreError, json.JSONDecodeError):  # other checks report it
            plans.append(stored_plan(StoredStudy.open(storage, name)))
    known: dict[int, tuple[Objective | None, str]] = {}
    for experiment, plan in experiments(plans, storage):
        if id(experiment) not in known:
            known[id(experiment)] = _load(experiment)
        objective, fault = known[id(experiment)]
        if fault:
            yield Finding("objective", "problem", fault, study=plan.name)
        if objective is not None:
            yield from _compare(StoredStudy.open(storage, plan.name), objective)


def _load(experiment: Experiment) -> tuple[Objective | None, str]:
    """The objective, and what is wrong with it or its trajectory; its code is a user's and may raise anything."""
    try:
        objective = experiment.objective
    except (Exception, SystemExit) as error:
        return None, f"its objective cannot be loaded: {_one_line(error)}"
    try:
        if objective.trajectory is not None:
            objective.trajectory.verify()
    except (TrajectoryError, OSError) as error:
        return objective, _one_line(error)
    return objective, ""


def _compare(study: StoredStudy, objective: Objective) -> Iterator[Finding]:
    try:
        study.require("fingerprint", objective.describe(), part="objective")
        study.require("fingerprint", dict(objective.code), part="code")
        study.require("steps", list(objective.steps))
    except StudyStoreError as error:
        text = str(error).removeprefix(f"{study.name}: ").partition(". Give the study")[0]
        yield Finding("objective", "problem", text, study=study.name)
    except Exception as error:
        text = f"its objective does not say what it is: {_one_line(error)}"
        yield Finding("objective", "problem", text, study=study.name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, LcscError) else f"{type(error).__name__}: {text}"
