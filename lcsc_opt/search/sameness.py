"""Checks that a study's environment, code, checkpoints and settings are those that it began with.

A change in any of them could change numbers silently. Studies of one experiment must not differ either, since their
losses are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.code import changed_code
from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import decisive, describe_difference, environment
from lcsc_opt.database.names import SUCCEEDED, differences, is_search, split_name
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import edited_code
from lcsc_opt.search.plan import CHECKPOINTS, StudyPlan
from lcsc_opt.trajectory.inspection import identical_checkpoints

NEUTRAL = {  # settings that change no loss beyond rounding; checkpoints are known by their hash
    *(CHECKPOINTS, "metrics", "held_out_metrics"),
    *("batch_size", "gradient_batch_size", "device", "compile", "channels_last"),
}


def check_siblings(
    storage: RDBStorage, plan: StudyPlan, objective: Objective | None = None, *, accept_code: bool = False
) -> None:
    """Refuse a new study whose losses would not compare with those of its experiment's other studies.

    Args:
        storage: where the other studies are.
        plan: of the new study.
        objective: its objective; without it only settings are compared.
        accept_code: allow other code of the objective.

    Raises:
        StudyStoreError: the settings, the objective or its code differ; the message says how.
    """
    names = [name for name in study_names(storage) if is_search(name) and split_name(name)[0] == plan.spec.name]
    same_optimizer = [name for name in names if split_name(name)[1] == plan.optimizer.name]
    for name in dict.fromkeys([*names[:1], *same_optimizer[:1]]):  # the other studies were compared with these
        stored = StoredStudy.open(storage, name).attributes
        before, now = stored.get("specification"), plan.specification()
        if not before:
            continue
        parts = ("objective", "optimizer", "space") if name in same_optimizer else ("objective",)
        found = [line for part in parts for line in differences(_decisive(before[part]), _decisive(now[part]), part)]
        if objective is not None and not found:
            mine = objective.fingerprint()
            if not accept_code and (changed := changed_code(stored["fingerprint"]["code"], mine["code"])):
                found = [f"code: {changed}; --accept-code where that cannot change a loss"]
            here, there = (_decisive(known["objective"]) for known in (mine, stored["fingerprint"]))
            found += differences(_of_both(there, here), _of_both(here, there), "objective")
        if found:
            raise StudyStoreError(
                f"{plan.name}: its losses would not compare with those of {name}: {'; '.join(found)}. Give the "
                "experiment another name: lcsc run FILE name=..."
            )


def name_identical_checkpoints(objective: Objective) -> None:
    """Say which of the checkpoints that an objective combines have the same weights."""
    with contextlib.suppress(ObjectiveError):  # nothing is packed
        for warning in identical_checkpoints(packed_trajectory(objective)):
            notice(warning)


def _decisive(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _decisive(part) for key, part in value.items() if key not in NEUTRAL}


def _of_both(value: Any, other: Any) -> Any:
    """``value`` without what ``other`` does not have, such as an extractor that only one of them reports."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {key: _of_both(part, other[key]) for key, part in value.items() if key in other}


def accepted_changes(
    study: StoredStudy, objective: Objective, *, accept_environment: bool = False, accept_code: bool = False
) -> dict[str, Any]:
    """The attributes to write into a study that continues after accepted changes; empty where nothing changed.

    Args:
        study: as it is stored.
        objective: as it was loaded now.
        accept_environment: allow other packages or another BLAS.
        accept_code: allow other code of the objective. Before the first success that is always allowed.

    Raises:
        StudyStoreError: something changed and is not accepted; the message says what.
        TrajectoryError: the weights on the disk are damaged.
    """
    changes = environment_changes(study, accept=accept_environment)
    changes |= objective_changes(study, objective, {**study.attributes, **changes}, accept_code=accept_code)
    trajectory = objective.trajectory
    if trajectory is not None and trajectory.touched:
        trajectory.verify()  # its hash comes from the manifest; the weights may have changed
    return changes


def environment_changes(study: StoredStudy, *, accept: bool) -> dict[str, Any]:
    """:func:`accepted_changes` for the environment alone."""
    fingerprint, now = study.attributes["fingerprint"], environment()
    difference = describe_difference(*(decisive(known) for known in (fingerprint["environment"], now)))
    if difference and not accept:
        raise StudyStoreError(
            f"{study.name}: begun in another environment: {difference}. Go back to it, or continue in this one "
            "with --accept-environment"
        )
    return {"fingerprint": {**fingerprint, "environment": now}} if difference else {}


def objective_changes(
    study: StoredStudy, objective: Objective, attributes: dict[str, Any], *, accept_code: bool
) -> dict[str, Any]:
    """:func:`accepted_changes` for the objective alone; ``attributes`` are the study's."""
    fingerprint, now = attributes["fingerprint"], objective.fingerprint()
    changed = code_change(study, now["code"], accept=accept_code)
    if not changed:
        study.require("fingerprint", now["objective"], part="objective")
        return {}
    before, here = (known["objective"].get("trajectory") for known in (fingerprint, now))
    if before != here:
        raise StudyStoreError(f"{study.name}: begun with the checkpoints {before}, and these are {here}")
    notice(f"{study.name}: goes on with other code: {changed}")
    known = attributes.get("code_changes", [])
    return {
        "code_changes": [*known, {"before_trial": len(study.trials()), "changed": changed}],
        "fingerprint": {**fingerprint, **now},
    }


def say_edited(study: StoredStudy, plan: StudyPlan) -> None:
    """Say of a finished study that its objective's code is another one now: its results are of the old code."""
    with contextlib.suppress(StudySpecError):  # the code is gone: nobody takes the results for those of another code
        before = study.attributes["fingerprint"]["code"]
        if changed := edited_code(plan.spec.objective, before, beside=plan.directory):
            notice(
                f"{study.name}: finished with other code: {changed} since. To search with the code of now, give the "
                "experiment another name: lcsc run FILE name=..."
            )


def code_change(study: StoredStudy, code: Mapping[str, str], *, accept: bool) -> str:
    """The changes in the objective's code, in words; empty where there is none.

    Raises:
        StudyStoreError: the code changed, this is not accepted, and trials have succeeded with the old code.
    """
    changed = changed_code(study.attributes["fingerprint"]["code"], code)
    if changed and not accept and any(trial.state in SUCCEEDED for trial in study.trials()):
        raise StudyStoreError(
            f"{study.name}: begun with other code: {changed}. Put it back, or give the study another name; where "
            "the change cannot change a loss, continue with --accept-code"
        )
    return changed
