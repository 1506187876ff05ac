"""What was changed since a study began: the user's code, the versions, the checkpoints, the objective's settings.

A change in any of them could change numbers silently. Studies of one experiment must not differ either, since their
losses are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.reproducibility import describe_difference, environment
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.database.names import SUCCEEDED, differences, is_search, split_name
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.plan import CHECKPOINTS, StudyPlan

_NEUTRAL = {  # settings that change no loss beyond rounding; checkpoints are known by their hash
    *(CHECKPOINTS, "metrics", "held_out_metrics"),
    *("batch_size", "gradient_batch_size", "device", "compile", "channels_last"),
}
_ACCEPT = "if that cannot change a loss, continue with --accept-changes"


def fingerprint(objective: Objective) -> dict[str, Any]:
    """JSON-able: what results depend on, apart from the specification.

    Raises:
        TrajectoryError: the weights on the disk are damaged.
    """
    if (trajectory := objective.trajectory) is not None and trajectory.touched:
        trajectory.verify()  # its hash comes from the manifest; the weights may have changed
    return {**objective.fingerprint(), "environment": environment()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every difference between two fingerprints, in words; what ``now`` lacks is not compared."""
    found = []
    if "environment" in now:
        keys = ("packages", "blas", "machine")  # what decides results: not Python's version, not the number of cores
        decisive = ({key: known["environment"].get(key) for key in keys} for known in (before, now))
        found.append(describe_difference(*decisive))
    if "code" in now:
        was, code = before["code"], now["code"]
        changed = sorted(name for name in was.keys() & code.keys() if was[name] != code[name])
        kinds = {"changed": changed, "new": sorted(code.keys() - was.keys()), "gone": sorted(was.keys() - code.keys())}
        found += [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
    if "objective" in now:
        found += differences(before["objective"], json.loads(json.dumps(now["objective"])), "objective")
    return "; ".join(line for line in found if line)


def accepted_changes(study: StoredStudy, now: Mapping[str, Any], *, accept: bool) -> dict[str, Any]:
    """The attributes to write into a study that continues; empty if nothing changed.

    Args:
        study: as it is stored.
        now: its fingerprint, or the part of it that is known.
        accept: allow changes. Before the first success they are always allowed, but never other checkpoints.

    Raises:
        StudyStoreError: something changed and is not accepted.
    """
    stored = study.attributes
    before = stored["fingerprint"]
    if not (found := changes(before, now)):
        return {}
    trials = study.trials()
    was, here = (known.get("objective", {}).get("trajectory") for known in (before, now))
    others = "objective" in now and was != here
    if others or (not accept and any(trial.state in SUCCEEDED for trial in trials)):
        raise StudyStoreError(
            f"{study.name}: changed since it began: {found}. Put it back, or give the study another name; "
            f"{'other checkpoints are another study' if others else _ACCEPT}"
        )
    change = {"before_trial": len(trials), "changed": found}
    return {"changes": [*stored.get("changes", []), change], "fingerprint": {**before, **now}}


def check_siblings(
    plan: StudyPlan, studies: Mapping[str, Mapping[str, Any]], now: Mapping[str, Any] | None = None, *, accept: bool
) -> None:
    """Refuse a new study whose losses would not compare with those of its experiment's other studies.

    Args:
        plan: of the new study.
        studies: name → attributes of all stored studies.
        now: its fingerprint; without it only settings are compared.
        accept: allow other code of the objective.

    Raises:
        StudyStoreError: the settings, the objective or its code differ; the message says how.
    """
    if plan.optimizer.name == LANDSCAPE:
        return
    wanted = _decisive(plan.specification())
    siblings = [name for name in studies if is_search(name) and split_name(name)[0] == plan.spec.name]
    same_optimizer = [name for name in siblings if split_name(name)[1] == plan.optimizer.name]
    for name in dict.fromkeys([*siblings[:1], *same_optimizer[:1]]):  # the other studies were compared with these
        stored = studies[name]
        if not (before := _decisive(stored.get("specification"))):
            continue
        parts = ("objective", "optimizer", "space") if name in same_optimizer else ("objective",)
        found = "; ".join(line for part in parts for line in differences(before[part], wanted[part], part))
        if now is not None and not found:
            here, there = (_decisive(known["objective"]) for known in (now, stored["fingerprint"]))
            compared = {} if accept else {"code": now["code"]}
            theirs = {**stored["fingerprint"], "objective": _of_both(there, here)}
            found = changes(theirs, {**compared, "objective": _of_both(here, there)})
        if found:
            raise StudyStoreError(
                f"{plan.name}: its losses would not compare with those of {name}: {found}. Give the "
                f"experiment another name: lcsc run FILE name=...; where only code changed, {_ACCEPT}"
            )


def _decisive(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _decisive(part) for key, part in value.items() if key not in _NEUTRAL}


def _of_both(value: Any, other: Any) -> Any:
    """``value`` without what ``other`` does not have, such as an extractor that only one of them reports."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {key: _of_both(part, other[key]) for key, part in value.items() if key in other}
