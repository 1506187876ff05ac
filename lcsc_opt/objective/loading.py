"""Loading the objective that a study file names."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.code import local_code, module_file
from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.paths import KnownCheckpoints, study_directory
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.objective.contract import Objective


def load_objective(
    spec: ObjectiveSpec,
    *,
    beside: Path | None = None,
    checkpoints: KnownCheckpoints | None = None,
    rows: Rule | None = None,
) -> Objective:
    """Load the objective's file and build the objective.

    The study file's folder and the working directory become importable, for what the objective imports; paths in the
    settings may be relative to either (:func:`lcsc_opt.base.paths.given_path`).

    Args:
        spec: the file and its settings.
        beside: the study file's folder.
        checkpoints: the ones that the study began with, to find them again; ``None`` for a new study.
        rows: how layers are divided into groups with coefficients of their own.

    Raises:
        StudySpecError: the file cannot be loaded, its ``build`` does not return an objective, or ``rows`` do not fit
            it.
    """
    path = find("objectives", spec.file, beside=beside)
    with _loading(beside, checkpoints):
        module = load_file(path)
        code = _code(path, spec.settings)  # before build, which may take long: files may be edited meanwhile
        try:
            objective = module.build(dict(spec.settings))
        except LcscError:
            raise
        except Exception as error:
            raise StudySpecError(f"{path}: build(settings) raised {type(error).__name__}: {error}") from error
    if not isinstance(objective, Objective):
        raise StudySpecError(f"{path}: build(settings) returned {type(objective).__name__}, expected an Objective")
    code = {**_code(path, spec.settings), **code}
    object.__setattr__(objective, "code", dict(sorted(code.items())))  # the objective may be a frozen dataclass
    if rows is not None:
        objective.merge_in_rows(rows)
    return objective


def check_objective(
    spec: ObjectiveSpec, *, beside: Path | None = None, checkpoints: KnownCheckpoints | None = None
) -> tuple[dict[str, str], Callable[[], str | None]]:
    """Refuse what :func:`load_objective` would refuse, as far as that is known without training or reading a model.

    The objective's file takes part if it has a class ``Settings`` with a method ``check``, and perhaps a method
    ``why_no_gradient``. Arguments and errors are those of :func:`load_objective`.

    Returns:
        The digests of the objective's code, as far as its settings name it; and a function that says why there is no
        gradient, or ``None`` if there may be one.
    """
    path = find("objectives", spec.file, beside=beside)
    settings: Any = None
    with _loading(beside, checkpoints):
        settings_class: Any = getattr(load_file(path), "Settings", None)
        if isinstance(settings_class, type) and issubclass(settings_class, FrozenModel):
            settings = parse_settings(settings_class, dict(spec.settings), source="objective.settings")
        if hasattr(settings, "check"):
            settings.check()

    @functools.cache
    def why_no_gradient() -> str | None:
        if not hasattr(settings, "why_no_gradient"):
            return None
        with _loading(beside, checkpoints):
            reason: str | None = settings.why_no_gradient()
        return reason

    return _code(path, spec.settings), why_no_gradient


@contextlib.contextmanager
def _loading(beside: Path | None, checkpoints: KnownCheckpoints | None) -> Iterator[None]:
    """While this is open, the study's paths are found; its modules can be imported from then on."""
    for folder in (beside, Path()):
        if folder is None:
            continue
        resolved = str(folder.resolve())
        if resolved not in sys.path:
            sys.path.append(resolved)
    with study_directory(beside, checkpoints):
        yield


def _code(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the objective's file, and of the modules that settings name as ``module:function``."""
    sources = {path.name: path}
    for module in re.findall(r"\"([A-Za-z_][\w.]*):[A-Za-z_]\w*\"", json.dumps(settings)):
        file = module_file(module)
        if file is not None:
            sources[module] = file
    return local_code(sources)
