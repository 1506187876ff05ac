"""What was changed since a study began: the user's code, the versions, the checkpoints, the objective's settings.

A change in any of them could change numbers silently. Studies of one experiment must not differ either, since their
losses are compared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import describe_difference, environment
from lcsc_opt.database.names import SUCCEEDED, differences, is_search, split_name
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.plan import CHECKPOINTS, StudyPlan
from lcsc_opt.trajectory.inspection import identical_checkpoints

_NEUTRAL = {  # settings that change no loss beyond rounding; checkpoints are known by their hash
    *(CHECKPOINTS, "metrics", "held_out_metrics"),
    *("batch_size", "gradient_batch_size", "device", "compile", "channels_last"),
}
_ACCEPT = "if that cannot change a loss, continue with --accept-changes"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every difference between two fingerprints, in words; what ``now`` lacks is not compared."""
    found = []
    if "environment" in now:
        keys = ("packages", "blas", "machine")  # what decides results: not Python's version, not the number of cores
        decisive = ({key: known["environment"].get(key) for key in keys} for known in (before, now))
        found.append(describe_difference(*decisive))
    if "code" in now:
        found.append(_changed_code(before["code"], now["code"]))
    if "objective" in now:
        found += differences(before["objective"], json.loads(json.dumps(now["objective"])), "objective")
    return [line for line in found if line]


def _changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    kinds = {"changed": changed, "new": sorted(now.keys() - before.keys()), "gone": sorted(before.keys() - now.keys())}
    return "; ".join(f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names)


def refuse_changes(study: StoredStudy, now: Mapping[str, Any], *, accept: bool) -> str:
    """What differs between the stored study's fingerprint and ``now``, in words; empty if nothing does.

    Raises:
        StudyStoreError: something changed and is not accepted. Before the first success every change is allowed, but
            never other checkpoints.
    """
    before = study.attributes["fingerprint"]
    found = "; ".join(changes(before, now))
    was, here = (known.get("objective", {}).get("trajectory") for known in (before, now))
    others = "objective" in now and was != here
    if found and (others or (not accept and any(trial.state in SUCCEEDED for trial in study.trials()))):
        raise StudyStoreError(
            f"{study.name}: changed since it began: {found}. Put it back, or give the study another name; "
            f"{'other checkpoints are another study' if others else _ACCEPT}"
        )
    return found


def accepted_changes(study: StoredStudy, objective: Objective, *, accept: bool) -> dict[str, Any]:
    """The attributes to write into a study that continues; empty if nothing changed.

    Args:
        study: as it is stored.
        objective: as it was loaded now.
        accept: allow changes.

    Raises:
        StudyStoreError: as :func:`refuse_changes`.
        TrajectoryError: the weights on the disk are damaged.
    """
    if (trajectory := objective.trajectory) is not None and trajectory.touched:
        trajectory.verify()  # its hash comes from the manifest; the weights may have changed
    now = {**objective.fingerprint(), "environment": environment()}
    found = refuse_changes(study, now, accept=accept)
    if not found:
        return {}
    notice(f"{study.name}: continues with changes: {found}")
    change = {"before_trial": len(study.trials()), "changed": found}
    return {"changes": [*study.attributes.get("changes", []), change], "fingerprint": now}


def check_siblings(
    storage: RDBStorage, plan: StudyPlan, objective: Objective | None = None, *, accept: bool = False
) -> None:
    """Refuse a new study whose losses would not compare with those of its experiment's other studies.

    Args:
        storage: where the other studies are.
        plan: of the new study.
        objective: its objective; without it only settings are compared.
        accept: allow other code of the objective.

    Raises:
        StudyStoreError: the settings, the objective or its code differ; the message says how.
    """
    if not is_search(plan.name):
        return
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
            mine, theirs = objective.fingerprint(), stored["fingerprint"]
            here, there = (_decisive(known["objective"]) for known in (mine, theirs))
            compared = {"objective": _of_both(here, there)} if accept else {**mine, "objective": _of_both(here, there)}
            found = changes({**theirs, "objective": _of_both(there, here)}, compared)
        if found:
            raise StudyStoreError(
                f"{plan.name}: its losses would not compare with those of {name}: {'; '.join(found)}. Give the "
                f"experiment another name: lcsc run FILE name=...; where only code changed, {_ACCEPT}"
            )


def name_identical_checkpoints(objective: Objective) -> None:
    """Say which of the checkpoints that an objective combines have the same weights."""
    with contextlib.suppress(ObjectiveError):  # nothing is packed
        for warning in identical_checkpoints(packed_trajectory(objective)):
            notice(warning)


def _decisive(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _decisive(part) for key, part in value.items() if key not in _NEUTRAL}


def _of_both(value: Any, other: Any) -> Any:
    """``value`` without what ``other`` does not have, such as an extractor that only one of them reports."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {key: _of_both(part, other[key]) for key, part in value.items() if key in other}
