"""The checks of what is not in a study's rows: the database file, leases, artifacts, and the objective."""

from __future__ import annotations

import collections
import contextlib
import sqlite3
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, StudyMismatchError, StudyStoreError, TrajectoryError
from lcsc_opt.database.connection import BUSY_SECONDS, masked
from lcsc_opt.database.lease import Holder, has_table
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.tables import models
from lcsc_opt.diagnostics.doctor.findings import LEASE, NO_REPAIR, NOTHING, ORPHAN_FILE, Finding
from lcsc_opt.diagnostics.doctor.rows import StudyRows
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.experiment import Experiment, experiments
from lcsc_opt.search.plan import StudyPlan
from lcsc_opt.views.artifacts import artifact_directory

SQLITE_MAGIC = b"SQLite format 3\x00"
OPTUNA_TABLES = ("studies", "trials", "version_info", "alembic_version")
SETTLED_SECONDS = 600.0  # an artifact's file is there a moment before the database names it
SHOWN_LINES = 5


def check_file(url: str) -> list[Finding]:
    """SQLite's own check of the file, before Optuna opens it, which would make the tables that it misses.

    Raises:
        StudyStoreError: when the file cannot be read at all, or is another program's database.
    """
    path = _sqlite_file(url)
    if path is None:
        return []
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            lines = [str(line) for (line,) in connection.execute("PRAGMA integrity_check")]
            tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise StudyStoreError(f"{path}: {error}; {_rescue(path)}") from error
    if lines != ["ok"]:
        told = [" ".join(line.split()) for line in lines[:SHOWN_LINES]]
        advice = f"{NO_REPAIR}, and nothing else was checked; {_rescue(path)}"
        return [Finding("integrity", "problem", f"{path}: {line}", advice) for line in told]
    missing = [name for name in OPTUNA_TABLES if name not in tables]
    if missing:
        raise StudyStoreError(f"{path}: is no study database, it has no table {missing[0]}; give another --storage")
    return []


def _rescue(path: Path) -> str:
    return f"go back to a copy, or try `sqlite3 {path} .recover`"


def _sqlite_file(url: str) -> Path | None:
    """The file, where it is there and SQLite's; otherwise opening the storage says what is wrong."""
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


def check_schema(storage: RDBStorage) -> Finding:
    """Which tables there are; Optuna has opened them already, so that their version is one that it can read."""
    with storage.engine.connect() as connection:
        by = connection.scalar(sa.select(models.VersionInfoModel.library_version))
    leases = "a table of leases" if has_table(storage.engine) else "no table of leases yet, which the next run makes"
    text = f"{masked(storage.url)}: tables of version {storage.get_current_version()}, made by optuna {by}; {leases}"
    return Finding("schema", "note", text, NOTHING)


def check_references(storage: RDBStorage) -> list[Finding]:
    """Rows that belong to a trial or a study that is gone; SQLite, unlike others, lets them be."""
    if storage.engine.dialect.name != "sqlite":
        return []
    with storage.engine.connect() as connection:
        rows = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    counted = collections.Counter((str(table), str(parent)) for table, _, parent, _ in rows)
    return [
        Finding("references", "problem", f"{times} rows of {table} belong to a row of {parent} that is gone")
        for (table, parent), times in sorted(counted.items())
    ]


def check_lease(study: str, held_by: Holder | None) -> Iterator[Finding]:
    """Who runs the study, or did and died."""
    if held_by is None:
        return
    heard = f"last heard of {time.time() - held_by.heartbeat_at:.0f} s ago"
    where = f"process {held_by.process} on {held_by.host}"
    if held_by.alive:
        yield Finding("lease", "note", f"is being run by {where}, {heard}", "nothing, while it is being run", study)
    else:
        yield Finding(LEASE, "note", f"is held by {where}, which is dead; {heard}", "release it", study)


def check_artifacts(study: StudyRows, folder: Path) -> Iterator[Finding]:
    """Whether each artifact that a trial names has its file."""
    for trial in study.trials:
        for artifact, filename in trial.artifacts.items():
            if filename is None:
                text, advice = f"its artifact {artifact} has no readable description", NO_REPAIR
            elif not (folder / artifact).is_file():
                text = f"its artifact {filename} has no file {artifact} in {folder}"
                advice = f"put the file back; `lcsc evaluate {study.name}` draws figures again"
            else:
                continue
            yield Finding("artifact", "problem", text, advice, study.name, trial.number, artifact)


def artifact_files(url: str) -> list[Path]:
    """The files of artifacts that have been there for a while; their names are uuids.

    Raises:
        StudyStoreError: when the folder cannot be read.
    """
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


def check_orphan_files(url: str, files: Sequence[Path], named: set[str]) -> Iterator[Finding]:
    """Files of artifacts that no row names, which a process leaves behind that dies between the two.

    A folder that other databases may use, too, is left alone.
    """
    others = _other_databases(url, artifact_directory(url))
    for path in (path for path in files if path.name not in named):
        text = f"no trial names the file {path}"
        if others is None:
            yield Finding(ORPHAN_FILE, "note", text, "remove it", file=path.name)
        else:
            yield Finding("file", "note", text, f"{NOTHING}: {others} may use this folder, too", file=path.name)


def _other_databases(url: str, folder: Path) -> str | None:
    own = _sqlite_file(url)
    if own is None:
        return "another database"
    near = (path for path in sorted(folder.parent.iterdir()) if path.with_suffix(folder.suffix).name == folder.name)
    return next((path.name for path in near if path.name != own.name and _is_sqlite(path)), None)


def _is_uuid4(name: str) -> bool:
    try:
        return str(uuid.UUID(name, version=4)) == name
    except ValueError:
        return False


def check_objectives(storage: RDBStorage, plans: Sequence[StudyPlan]) -> Iterator[Finding]:
    """Load each plan's objective, once where they share it; see that it is the one that the study was made with."""
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
    except StudyMismatchError as error:
        text = str(error).removeprefix(f"{study.name}: ").partition(". Give the study")[0]
        yield Finding("objective", "problem", text, study=study.name)
    except Exception as error:
        text = f"its objective does not say what it is: {_one_line(error)}"
        yield Finding("objective", "problem", text, study=study.name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, LcscError) else f"{type(error).__name__}: {text}"
