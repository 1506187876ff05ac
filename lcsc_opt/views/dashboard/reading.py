"""How pages read the database: never writing to it, and each study once for all of them."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.database.reader import HistoryReader

READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}

_readers: weakref.WeakKeyDictionary[RDBStorage, HistoryReader] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forbid_writing(storage: RDBStorage) -> None:
    """Let the database refuse every write through this storage, whoever asks for it."""
    statement = READ_ONLY.get(storage.engine.dialect.name)
    if statement is None:
        return

    @sa.event.listens_for(storage.engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    storage.engine.dispose()  # connections made before the listener was there


def shared_reader(storage: RDBStorage) -> HistoryReader:
    """The one reader of a storage, so that pages and their refreshes read what is new only once."""
    with _lock:
        return _readers.setdefault(storage, HistoryReader(storage))
