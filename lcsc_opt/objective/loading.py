"""Loading the objective that a study file names: its file is run, its settings are checked, and it is built.

An objective's file has a function ``build(settings, context)``. The context says where the study file is and which
checkpoints it was begun with; the function may leave that parameter out.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from lcsc_opt.base.catalog import advice_if_hiding, find, load_file
from lcsc_opt.base.code import code_of_settings
from lcsc_opt.base.errors import StudySpecError, raised_as
from lcsc_opt.base.files import same_working_folder
from lcsc_opt.base.imports import has_parameter
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import CONTIGUOUS
from lcsc_opt.base.settings import naming_setting
from lcsc_opt.base.study_spec import ObjectiveSpec, Rule
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key


def load_objective(
    spec: ObjectiveSpec, context: BuildContext, *, rows: Rule | None = None, layout: str = CONTIGUOUS
) -> Objective:
    """Load the objective's file and build the objective.

    The study file's folder and the working directory become importable, for what the objective imports; paths in the
    settings may be relative to either (:meth:`lcsc_opt.base.paths.BuildContext.path`).

    Args:
        spec: the file and its settings.
        context: where its files are, and what it needs to know of its study; the objective gets a copy.
        rows: how layers are divided into groups with coefficients of their own; ``None`` for one row of all layers.
        layout: of the network's weights.

    Raises:
        StudySpecError: the file cannot be loaded, its ``build`` does not return an objective, or ``rows`` do not fit
            it.
    """
    context = dataclasses.replace(context, found={})  # of this objective alone
    make_importable(context.directory)
    path = find("objectives", spec.file, study_folder=context.directory)
    module = load_file(path)
    code = code_of_settings(path, spec.settings)  # before build, which may take long: files may be edited meanwhile
    advice = advice_if_hiding(path)
    building = raised_as(StudySpecError, f"{path}: build", advice=advice)
    with naming_setting(spec.settings), same_working_folder(), building:
        arguments = {}
        if has_parameter(module.build, "context"):  # which it may leave out
            arguments["context"] = context
        objective = module.build(dict(spec.settings), **arguments)
    if not isinstance(objective, Objective):
        returned = type(objective).__name__
        raise StudySpecError(f"{path}: build returned {returned}, expected an Objective{advice}")
    code = {**code_of_settings(path, spec.settings), **code}  # build may have made further modules importable
    object.__setattr__(objective, "code", dict(sorted(code.items())))  # the objective may be a frozen dataclass
    object.__setattr__(objective, "places", dict(sorted(context.found.items())))
    object.__setattr__(objective, "key", Key.of(spec, objective, context, path))
    if rows is not None:
        objective.merge_in_rows(rows)
    if layout != objective.layout:  # else an objective without a choice, perhaps a frozen dataclass, stays untouched
        objective.layout = layout
    return objective


def verify_weights(objective: Objective) -> None:
    """Compare an objective's weights with the hash by which it describes itself, if they were written again.

    Raises:
        TrajectoryError: the weights on the disk are damaged.
    """
    trajectory = objective.trajectory
    if trajectory is not None and trajectory.touched:
        trajectory.verify()  # its hash comes from the manifest; the weights may have changed


def make_importable(study_folder: Path | None) -> None:
    """Modules next to the study file and in the working directory can be imported from now on.

    They come last, so none of them hides a module that is installed.
    """
    for folder in (study_folder, Path()):
        if folder is None:
            continue
        resolved = str(folder.resolve())
        if resolved not in sys.path:
            sys.path.append(resolved)
