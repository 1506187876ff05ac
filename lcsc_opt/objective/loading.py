"""Loading the objective that a study file names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.code import called_modules, local_code, module_file
from lcsc_opt.base.errors import CatalogError, LcscError
from lcsc_opt.base.paths import KnownCheckpoints, study_checkpoints, study_directory
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.contract import Objective


def load_objective(
    spec: ObjectiveSpec, *, beside: Path | None = None, checkpoints: KnownCheckpoints | None = None
) -> Objective:
    """Load the objective's file and build the objective.

    The study file's folder and the working directory become importable, for what the objective imports; paths in the
    settings may be relative to either (:func:`lcsc_opt.base.paths.given_path`).

    Args:
        spec: which file, and its settings.
        beside: the study file's folder.
        checkpoints: those that the study was begun with, which are then found again; ``None`` for a new one.

    Raises:
        CatalogError: when the file cannot be loaded or its ``build`` does not give an objective.
    """
    path = find("objectives", spec.file, beside=beside)
    for folder in (beside, Path()):
        if folder is not None and str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))
    with study_directory(beside), study_checkpoints(checkpoints), called_modules() as called:
        objective = _build(load_file(path), path, dict(spec.settings))
    if not isinstance(objective, Objective):
        raise CatalogError(f"{path}: build(settings) returned {type(objective).__name__}, expected an Objective")
    files = {name: module_file(name) for name in called}
    objective.code = local_code({path.name: path, **{name: file for name, file in files.items() if file is not None}})
    return objective


def _build(module: ModuleType, path: Path, settings: dict[str, Any]) -> Any:
    try:
        return module.build(settings)
    except LcscError:
        raise
    except Exception as error:
        raise CatalogError(f"{path}: build(settings) raised {type(error).__name__}: {error}") from error
