"""The options that several commands share, and the database and the study that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.checkpoints.names import natural_order

if TYPE_CHECKING:  # SQLAlchemy and Optuna are imported when a command opens a database
    from optuna.storages import RDBStorage

    from lcsc_opt.database.report import Measurement
    from lcsc_opt.database.store import StoredStudy


def studies_that_begin_with(context: typer.Context, incomplete: str) -> list[str]:
    """The names of studies that a shell proposes; none, rather than an error, without a database."""
    from lcsc_opt.base.errors import LcscError
    from lcsc_opt.database.store import our_studies

    try:
        names = our_studies(open_database(context.params.get("storage")))
    except LcscError:
        return []
    return [name for name in names if name.startswith(incomplete)]


StudyName = Annotated[str, typer.Argument(help="experiment/optimizer/seed", autocompletion=studies_that_begin_with)]
Experiment = Annotated[str, typer.Argument(help="The name of a study file, such as digits.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Database URL. Default: LCSC_STORAGE, OPTUNA_STORAGE, the study file's, or sqlite:///studies.db.",
    ),
]
Output = Annotated[Literal["table", "json"], typer.Option("--format", help="Output format: a table, or JSON.")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Continue even if code, versions or the reference have changed.")
]


def _parse_steps(text: str) -> list[int]:
    """``100,200,300`` → the steps."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected whole numbers separated by commas, such as 100,200,300, got {text!r}"
        ) from error


Steps = Annotated[
    Any,
    typer.Option(
        parser=_parse_steps,
        metavar="STEP,STEP...",
        help="Training steps, such as 100,200,300, if the names do not contain them.",
    ),
]
PathType = TypeVar("PathType", str, Path)


def in_order_of(steps: Sequence[int], paths: Sequence[PathType]) -> list[PathType]:
    """The files, in the order in which ``steps`` were given.

    A shell expands ``epoch*.pt`` to 1, 10, 2. Where steps ascend they are meant for 1, 2, 10. Where they do not, or the
    files are in any other order than a shell's, each step is meant for the file in its place.
    """
    listed = [str(path) for path in paths]
    if listed != sorted(listed) or list(steps) != sorted(steps):
        return list(paths)
    return sorted(paths, key=lambda path: natural_order(Path(path)))


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` arguments as a mapping; values are YAML.

    Raises:
        typer.BadParameter: one of them is something else.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            values[key] = parse_yaml(value)
        except ValueError as error:
            raise typer.BadParameter(f"{text}: not valid YAML: {error}") from error
        if not equals:
            raise typer.BadParameter(f"{text}: expected KEY=VALUE")
    return values


def chosen_storage(storage: str | None, database_of: str | None = None) -> str:
    """The URL of ``--storage``, of the environment, of the study file in the working folder, or the default.

    Args:
        storage: the option.
        database_of: a study or an experiment that is to be there; of several study files, its experiment's decides.
    """
    from lcsc_opt.base.study_file import storage_of_folder
    from lcsc_opt.database.urls import storage_url

    return storage_url(storage, storage_of_folder(Path(), database_of))


def open_database(storage: str | None, *, database_of: str | None = None, write: bool = False) -> RDBStorage:
    """The database of :func:`chosen_storage`; a missing one is not created.

    Raises:
        StudyStoreError: it cannot be opened.
    """
    from lcsc_opt.database.connection import open_storage
    from lcsc_opt.database.urls import is_there

    url = chosen_storage(storage, database_of)
    if not is_there(url):
        write = False  # opening to read reports a missing one
    return open_storage(url, write=write)


def find_study(name: str, storage: str | None, *, write: bool = False) -> StoredStudy:
    """The study of that name in the database of :func:`open_database`.

    Raises:
        StudyStoreError: there is no such study, or another program made it.
    """
    from lcsc_opt.database.store import StoredStudy

    return StoredStudy.open(open_database(storage, database_of=name, write=write), name)


def find_answer(name: str, storage: str | None) -> tuple[StoredStudy, Measurement | None]:
    """The study of that name; of an experiment's name the study that has its answer, and the answer.

    Without a report, an experiment's is the study of the lowest searched loss.

    Raises:
        StudyStoreError: there is neither such a study nor such an experiment, or nothing was searched yet.
    """
    from lcsc_opt.base.errors import StudyStoreError
    from lcsc_opt.database.history import answer_of, best_searched
    from lcsc_opt.database.names import is_ours
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.database.store import StoredStudy

    if is_ours(name):
        return find_study(name, storage), None
    opened = open_database(storage, database_of=name)
    studies = HistoryReader(opened).read(name)
    found = answer_of(studies)
    if found is not None:
        study, _, answer = found
        return StoredStudy.open(opened, study.study), answer
    best = best_searched(studies)
    if best is None:
        raise StudyStoreError(f"{name}: no comparable trial has finished yet; continue the search")
    return StoredStudy.open(opened, best.study), None


def warnings_of(study: StoredStudy) -> list[str]:
    """What to know before one search's own answer is used: its report's warning, and that another model is better."""
    from lcsc_opt.database.names import split_name
    from lcsc_opt.database.report import HeldOutReport

    report = HeldOutReport.from_json(study.attributes.get("held_out"))
    if report is None:
        return []
    lines = [] if report.warning is None else [f"{study.name}: {report.warning}"]
    if report.answer is not None and report.answer.model != report.found.model:
        experiment = split_name(study.name)[0]
        lines.append(
            f"{study.name} is worse than {report.answer.model.name}, or not certainly better; lcsc export {experiment} "
            "writes the best known model"
        )
    return lines
