"""The objective of a study: with the checkpoints that it, or another study of its experiment, began with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find
from lcsc_opt.base.code import code_of_settings
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.study_spec import ObjectiveSpec, StudySpec
from lcsc_opt.base.sweep import split_point
from lcsc_opt.checkpoints.finding import as_patterns
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.names import split_name
from lcsc_opt.database.states import Attributes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective, make_importable

CHECKPOINTS = "checkpoints"  # the setting that names the checkpoints
_CHOOSING = ("key", "select", "stored")  # settings that say which checkpoints are used, and how they are packed


class ObjectiveLoader:
    """Loads objectives and keeps the last one, so studies of one objective should follow each other.

    Args:
        context: where their files are looked for, and the functions that the caller handed over.

    Attributes:
        context: the same.
    """

    def __init__(self, context: BuildContext) -> None:
        self.context = context
        self._key: str | None = None
        self._rows: Rule | None = None
        self._objective: Objective | None = None

    def load(self, spec: StudySpec, studies: Mapping[str, Attributes]) -> Objective:
        """The study's objective, merged in its rows.

        Args:
            spec: whose objective it is.
            studies: name → attributes of all stored studies, whose checkpoints it may have.

        Raises:
            LcscError: it cannot be loaded.
        """
        key = spec.objective.model_dump_json()
        rows = spec.space.rows
        if self._objective is None or self._key != key:
            self._objective = None  # frees its memory first
            self._objective = loader_of(spec, self.context, studies)()
            self._key = key
        elif self._rows != rows:
            self._objective.merge_in_rows(rows)
        self._rows = rows
        return self._objective


def code_now(spec: ObjectiveSpec, directory: Path | None) -> Mapping[str, str]:
    """Name → digest of the code that an objective's settings name; empty if it cannot be found."""
    make_importable(directory)
    try:
        path = find("objectives", spec.file, study_folder=directory)
        return {name: file.sha256 for name, file in code_of_settings(path, spec.settings).items()}
    except LcscError:
        return {}


def loader_of(spec: StudySpec, context: BuildContext, studies: Mapping[str, Attributes]) -> Callable[[], Objective]:
    """What loads a study's objective, here and in workers; picklable."""
    return functools.partial(
        load_objective,
        spec.objective,
        study_folder=context.directory,
        checkpoints=known_checkpoints(spec, context.directory, studies),
        rows=spec.space.rows,
        functions=context.functions,
        files=context.files,
    )


def known_checkpoints(
    spec: StudySpec, directory: Path | None, studies: Mapping[str, Attributes]
) -> KnownCheckpoints | None:
    """The checkpoints of the first stored study of this experiment with this objective, if there is one.

    All studies of an experiment use the same checkpoints; otherwise they could not be compared. Points of a sweep that
    name the same files use the same checkpoints, too.
    """
    objective = spec.objective
    for name, stored in studies.items():
        experiment = split_name(name)[0]
        stored_objective = (stored.get("specification") or {}).get("objective")
        if split_point(experiment)[0] != spec.sweep or not stored.get("checkpoints"):
            continue
        if not stored_objective or stored_objective["file"] != objective.file:
            continue
        before: Mapping[str, Any] = stored_objective["settings"]
        now = objective.settings
        same_choice = all(before.get(setting) == now.get(setting) for setting in _CHOOSING)
        has_moved = before.get(CHECKPOINTS) != now.get(CHECKPOINTS)
        another_point = experiment != spec.experiment  # which may be a point on other checkpoints
        if same_choice and not (has_moved and another_point):
            study = spec.name if spec.name in studies else name
            texts: Any = now.get(CHECKPOINTS) or ()
            has_moved = has_moved or not set(moved(directory, stored)).isdisjoint(as_patterns(texts))
            return KnownCheckpoints(stored["checkpoints"], tuple(stored["steps"]), has_moved, study=study)
    return None


def moved(directory: Path | None, stored: Attributes) -> list[str]:
    """The paths in a stored study's settings that lead to another place now, where there is something.

    A relative path does, from another folder.
    """
    context = BuildContext(directory)
    others = []
    for text, place in (stored.get("places") or {}).items():
        now = context.path(text)
        if str(now) != place and (now.exists() or any(True for _ in now.parent.glob(now.name))):
            others.append(text)
    return others
