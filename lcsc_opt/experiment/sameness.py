"""Whether an experiment, a search and the machine are still those that are stored, by their keys, and what follows.

:func:`lcsc_opt.objective.key.differences` compares and says how two keys differ. What *decides* losses may not change:
with another key it is another experiment. What is only *reported* may: what is missing under today's key is measured.
How the machine computes (batches, device, workers) may always change, and is in no key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import StudyStoreError, TrajectoryError
from lcsc_opt.base.records import as_json
from lcsc_opt.base.study_spec import ObjectiveSpec, StudySpec
from lcsc_opt.database.experiment import AVERAGES
from lcsc_opt.database.names import KEYS, split_name
from lcsc_opt.database.states import Attributes
from lcsc_opt.objective.contract import OF_MACHINE, Objective
from lcsc_opt.objective.key import (
    CHECKPOINTS,
    Key,
    agree,
    code_in,
    differences,
    digest_of,
    flat,
    is_written_again,
)
from lcsc_opt.objective.of_study import code_now, moved
from lcsc_opt.trajectory import Trajectory

_FOR_ALL = ("steps", "maximizes")  # what is stored once for all trials cannot become that of others
_SEARCH = ("optimizer", "space", "start")  # what of a specification decides the candidates of a search
_ENVIRONMENT = ("packages", "blas", "machine")  # Python's version and the number of cores change no results
ANEW = "lcsc run FILE name=NEW (in Python: name='NEW')"
ACCEPT = "if that cannot change a loss, continue with --accept-changes (in Python: accept_changes=True)"


def is_untouched(attributes: Attributes, spec: ObjectiveSpec, directory: Path | None) -> bool:
    """Whether nothing that a stored experiment has read was written since: then nothing is loaded to compare it.

    What is gone was not written again.

    Args:
        attributes: of the stored experiment.
        spec: the objective of the study file.
        directory: of the study file.
    """
    before = attributes["objective"]
    if before["file"] != spec.file or _of_problem(before["settings"]) != _of_problem(spec.settings):
        return False
    key = Key.from_json(attributes["key"])
    now = code_now(spec, directory)
    code = {**code_in(key.decides), **code_in(key.reported)}
    if any(now.get(name, digest) != digest for name, digest in code.items()):
        return False
    return not moved(directory, attributes) and not any(is_written_again(*read) for read in key.inputs.items())


def _of_problem(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those of the machine."""
    return {name: value for name, value in flat(settings).items() if name not in OF_MACHINE}


def accepted_changes(name: str, before: Key, now: Key, *, has_results: bool, accept: bool) -> str:
    """What decides losses and is not as it was, where that may be, in words.

    Before there is any result, all but the checkpoints may change.

    Args:
        name: of the experiment.
        before: its stored key.
        now: that of now.
        has_results: whether a trial of it has a loss, or another process runs one of its searches.
        accept: whether the user says that what was found changes no loss.

    Raises:
        StudyStoreError: losses would not compare with those that are stored.
    """
    changed = "; ".join(before.changes_to(now))
    other = {key for key in {*before.decides, *now.decides} if before.decides.get(key) != now.decides.get(key)}
    if CHECKPOINTS in other:
        raise StudyStoreError(
            f"{name}: began with other checkpoints: {changed}. Put them back, or give the new search another name: "
            f"{ANEW}"
        )
    is_for_all = not other.isdisjoint(_FOR_ALL)
    if not (has_results or is_for_all) or not changed:
        return changed
    loaded = {key for key in other if key in now.inputs or key.startswith(("objective.", "code "))}
    if is_for_all or other != loaded:  # what the study file says
        raise StudyStoreError(
            f"{name}: differs from the stored experiment, so losses would not be comparable: {changed}. Give the new "
            f"one another name: {ANEW}"
        )
    if not accept:
        raise StudyStoreError(
            f"{name}: changed since it began: {changed}. Undo the change, or give another name: {ANEW}; {ACCEPT}"
        )
    return changed


