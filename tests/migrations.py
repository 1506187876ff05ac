"""Optuna reads its migration scripts again for each database that is opened, which takes 20 to 50 ms."""

from __future__ import annotations

from typing import Any

from optuna.storages._rdb import storage

_read = storage._VersionManager._create_alembic_script
_known: list[Any] = []


def read_once() -> None:
    """In this process, and in those that are forked from it."""
    storage._VersionManager._create_alembic_script = _once  # type: ignore[assignment, method-assign]


def _once(manager: Any) -> Any:
    if not _known:
        _known.append(_read(manager))
    return _known[0]
