"""Optuna reads its migration scripts anew for each database, which takes most of the time of opening one."""

from __future__ import annotations

from typing import Any

from optuna.storages._rdb import storage

_read = storage._VersionManager._create_alembic_script
_known: list[Any] = []


def read_once() -> None:
    """In this process, and in those that are forked from it."""

    def once(manager: Any) -> Any:
        _known.extend([] if _known else [_read(manager)])
        return _known[0]

    storage._VersionManager._create_alembic_script = once  # type: ignore[assignment, method-assign]
