"""The options that several commands share, and the database and the study that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from lcsc_opt.base.paths import natural_order
from lcsc_opt.base.settings import parse_yaml

if TYPE_CHECKING:  # SQLAlchemy and Optuna are imported when a command opens a database
    from optuna.storages import RDBStorage

    from lcsc_opt.database.reader import HistoryReader


Experiment = Annotated[str, typer.Argument(help="The name of a study file, such as digits.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Database: a file or a URL. Default: LCSC_STORAGE, OPTUNA_STORAGE, the study file's, or studies.db.",
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


def in_order_of(steps: Sequence[int] | None, paths: Sequence[PathType]) -> list[PathType]:
    """The files, in the order in which ``steps`` were given; ``None`` leaves them as they are.

    A shell expands ``epoch*.pt`` to 1, 10, 2. Where steps ascend they are meant for 1, 2, 10. Where they do not, or the
    files are in any other order than a shell's, each step is meant for the file in its place.
    """
    if steps is None:
        return list(paths)
    names = [str(path) for path in paths]
    is_order_of_shell = names == sorted(names)
    if not is_order_of_shell or list(steps) != sorted(steps):
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
        if not equals:
            raise typer.BadParameter(
                f"{text}: expected KEY=VALUE; quotes keep words together, as 'prompts=[a red fox, an owl]'"
            )
        try:
            values[key] = parse_yaml(value)
        except ValueError as error:
            raise typer.BadParameter(f"{text}: not valid YAML: {error}") from error
    return values


def chosen_storage(storage: str | None, database_of: str | None = None) -> str:
    """The URL of ``--storage``, of the environment, of the study file in the working folder, or the default one.

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


def open_reader(storage: str | None, *, database_of: str | None = None) -> HistoryReader:
    """The studies of the database of :func:`open_database`, which are only read.

    Raises:
        StudyStoreError: it cannot be opened.
    """
    from lcsc_opt.base.machine import collector_resting

    with collector_resting():  # while Optuna and SQLAlchemy are imported
        from lcsc_opt.database.reader import HistoryReader

        return HistoryReader(open_database(storage, database_of=database_of))
