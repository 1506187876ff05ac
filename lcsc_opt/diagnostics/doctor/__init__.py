"""Checks a study database, says what it found, and repairs what can be repaired without guessing.

Checking writes nothing. Repairing holds the lease of every study that it changes, looks again once it does, and
leaves a study alone that somebody is running.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyHeldError, StudyStoreError
from lcsc_opt.base.settings import near_miss
from lcsc_opt.database.connection import in_database, masked, open_storage
from lcsc_opt.database.lease import Holder, holder
from lcsc_opt.database.store import StoredStudy, TrialKey
from lcsc_opt.database.summary import is_ours
from lcsc_opt.diagnostics.doctor.checks import check_study
from lcsc_opt.diagnostics.doctor.findings import HELD_OUT, LEASE, ORPHAN_FILE, SEARCH_ENDED, TELL_INDEX, Finding
from lcsc_opt.diagnostics.doctor.rows import StudyRows, named_artifacts, read_names, read_studies
from lcsc_opt.diagnostics.doctor.surroundings import (
    artifact_files,
    check_artifacts,
    check_file,
    check_lease,
    check_objectives,
    check_orphan_files,
    check_references,
    check_schema,
)
from lcsc_opt.search.plan import StudyPlan, stored_plan
from lcsc_opt.views.artifacts import artifact_directory

__all__ = ["REPAIRS", "Finding", "Report", "diagnose", "examine", "examine_objectives", "repair"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What is the matter now, and what was until it was repaired."""

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
        StudyStoreError: when the database cannot be opened, or has no such study.
    """
    damage = check_file(url)
    if damage:
        return Report(tuple(damage))
    storage = open_storage(url, write=False)
    found = examine(storage, study)
    deeper = examine_objectives(storage, study) if deep else []
    repaired: list[Finding] = []
    if mend and any(finding.repairable for finding in found):
        storage = open_storage(url, write=True)
        repaired = repair(storage, found)
        found = examine(storage, study)
    return Report((*found, *deeper), tuple(repaired))


def examine(storage: RDBStorage, study: str | None = None) -> list[Finding]:
    """Every check that needs nothing but the database and its folder of artifacts. Writes nothing."""
    found = [in_database(storage, lambda: check_schema(storage))]
    found += in_database(storage, lambda: check_references(storage))
    for rows in _read(storage, _chosen(storage, study)):
        held_by = _holder(storage, rows)
        found += check_lease(rows.name, held_by)
        found += _examine_study(storage, rows, held_by)
    return found if study is not None else [*found, *_orphan_files(storage)]


def examine_objectives(storage: RDBStorage, study: str | None = None) -> list[Finding]:
    """Whether each study's objective is still the one that it was made with, and its trajectory undamaged."""
    known = [_plan(storage, rows) for rows in _read(storage, _chosen(storage, study))]
    return list(check_objectives(storage, [plan for plan in known if isinstance(plan, StudyPlan)]))


def _chosen(storage: RDBStorage, study: str | None) -> list[str]:
    names = in_database(storage, lambda: read_names(storage.engine))
    if study is None:
        return [name for name in names if is_ours(name)]
    if study not in names:
        raise StudyStoreError(f"{study}: no such study{near_miss(study, names)} in {masked(storage.url)}")
    return [study]


def _read(storage: RDBStorage, names: Sequence[str]) -> list[StudyRows]:
    return in_database(storage, lambda: read_studies(storage.engine, names))


def _holder(storage: RDBStorage, study: StudyRows) -> Holder | None:
    return in_database(storage, lambda: holder(storage.engine, study.key))


def _orphan_files(storage: RDBStorage) -> list[Finding]:
    """The files are listed before the rows are read, which name a file that came meanwhile."""
    files = artifact_files(storage.url)
    named = in_database(storage, lambda: named_artifacts(storage.engine))
    return list(check_orphan_files(storage.url, files, named))


def _examine_study(storage: RDBStorage, rows: StudyRows, held_by: Holder | None) -> list[Finding]:
    live = held_by is not None and held_by.alive
    found = check_study(rows, _plan(storage, rows), live=live)
    return [*found, *check_artifacts(rows, artifact_directory(storage.url))]


def _plan(storage: RDBStorage, rows: StudyRows) -> StudyPlan | str:
    """What a study was made from, or why that cannot be read."""
    if rows.unreadable:
        return f"its attributes {', '.join(rows.unreadable)} are no JSON"
    try:
        return stored_plan(StoredStudy.open(storage, rows.name))
    except StudyStoreError as error:
        return " ".join(str(error).removeprefix(f"{rows.name}: ").split())


def repair(storage: RDBStorage, found: Iterable[Finding]) -> list[Finding]:
    """Do what the findings offer, study by study; what somebody holds meanwhile is left as it is.

    Args:
        storage: opened for writing.
        found: what :func:`examine` found.

    Returns:
        What was repaired.
    """
    offered: dict[str | None, list[Finding]] = {}
    for finding in found:
        if finding.repairable:
            offered.setdefault(finding.study, []).append(finding)
    done: list[Finding] = []
    for name, findings in offered.items():
        with contextlib.suppress(StudyHeldError):
            done += _repair_files(storage) if name is None else _repair_study(storage, name, findings)
    return done


def _repair_study(storage: RDBStorage, name: str, offered: Sequence[Finding]) -> list[Finding]:
    with StoredStudy.open(storage, name).hold():
        (rows,) = _read(storage, [name])
        again = [finding for finding in _examine_study(storage, rows, None) if finding.repairable]
        found = [*(finding for finding in offered if finding.kind == LEASE), *again]
        for finding in found:
            REPAIRS[finding.kind](storage, rows, finding)
    return found


def _repair_files(storage: RDBStorage) -> list[Finding]:
    """While nobody runs any study of the database, since a file belongs to none of them."""
    with contextlib.ExitStack() as leases:
        for name in _chosen(storage, None):
            leases.enter_context(StoredStudy.open(storage, name).hold())
        found = [finding for finding in _orphan_files(storage) if finding.repairable]
        for finding in found:
            REPAIRS[finding.kind](storage, None, finding)
    return found


def _release(_storage: RDBStorage, _study: StudyRows | None, _finding: Finding) -> None:
    """Holding the study took its lease from the dead process, and gives it up at the end."""


def _write_tell_index(storage: RDBStorage, study: StudyRows | None, finding: Finding) -> None:
    for trial in () if study is None else study.trials:
        if trial.number == finding.trial:
            key = TrialKey(trial.number, trial.key)
            StoredStudy.open(storage, finding.study or "").annotate(key, {"tell_index": trial.number})


def _forget(storage: RDBStorage, _study: StudyRows | None, finding: Finding) -> None:
    """The attribute has the finding's name; ``None`` is what it is before a search ends."""
    StoredStudy.open(storage, finding.study or "").set_attribute(finding.kind, None)


def _remove_file(storage: RDBStorage, _study: StudyRows | None, finding: Finding) -> None:
    path = artifact_directory(storage.url) / (finding.file or "")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StudyStoreError(f"{path}: cannot be removed: {error.strerror}") from error


REPAIRS: Mapping[str, Callable[[RDBStorage, StudyRows | None, Finding], None]] = MappingProxyType(
    {
        LEASE: _release,
        TELL_INDEX: _write_tell_index,
        SEARCH_ENDED: _forget,
        HELD_OUT: _forget,
        ORPHAN_FILE: _remove_file,
    }
)
