"""What was changed since a study began: the user's code, the versions, the checkpoints, the objective's settings.

A change in any of them could change numbers silently. Studies of one experiment must not differ either, since their
losses are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.database.names import SUCCEEDED, is_search, split_name
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.plan import CHECKPOINTS, StudyPlan

_NEUTRAL = {  # settings that change no loss beyond rounding; checkpoints are known by their hash
    *(CHECKPOINTS, "metrics", "held_out_metrics"),
    *("batch_size", "gradient_batch_size", "device", "compile", "channels_last"),
}
_ACCEPT = "if that cannot change a loss, continue with --accept-changes"


def continued(plan: StudyPlan, stored: Mapping[str, Any] | None) -> StudyPlan:
    """The plan for the study with these attributes; as it is for a new study.

    If the study file leaves the workers open, the study keeps its number.

    Raises:
        StudyStoreError: the study was made from another specification.
    """
    if stored is None:
        return plan
    known = stored.get("specification") or {}
    if plan.spec.workers == "auto" and known.get("workers"):
        plan = plan.changed(workers=known["workers"])
    wanted = plan.specification()
    settings = wanted["objective"]["settings"]
    if stored.get("checkpoints") and CHECKPOINTS in settings:  # their hash decides whether they are the same
        settings[CHECKPOINTS] = known["objective"]["settings"].get(CHECKPOINTS)
    if found := "; ".join(differences(known, wanted, "specification")):
        raise StudyStoreError(f"{plan.name}: the stored study differs: {found}. Give the new one another name")
    return plan


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
    found: list[str] = []
    if "environment" in now:
        for key in ("packages", "blas", "machine"):  # not Python's version or the number of cores: they decide nothing
            was, here = (known["environment"].get(key) for known in (before, now))
            # an older version recorded fewer packages
            found += differences(_of_both(was, here), _of_both(here, was), f"environment.{key}")
    if "code" in now:
        old, new = before["code"], now["code"]
        changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
        kinds = {"changed": changed, "new": sorted(new.keys() - old.keys()), "gone": sorted(old.keys() - new.keys())}
        found += [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
    if "objective" in now:
        found += differences(before["objective"], json.loads(json.dumps(now["objective"])), "objective")
    return "; ".join(found)


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


def compared(
    plan: StudyPlan, storage: RDBStorage, studies: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool
) -> dict[str, Any]:
    """Compare a stored study with what it began with, and a new one with the experiment's other studies.

    Args:
        plan: of the study.
        storage: of the studies.
        studies: name → attributes of all stored studies.
        now: its fingerprint, or the part of it that is known.
        accept: allow other code and, for a stored study, other versions and settings; never other checkpoints.

    Returns:
        The attributes to write into a study that continues; empty if nothing changed.

    Raises:
        StudyStoreError: something changed and is not accepted, or the losses would not compare; the message says what.
    """
    if plan.name in studies:
        return accepted_changes(StoredStudy.open(storage, plan.name), now, accept=accept)
    if plan.optimizer.name == LANDSCAPE:
        return {}
    wanted = _decisive(plan.specification())
    others = {name: split_name(name) for name in studies if is_search(name)}
    siblings = {name: of[1] for name, of in others.items() if of[0] == plan.spec.name}
    same_optimizer = [name for name, optimizer in siblings.items() if optimizer == plan.optimizer.name]
    for name in dict.fromkeys([*list(siblings)[:1], *same_optimizer[:1]]):  # the other studies were compared with these
        stored = studies[name]
        before = _decisive(stored["specification"])
        parts = ("objective", "optimizer", "space") if name in same_optimizer else ("objective",)
        found = "; ".join(line for part in parts for line in differences(before[part], wanted[part], part))
        if "objective" in now and not found:
            here, there = (_decisive(known["objective"]) for known in (now, stored["fingerprint"]))
            code = {} if accept else {"code": now["code"]}
            theirs = {**stored["fingerprint"], "objective": _of_both(there, here)}
            found = changes(theirs, {**code, "objective": _of_both(here, there)})
        if found:
            raise StudyStoreError(
                f"{plan.name}: its losses would not compare with those of {name}: {found}. Give the "
                f"experiment another name: lcsc run FILE name=...; where only code changed, {_ACCEPT}"
            )
    return {}


def _decisive(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _decisive(part) for key, part in value.items() if key not in _NEUTRAL}


def _of_both(value: Any, other: Any) -> Any:
    """``value`` without what ``other`` does not have, such as an extractor that only one of them reports."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {key: _of_both(part, other[key]) for key, part in value.items() if key in other}


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Every place where two JSON values differ, with its path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        was, here = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(json.dumps, (before, now)))
        yield f"{path} was {was}, is now {here}"