def attributes_now(spec: StudySpec, objective: Objective, directory: Path | None, before: Attributes) -> dict[str, Any]:
    """What is stored of an experiment that begins or continues now.

    Args:
        spec: of one of its searches.
        objective: what they search, loaded now.
        directory: of the study file.
        before: what is stored of it; empty if it is new.
    """
    packed = objective.trajectory if isinstance(objective.trajectory, Trajectory) else None
    today = objective.key.of_trials
    # digest → what trials of it are of: today's first, then others under which nothing was measured otherwise
    keys = {digest: of_trials for digest, of_trials in before.get(KEYS, {}).items() if agree(of_trials, today)}
    attributes: dict[str, Any] = {
        "key": dataclasses.asdict(objective.key),
        KEYS: {digest_of(today): today, **keys},
        "objective": spec.objective.model_dump(mode="json"),
        "directory": None,
        "places": dict(objective.places),
        "report_images": objective.samples.per_report,
        "samples": bool(objective.samples.per_evaluation),
        "holds_out": objective.why_nothing_held_out() is None,
        AVERAGES: _averages_now(objective, before.get(AVERAGES) or {}),
        "checkpoints": None,
        "steps": [int(step) for step in objective.steps],
        "checkpoint_names": objective.checkpoint_names,
        "renaming": None,
        "sampling": None,
        "maximize": objective.maximizes,
        "machine": {"layout": objective.layout},
    }
    if directory is not None:
        attributes["directory"] = str(directory)
    if packed is not None:
        attributes["checkpoints"] = packed.sha256
    if packed is not None and any(packed.renaming):
        attributes["renaming"] = [*packed.renaming]
    if objective.sampler is not None:
        attributes["sampling"] = as_json(objective.sampler.describe())
    if spec.held_out is not None:
        attributes["held_out"] = spec.held_out.model_dump(mode="json")
    return attributes


def _averages_now(objective: Objective, known: Mapping[str, str]) -> Mapping[str, str]:
    """Name → SHA-256 of each average that the trainer keeps; those that are gone later are known, with their trials.

    Args:
        objective: has the checkpoints.
        known: those of earlier runs.

    Raises:
        TrajectoryError: the average that the user named is not there, or of another model, and none was known before.
    """
    try:
        if objective.trajectory is not None:
            return objective.trajectory.averages_sha256 or known
    except TrajectoryError:
        if not known:
            raise
    return known


def check_search(spec: StudySpec, studies: Mapping[str, Attributes]) -> None:
    """Compare a search with the stored one of its name, and with the others of its optimizer, of which it is a seed.

    Args:
        spec: of the search.
        studies: name → attributes of the experiment's stored studies.

    Raises:
        StudyStoreError: its candidates would be others.
    """
    for name, stored in studies.items():
        _, optimizer, _ = split_name(name)
        is_same = name == spec.name
        is_other_seed = spec.name not in studies and optimizer == spec.optimizer.name
        if not (is_same or is_other_seed):
            continue
        now = _of_search(spec.model_dump(mode="json"))
        changed = "; ".join(differences(_of_search(stored["specification"]), now))
        if changed:
            raise StudyStoreError(f"{spec.name}: differs from the stored {name}: {changed}. Give it another name")


def _of_search(specification: Mapping[str, Any]) -> dict[str, Any]:
    """What of a specification decides candidates, as a key; budget, workers and the like do not."""
    return flat({part: specification[part] for part in _SEARCH})


def check_environment(name: str, before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool) -> str:
    """Compare the versions and the machine that a search was begun with, and those of now.

    Args:
        name: of the search.
        before: those that it was begun with.
        now: those of now.
        accept: whether others are accepted.

    Returns:
        What changed and was accepted, in words; empty if nothing did.

    Raises:
        StudyStoreError: something changed, and is not accepted.
    """
    old, new = (flat({part: found.get(part) for part in _ENVIRONMENT}, "environment") for found in (before, now))
    # a package that only one of them names is no change: the list of recorded packages may grow
    names = old.keys() & new.keys()
    lines = differences({name: old[name] for name in names}, {name: new[name] for name in names})
    if lines and not accept:
        raise StudyStoreError(f"{name}: changed since it began: {'; '.join(lines)}. {ACCEPT}")
    return "; ".join(lines)
