"""The database of one run: made when something is first written, and read once."""

from __future__ import annotations

import functools

from optuna.storages import RDBStorage

from lcsc_opt.database.connection import open_existing, open_storage
from lcsc_opt.database.store import Contents, read_contents
from lcsc_opt.database.urls import files_directory


class Database:
    """A database that may not exist yet.

    Args:
        url: of it.

    Attributes:
        url: the same.
        files: the folder for what its studies need and can make again.
        storage: what it is read and written with; ``None`` while there is none.

    Raises:
        StudyStoreError: it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = files_directory(url)
        self.storage: RDBStorage | None = open_existing(url)

    @functools.cached_property
    def contents(self) -> Contents:
        """What it held when that was first asked."""
        if self.storage is None:
            return Contents()
        return read_contents(self.storage)

    def made(self) -> RDBStorage:
        """The storage, of a database that is made now if there is none.

        Raises:
            StudyStoreError: it cannot be made.
        """
        if self.storage is None:
            self.storage = open_storage(self.url, write=True)
        return self.storage

    def existing(self) -> RDBStorage:
        """The storage of a database that must exist.

        Raises:
            StudyStoreError: there is none.
        """
        return self.storage or open_storage(self.url, write=False)  # to open it raises the error
