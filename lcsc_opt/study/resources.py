"""What a study needs from outside: the contents of the database, the objective and its code, workers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.names import split_name
from lcsc_opt.database.store import StoredStudy, our_studies, trial_count
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import check_objective, load_objective
from lcsc_opt.study.plan import CHECKPOINTS, Plan
from lcsc_opt.study.resolving import Attributes, Evidence, Resolved, StoredStudies, StoredTrials

_CHOOSING = ("key", "select", "stored")  # settings that say which checkpoints are used, and how they are packed


def read_database(storage: RDBStorage) -> StoredStudies:
    """What a database holds; the trials of a study are counted when they are asked for."""

    def trials(name: str) -> StoredTrials:
        return read_trials(storage, name)

    return StoredStudies(our_studies(storage), trials)


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


def evidence_before_loading(plan: Plan, studies: Mapping[str, Attributes]) -> Evidence:
    """The evidence that needs no loaded objective: the environment, and digests of the code that its settings name.

    An error does not end this, as a finished study can still be shown: it is the evidence's ``refusal``, which
    ``resolve`` raises for all other studies.

    Args:
        plan: whose objective it is.
        studies: name → attributes of all stored studies.
    """
    environment_now = environment()
    checkpoints = known_checkpoints(plan, studies)
    try:
        checked = check_objective(
            plan.spec.objective,
            study_folder=plan.directory,
            checkpoints=checkpoints,
            functions=plan.functions,
            files=plan.files,
        )
    except LcscError as error:
        return Evidence({"environment": environment_now, "code": {}}, refusal=error)
    digests = {name: file.sha256 for name, file in checked.code.items()}
    fingerprint = {"environment": environment_now, "code": digests}
    return Evidence(
        fingerprint,
        checked.why_no_gradient,
        checked.why_no_report,
        worker_environments=worker_environments,
    )


class ObjectiveLoader:
    """Loads objectives and keeps the last one, so plans of one objective should follow each other."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._objective: Objective | None = None

    def load(self, plan: Plan, studies: Callable[[], Mapping[str, Attributes]]) -> Objective:
        """The plan's objective; loading it may train or read a model.

        Args:
            plan: whose objective it is.
            studies: gives name → attributes of all stored studies; called only to load.
        """
        if self._objective is None or self._key != plan.objective_key:
            self._objective = None  # frees its memory first
            self._objective = loader_of(plan, studies())()
            self._key = plan.objective_key
        return self._objective

    def evidence(self, plan: Plan, studies: Callable[[], Mapping[str, Attributes]]) -> Evidence:
        """What is known of the plan's objective once it is loaded; arguments as for :meth:`load`.

        Raises:
            TrajectoryError: the weights on the disk are damaged.
        """
        objective = self.load(plan, studies)
        trajectory = objective.trajectory
        if trajectory is not None and trajectory.touched:
            trajectory.verify()  # its hash comes from the manifest; the weights may have changed
        fingerprint = {**objective.fingerprint(), "environment": environment()}
        return Evidence(
            fingerprint,
            objective.why_no_gradient,
            objective=objective,
            worker_environments=worker_environments,
        )


def loader_of(plan: Plan, studies: Mapping[str, Attributes]) -> Callable[[], Objective]:
    """What loads a plan's objective, here and in workers; picklable."""
    checkpoints = known_checkpoints(plan, studies)
    return functools.partial(
        load_objective,
        plan.spec.objective,
        study_folder=plan.directory,
        checkpoints=checkpoints,
        rows=plan.spec.space.rows,
        functions=plan.functions,
        files=plan.files,
    )


def known_checkpoints(plan: Plan, studies: Mapping[str, Attributes]) -> KnownCheckpoints | None:
    """The checkpoints of the first stored study of this experiment with this objective, if there is one.

    All studies of an experiment use the same checkpoints; otherwise they could not be compared. Points of a sweep that
    name the same files use the same checkpoints, too.
    """
    objective = plan.spec.objective
    for name, stored in studies.items():
        experiment = split_name(name)[0]
        stored_objective = (stored.get("specification") or {}).get("objective")
        if split_point(experiment)[0] != plan.spec.sweep or not stored.get("checkpoints"):
            continue
        if not stored_objective or stored_objective["file"] != objective.file:
            continue
        before: Mapping[str, Any] = stored_objective["settings"]
        now = objective.settings
        same_choice = all(before.get(setting) == now.get(setting) for setting in _CHOOSING)
        moved = before.get(CHECKPOINTS) != now.get(CHECKPOINTS)
        another_point = experiment != plan.spec.name  # which may be a point on other checkpoints
        if same_choice and not (moved and another_point):
            return KnownCheckpoints(stored["checkpoints"], tuple(stored["steps"]), moved)
    return None


def check_clusters(plans: Sequence[Plan]) -> None:
    """Refuse plans whose Ray cluster cannot be used.

    Raises:
        LcscError: Ray is not installed, or the cluster has no room.
    """
    clusters = {plan.objective_key: plan for plan in plans}
    for plan in clusters.values():
        if plan.ray is not None:
            from lcsc_opt.evaluation.ray import check_cluster

            check_cluster(plan.ray, plan.spec.objective)


def worker_environments(plan: Plan) -> list[Mapping[str, str]]:
    """The environment variables of each worker on this machine; empty if none must be set.

    Raises:
        ObjectiveError: a worker's device is not there.
    """
    if plan.ray is not None or plan.names_device:
        return []
    if plan.workers == 1 and not plan.devices:
        return []
    from lcsc_opt.base import accelerator  # which imports torch

    return [*accelerator.environments(plan.workers, plan.devices)]


@contextlib.contextmanager
def open_workers(
    resolved: Resolved, objective: Objective, studies: Mapping[str, Attributes]
) -> Iterator[WorkerPool | None]:
    """The study's worker processes, which start when they are first used; ``None`` if this process evaluates.

    Args:
        resolved: the study; workers must load the objective that was resolved.
        objective: as this process has loaded it.
        studies: name → attributes of all stored studies.
    """
    plan = resolved.plan
    # Workers load the checkpoints of this study, which is not stored yet if it is new.
    load = loader_of(plan, {**studies, plan.name: resolved.attributes})
    expected = {name: resolved.fingerprint[name] for name in ("objective", "code")}
    if plan.ray is not None:
        from lcsc_opt.evaluation.ray import ray_workers

        spec = plan.spec.objective
        with ray_workers(plan.ray, spec, objective, expected=expected, study=plan.directory, files=plan.files) as pool:
            yield pool
    elif plan.workers == 1 and not plan.devices:
        yield None
    else:
        pool = WorkerPool(load, plan.workers, expected=expected, environments=resolved.worker_environments)
        with contextlib.closing(pool):
            yield pool
