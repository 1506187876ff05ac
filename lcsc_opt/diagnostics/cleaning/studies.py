"""Deletes a study with its rows in the database and its files in the folder of artifacts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.lock import locked
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.artifacts import artifact_directory, is_artifact_id


@dataclasses.dataclass(frozen=True)
class Deletable:
    """A study that nobody is running.

    Attributes:
        study: in its database.
        trials: how many it has.
        files: of its artifacts.
        bytes: of its rows, about, and of the files.
    """

    study: StoredStudy
    trials: int
    files: tuple[Path, ...]
    bytes: int

    def delete(self) -> None:
        """Delete the rows, then the files.

        Raises:
            StudyStoreError: somebody has begun to run it.
            StudyStoreError: the database refused.
        """
        with self.study.hold():
            self.study.delete()
        for file in self.files:
            file.unlink(missing_ok=True)


def deletable(storage: RDBStorage, name: str) -> Deletable:
    """Look at a study that is to be deleted; writes nothing.

    Raises:
        StudyStoreError: a living process runs it.
        StudyStoreError: there is no such study, or it is not one of ours.
    """
    study = StoredStudy.open(storage, name)
    if in_database(storage, lambda: locked(storage, [name])):
        raise StudyStoreError(f"{name}: is being run, so it is not deleted; stop it first")
    folder = artifact_directory(storage.url)
    files = [folder / artifact for one in study.artifacts() if is_artifact_id(artifact := str(one.get("artifact_id")))]
    sizes = []
    for file in files:
        with contextlib.suppress(OSError):  # it may be missing
            sizes.append(file.stat().st_size)
    trials = in_database(storage, lambda: storage.get_all_trials(study.key, deepcopy=False))
    stored = (study.attributes, *(trial.user_attrs for trial in trials))
    size = sum(len(json.dumps(known)) for known in stored)  # nearly all of its rows
    return Deletable(study, len(trials), tuple(files), size + sum(sizes))
