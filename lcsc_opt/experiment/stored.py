"""What a stored study was searched with, without its study file: its specification, its objective, its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_spec import OF_EXPERIMENT, StudySpec
from lcsc_opt.database.names import split_name
from lcsc_opt.database.store import Contents, read_contents
from lcsc_opt.database.urls import files_directory
from lcsc_opt.objective.checkpoints_alone import stored_context
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader


def objective_of(
    storage: RDBStorage, study: str, functions: Mapping[str, Callable[..., Any]] | None = None
) -> Objective:
    """The objective of a stored study, in its rows. Loading it may read a model.

    Args:
        storage: the database.
        study: its name.
        functions: those that its caller handed over, where its settings name such.

    Raises:
        LcscError: it cannot be loaded: its file, its checkpoints, its data or a function is not there.
    """
    contents = read_contents(storage)
    spec = spec_of(study, contents)
    stored = contents.experiment(spec.experiment)
    context = dataclasses.replace(stored_context(stored, files_directory(storage.url)), functions=functions or {})
    return ObjectiveLoader(context).load(spec.objective, spec.space.rows, stored)


def spec_of(study: str, contents: Contents) -> StudySpec:
    """The specification of a stored study, so that it can be continued without its study file.

    Raises:
        StudyStoreError: there is no such study, or another version of lcsc_opt wrote it.
    """
    stored = contents.studies.get(study)
    if stored is None:
        raise StudyStoreError(f"{study}: no such study; lcsc list has them")
    experiment = contents.experiment(split_name(study)[0])
    shared = {key: experiment.get(key) for key in OF_EXPERIMENT}
    try:
        return parse_settings(StudySpec, {**stored["specification"], **shared}, source="its specification")
    except StudySpecError as error:
        raise StudyStoreError(f"{study}: not a study of lcsc_opt, or of another version ({error})") from error
