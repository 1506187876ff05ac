"""optuna-dashboard over the study database, with the artifacts of every trial; at ``/``, not under ``/lcsc/``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna_dashboard
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage

from lcsc_opt.views.artifacts import artifact_directory


def build(storage: RDBStorage) -> Callable[..., Any]:
    """A WSGI application over ``storage``."""
    store = FileSystemArtifactStore(artifact_directory(storage.url))
    application: Callable[..., Any] = optuna_dashboard.wsgi(storage, artifact_store=store)
    return application
