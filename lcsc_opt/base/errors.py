"""Every error that lcsc_opt raises on purpose.

::

    LcscError                  one line, says what was wrong, where, and what to do
    ├── StudySpecError         wrong input: a study file, an option, coefficients, a file of the catalog, workers
    ├── TrajectoryError        checkpoint files, packed trajectories
    ├── MetricError            features, reference statistics, distances, images that are not finite
    ├── ObjectiveError         an objective that cannot be built, or cannot evaluate what it was asked for
    ├── TrainingError          a recipe, its data or the models that it starts from
    ├── MissingPackageError    a package that one of lcsc_opt's extras brings is not installed
    ├── StudyStoreError        the study database, or a study that does not continue as it began
    └── SearchFailedError      the search ran, and failed

The command line prints the line and leaves with ``exit_status``: 1 for a search that failed, 2 for wrong input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class LcscError(Exception):
    """Base of all errors; raised itself by what writes figures and reports.

    >>> import lcsc_opt
    >>> try:
    ...     lcsc_opt.load_study("digits/LCSC/0", "sqlite:///nothing.db")
    ... except lcsc_opt.LcscError as error:
    ...     print(error)
    nothing.db: no such database; start a study with `lcsc run`, or give its --storage
    """

    exit_status = 2


class StudySpecError(LcscError, ValueError):
    """A study file, an option, a setting or coefficients that are wrong, or name something that does not exist.

    It is a ``ValueError``, which pydantic's validators may raise.
    """


class TrajectoryError(LcscError):
    """A checkpoint file or a packed trajectory that cannot be used, or checkpoints that do not belong together."""


class MetricError(LcscError, ValueError):
    """Features, reference statistics or a distance that cannot be computed, perhaps for this candidate only."""


class ObjectiveError(LcscError):
    """An objective that cannot be built, or that cannot evaluate what it was asked for."""


class TrainingError(LcscError):
    """A recipe that cannot train: its settings, its data, the models that it starts from, or a loss that diverges."""


class MissingPackageError(LcscError, ImportError):
    """A package cannot be imported; the message names the extra that brings it."""


class StudyStoreError(LcscError):
    """The study database cannot be used, or the stored study was made with other code or settings."""


class SearchFailedError(LcscError):
    """The search itself failed; everything evaluated so far is in the database."""

    exit_status = 1


def text_of(error: BaseException) -> str:
    """What an exception that somebody else raised says, in one line."""
    return " ".join(str(error).split())


RAISED_BY_USERS = (Exception, SystemExit)
"""What code of a user's may raise: a script that parses arguments when it is imported exits."""


def one_line(error: BaseException) -> str:
    """``ValueError: what it says``, of an exception that somebody else raised."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def raised_as(error: type[LcscError], subject: str, *, advice: str = "") -> Iterator[None]:
    """What code of a user's raises in here becomes an error of ours: ``SUBJECT raised ValueError: what it says``.

    ``advice`` is put behind it.
    """
    try:
        yield
    except LcscError:
        raise
    except RAISED_BY_USERS as raised:
        raise error(f"{subject} raised {one_line(raised)}{advice}") from raised
