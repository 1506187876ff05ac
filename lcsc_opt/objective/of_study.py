"""The objective of an experiment: with the checkpoints that it began with."""

from __future__ import annotations

import dataclasses
import glob
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find
from lcsc_opt.base.code import code_of_settings
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.files import shown_size
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints, from_here, natural_order
from lcsc_opt.base.progress import notice, said_if_slow
from lcsc_opt.base.study_spec import ObjectiveSpec, Rule
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.checkpoints.watched import size_and_time
from lcsc_opt.database.states import Attributes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective, make_importable

CHECKPOINTS = "checkpoints"  # the setting that names the checkpoints
SELECT = "select"  # the setting that says which of them are used
MANY_CHECKPOINTS = 32
ENOUGH_CHECKPOINTS = 16  # for a search along the gradient, with a row of coefficients for each channel
# settings that say which checkpoints are used, and how they are packed
_CHOOSING = ("key", SELECT, "stored", "strength")


class ObjectiveLoader:
    """Loads the objective of an experiment, and keeps it.

    Args:
        context: where its files are looked for, and the functions that the caller handed over.

    Attributes:
        context: the same.
        made_at: when a run has begun, by ``time.perf_counter()``, for the estimate of how long all of it takes.
    """

    def __init__(self, context: BuildContext) -> None:
        self.context = context
        self.made_at = time.perf_counter()
        self._objective: Objective | None = None

    def load(self, spec: ObjectiveSpec, rows: Rule | None, stored: Attributes | None) -> Objective:
        """The objective, merged in these rows: all searches of an experiment have the same one, but for its rows.

        Args:
            spec: of the study file.
            rows: the layer groups with coefficients of their own; ``None`` if all layers have the same.
            stored: the attributes of the stored experiment, whose checkpoints are used again; ``None`` of a new one.

        Raises:
            LcscError: it cannot be loaded.
        """
        if self._objective is None:
            checkpoints = known_checkpoints(spec, self.context.directory, stored)
            context = dataclasses.replace(self.context, checkpoints=checkpoints)
            with said_if_slow(f"loading {spec.file}"):
                self._objective = load_objective(spec, context, rows=rows)
        else:
            self._objective.merge_in_rows(rows)
        return self._objective


def _patterns_in(settings: Mapping[str, Any]) -> Sequence[str]:
    """The paths in the setting ``checkpoints``; none where a user's own objective means something else by it."""
    named = settings.get(CHECKPOINTS)
    if isinstance(named, str):
        return [named]
    if isinstance(named, list) and all(isinstance(pattern, str) for pattern in named):
        return named
    return []


def found_checkpoints(spec: ObjectiveSpec, context: BuildContext) -> list[Path]:
    """The checkpoints that a study file names, before any is selected.

    None of packed ones, or where something is wrong with them: loading the objective says it.
    """
    named = _patterns_in(spec.settings)
    if not named:
        return []
    key: Any = spec.settings.get("key")
    try:
        patterns = [context.path(pattern) for pattern in named]
        return sorted(find_checkpoints(patterns, key=key, has_steps="steps" in spec.settings), key=natural_order)
    except (LcscError, TypeError):
        return []


def say_found(paths: Sequence[Path]) -> None:
    """Say which checkpoints were found, if any were.

    A run calls this before it imports its optimizers, which takes as long as importing torch.
    """
    if not paths:
        return
    size = sum(size_and_time(path)[0] for path in paths)
    notice(f"{len(paths)} checkpoints, {from_here(paths[0])} to {paths[-1].name} ({shown_size(size)})")


def code_now(spec: ObjectiveSpec, directory: Path | None) -> Mapping[str, str]:
    """Name → digest of the code that an objective's settings name; empty if its file cannot be found."""
    make_importable(directory)
    try:
        path = find("objectives", spec.file, study_folder=directory)
        return {name: file.sha256 for name, file in code_of_settings(path, spec.settings).items()}
    except LcscError:
        return {}


def known_checkpoints(
    spec: ObjectiveSpec, directory: Path | None, stored: Attributes | None
) -> KnownCheckpoints | None:
    """The checkpoints that an experiment began with; ``None`` if it is new, or chooses others now.

    Another path alone chooses no others: it is where the same ones are now.

    Args:
        spec: the objective of the study file.
        directory: of the study file.
        stored: the attributes of the stored experiment; ``None`` of a new one.
    """
    if stored is None or not stored["checkpoints"] or stored["objective"]["file"] != spec.file:
        return None
    before = stored["objective"]["settings"]
    now = spec.settings
    if any(before.get(setting) != now.get(setting) for setting in _CHOOSING):
        return None
    has_moved = before.get(CHECKPOINTS) != now.get(CHECKPOINTS)
    has_moved = has_moved or not set(moved(directory, stored)).isdisjoint(_patterns_in(now))
    return KnownCheckpoints(stored["checkpoints"], tuple(stored["steps"]), has_moved)


def moved(directory: Path | None, stored: Attributes) -> list[str]:
    """The paths in a stored experiment's settings that lead to another place now, where there is something.

    A relative path does, from another folder.
    """
    context = BuildContext(directory)
    moved_texts = []
    for text, place in stored["places"].items():
        now = context.path(text)
        if str(now) != place and (now.exists() or glob.glob(str(now), recursive=True)):  # noqa: PTH207 - a glob
            moved_texts.append(text)
    return moved_texts
