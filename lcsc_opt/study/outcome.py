"""What became of a study, in one line for people."""

from __future__ import annotations

import datetime

from optuna.storages import RDBStorage

from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.states import Attributes
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.checkpoints_alone import checkpoints_written_again, new_checkpoints
from lcsc_opt.views.study_status import shares_of_time

_SHOWN_SECONDS = 10.0  # of a search, from which on its last line says where they went


def outcome_of(name: str, storage: RDBStorage) -> str:
    """The result of a study."""
    study = HistoryReader(storage).read_study(name)
    line = "no comparable trial"
    if study.searched is not None:
        line = f"best {study.searched:.4g}"
    if study.reported is not None:
        line += f", held-out {study.reported:.4g}"
    line += f" after {study.evaluations} evaluations"
    if study.seconds >= _SHOWN_SECONDS:
        line += f" (time: {shares_of_time(study)})"
    if study.summary.failed:
        line += f" ({study.summary.failed} failed: lcsc show {name})"
    return line


def outcome_of_finished(spec: StudySpec, study: StoredStudy) -> str:
    """The result of a study that had finished before this run."""
    stored = study.attributes
    line = f"{finished_already(spec, stored)}; {outcome_of(spec.name, study.storage)}"
    if stored["search_ended"]["exhausted"]:
        line += "; the optimizer has no further candidates"
    if spec.is_grid:  # what follows is advice for searches
        return line
    if checkpoints_written_again(study):
        line += f"; its checkpoints have been rewritten since; to search the new ones: lcsc run {spec.name} name=NEW"
    new = new_checkpoints(study)
    return f"{line}; {new}" if new else line


def finished_already(spec: StudySpec, stored: Attributes) -> str:
    """``finished already, 2026-11-27 08:41``: that a result is not new, and from when it is; and the larger report.

    Args:
        spec: of the study, by the study file as it is now, which may ask for a larger report.
        stored: the attributes of the study, whose search has ended.
    """
    ended_at = datetime.datetime.fromtimestamp(stored["search_ended"]["at"])
    return f"finished already, {ended_at:%Y-%m-%d %H:%M}{_larger_report(spec, stored)}"


def _larger_report(spec: StudySpec, stored: Attributes) -> str:
    """``; the report has only 20 images; for 30: COMMAND``, if the study file asks for more by now; else empty."""
    report = HeldOutReport.from_json(stored.get("held_out"))
    if report is None or spec.held_out is None:
        return ""
    reported = report.found.images  # 0 of a score that has no items
    asked = spec.held_out.images_with(stored.get("report_images"))
    if not reported or asked <= reported:
        return ""
    command = f"lcsc evaluate {spec.name} --images {asked} --keep"
    return f"; the report has only {reported:,} images; for {asked:,}: {command}"
