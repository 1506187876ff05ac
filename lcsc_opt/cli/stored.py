"""The database and the study that a command names. SQLAlchemy and Optuna are imported when a command opens one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

    from lcsc_opt.database.store import StoredStudy


def to_read(storage: str | None) -> RDBStorage:
    """The database of ``--storage``, or of a URL, to read.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    from lcsc_opt.database.connection import open_storage
    from lcsc_opt.database.urls import storage_url

    return open_storage(storage_url(storage), write=False)


def to_change(storage: str | None) -> RDBStorage:
    """The database of ``--storage``, to change what it holds.

    Raises:
        StudyStoreError: one line that says why it cannot be opened.
    """
    from lcsc_opt.database.connection import open_existing
    from lcsc_opt.database.urls import storage_url

    return open_existing(storage_url(storage))


def study_in(opened: RDBStorage, name: str) -> StoredStudy:
    """The study of that name.

    Raises:
        StudyStoreError: it is not there, or another program made it.
    """
    from lcsc_opt.database.store import StoredStudy

    return StoredStudy.open(opened, name)
