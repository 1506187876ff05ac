"""What a study needs from outside: the trials of the database, the objective and its code, workers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lcsc_opt.base.catalog import find
from lcsc_opt.base.code import code_of_settings
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_file import ObjectiveSpec, StudySpec
from lcsc_opt.base.sweep import split_point
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.names import split_name
from lcsc_opt.database.store import StoredStudy, trial_count
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective, make_importable
from lcsc_opt.study.comparison import CHECKPOINTS, Attributes, StoredTrials
from lcsc_opt.trajectory.cached import as_patterns

_CHOOSING = ("key", "select", "stored")  # settings that say which checkpoints are used, and how they are packed


def read_trials(storage: RDBStorage, name: str) -> StoredTrials:
    """How many trials a study has, and whether any succeeded; they are counted in the database, not read."""
    study = StoredStudy.open(storage, name)
    forgotten = (study.attributes.get("retry") or {}).get("forgotten", ())
    many = trial_count(storage, study.key)
    try:
        in_database(storage, lambda: storage.get_best_trial(study.key))
        succeeded = True
    except ValueError:  # none is complete; others may have a loss that does not compare
        succeeded = in_database(storage, lambda: storage.get_n_trials(study.key, (TrialState.PRUNED,))) > 0
    return StoredTrials(many - len(forgotten), succeeded)


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


def fingerprint_of(objective: Objective) -> dict[str, Any]:
    """``objective``, ``code`` and ``environment``: everything that changes results, as it is now.

    Raises:
        TrajectoryError: the weights on the disk are damaged.
    """
    trajectory = objective.trajectory
    if trajectory is not None and trajectory.touched:
        trajectory.verify()  # its hash comes from the manifest; the weights may have changed
    return {**objective.fingerprint(), "environment": environment()}


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


def worker_environments(spec: StudySpec) -> list[Mapping[str, str]]:
    """The environment variables of each worker on this machine; empty if none must be set.

    Raises:
        ObjectiveError: a worker's device is not there.
    """
    if spec.ray is not None or spec.names_device:
        return []
    if spec.worker_count == 1 and not spec.devices:
        return []
    from lcsc_opt.base import accelerator  # which imports torch

    return [*accelerator.environments(spec.worker_count, spec.devices)]


@contextlib.contextmanager
def open_workers(
    spec: StudySpec,
    context: BuildContext,
    objective: Objective,
    expected: Mapping[str, Any],
    studies: Mapping[str, Attributes],
) -> Iterator[WorkerPool | None]:
    """A study's worker processes, which start when they are first used; ``None`` if this process evaluates.

    Args:
        spec: of the study.
        context: where its files are.
        objective: as this process has loaded it.
        expected: its fingerprint; workers must load the same objective and code.
        studies: name → attributes of all studies, with this one's, whose checkpoints workers load.

    Raises:
        ObjectiveError: a worker's device is not there.
        StudySpecError: the Ray cluster has no room.
    """
    load = loader_of(spec, context, studies)
    must_have = {name: expected[name] for name in ("objective", "code")}
    if spec.ray is not None:
        from lcsc_opt.evaluation.ray import ray_workers

        with ray_workers(
            spec.ray, spec.objective, objective, expected=must_have, study=context.directory, files=context.files
        ) as pool:
            yield pool
    elif spec.worker_count == 1 and not spec.devices:
        yield None
    else:
        pool = WorkerPool(load, spec.worker_count, expected=must_have, environments=worker_environments(spec))
        with contextlib.closing(pool):
            yield pool
