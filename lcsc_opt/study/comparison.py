"""A study, compared with what the database holds: whether it may run.

Nothing is read, loaded or written here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.study_spec import LANDSCAPE, StudySpec
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.report import MEASURED, YARDSTICKS
from lcsc_opt.database.states import Attributes, is_finished
from lcsc_opt.database.store import StoredTrials
from lcsc_opt.objective.model_files import MODEL_FILES
from lcsc_opt.objective.of_study import CHECKPOINTS

# Settings that change no loss beyond rounding.
_NEUTRAL = frozenset(
    (
        "metrics",
        "held_out_metrics",
        "batch_size",
        "gradient_batch_size",
        "device",
        "compile",
    )
)
_COMPARED_APART = _NEUTRAL | {CHECKPOINTS}  # between studies, which compare checkpoints by their hash
_ENVIRONMENT = ("packages", "blas", "machine")  # Python's version and the number of cores change no results
_IDENTITY = {"objective", "space", "start", "optimizer", "seed", "workers"}
"""What of a specification is compared; the budget, failures and the report may change at any time."""
_MOST_CHARACTERS = 60  # of a value in a message
_ACCEPT = "if that cannot change a loss, continue with --accept-changes (in Python: accept_changes=True)"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a stored study continues.

    Attributes:
        changed: the attributes to write, as the code or the versions are other ones now; empty if nothing changed.
        starts_over: whether the objective has other settings than those with which all trials have failed.
        notices: lines that a runner prints.
    """

    changed: Attributes
    starts_over: bool
    notices: tuple[str, ...]


def compare(
    spec: StudySpec,
    stored: Attributes,
    fingerprint: Mapping[str, Any],
    trials: Callable[[str], StoredTrials],
    *,
    accept_changes: bool = False,
    measures: bool = True,
) -> Continuation:
    """Compare a study with the stored one of its name.

    While no trial has succeeded, the settings of the objective may be corrected. Workers and settings that change no
    loss may change at any time.

    Args:
        spec: the study to run.
        stored: the attributes of the stored one.
        fingerprint: ``objective``, ``code`` and ``environment``, as they are now.
        trials: gives the trials of a study of that name; called only where something changed since it began.
        accept_changes: allow other code and other versions; never other checkpoints.
        measures: whether losses will be added. If not, other code and versions are no matter, and are not stored.

    Raises:
        StudyStoreError: the stored study was made with something else.
    """
    before = _stored_identity(stored)
    now = identity(spec)
    _keep_names(now, stored)
    notices = tuple(_neutral_changes(spec.name, before, now, stored))
    starts_over = _starts_over(spec, _decisive(before), _decisive(now), trials)
    if not measures:
        fingerprint = {"objective": fingerprint["objective"]}
    changed = _accepted_changes(spec.name, stored, trials, fingerprint, accept=accept_changes)
    if changed:
        notices += (f"{spec.name}: continues with changes: {changed['changes'][-1]['changed']}",)
    return Continuation(changed, starts_over, notices)


def identity(spec: StudySpec) -> dict[str, Any]:
    """What must stay the same for a study to be continued, as JSON."""
    return spec.model_dump(mode="json", include=_IDENTITY)


def is_complete(spec: StudySpec, stored: Attributes) -> bool:
    """Whether nothing is left to do or to write: the study is finished, and its :func:`identity` is the stored one.

    Workers are left out: a finished study needs none.
    """
    before = _stored_identity(stored)
    return is_finished(spec, stored) and {**before, "workers": None} == {**identity(spec), "workers": None}


def with_workers(spec: StudySpec) -> StudySpec:
    """The specification; if it leaves the number of workers open, it has that of this machine."""
    if spec.workers != "auto":
        return spec
    return spec.model_copy(update={"workers": spec.worker_count})


def _stored_identity(stored: Attributes) -> dict[str, Any]:
    return {key: value for key, value in stored["specification"].items() if key in _IDENTITY}


def _starts_over(
    spec: StudySpec, before: dict[str, Any], now: dict[str, Any], trials: Callable[[str], StoredTrials]
) -> bool:
    """Whether the objective's settings were corrected before any trial succeeded.

    Args:
        spec: of the study.
        before: what decides the losses, as it was stored.
        now: the same of ``spec``.
        trials: as for :func:`compare`.

    Raises:
        StudyStoreError: the settings differ and a trial has succeeded, or anything else that decides losses differs.
    """
    changed = "; ".join(differences(before, now, "specification"))
    if not changed:
        return False
    settings_before = before["objective"]["settings"]
    with_settings_before = {**now, "objective": {**now["objective"], "settings": settings_before}}
    has_same_search = not any(differences(before, with_settings_before))
    if has_same_search and not trials(spec.name).succeeded:
        return True
    what_to_give = "another name"
    if spec.optimizer.name == LANDSCAPE:  # which is named by its seed
        what_to_give = "another --seed"
    raise StudyStoreError(f"{spec.name}: the stored study differs: {changed}. Give the new one {what_to_give}")


def _decisive(specification: Mapping[str, Any]) -> dict[str, Any]:
    """What of a specification decides the candidates and their losses."""
    decisive: dict[str, Any] = _without(_NEUTRAL, specification)
    decisive.pop("workers", None)  # how candidates are asked is stored apart, as ``parallelism``
    return decisive


def _neutral_changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any], stored: Attributes) -> Iterator[str]:
    """A line that names the changes between two identities that do not affect the loss, if there are any."""
    decisive = set(differences(_decisive(before), _decisive(now)))
    changed = [line for line in differences(before, now) if line not in decisive]
    if not changed:
        return
    line = f"{name}: continues with changes that do not affect the loss: {'; '.join(changed)}"
    if before.get("workers") != now["workers"]:
        line += f" (candidates are still asked {stored['parallelism']['in_flight']} at a time)"
    yield line


def _keep_names(specification: dict[str, Any], stored: Attributes) -> None:
    """Put the stored names of files into a specification, of those files whose digests are stored.

    Files may move: what they are, their digests tell.
    """
    described = stored["fingerprint"]["objective"]
    movable = []
    if stored.get("checkpoints"):
        movable.append(CHECKPOINTS)
    if MODEL_FILES in described:
        movable.append("model")
    settings = specification["objective"]["settings"]
    stored_settings = stored["specification"]["objective"]["settings"]
    for name in movable:
        if name in settings:
            settings[name] = stored_settings.get(name)


def changed_since_finished(name: str, stored: Attributes, code: Mapping[str, str]) -> str | None:
    """That a finished study's ``code`` (name → digest) is another one now; ``None`` if it is the same.

    ``stored`` are its attributes. Stored code that ``code`` does not name counts as unchanged.
    """
    stored_code = stored["fingerprint"]["code"]
    changed = "; ".join(_code_changes(stored_code, {**stored_code, **code}))
    if not changed:
        return None
    return f"{name}: finished before this changed: {changed}"


def _accepted_changes(
    name: str,
    stored: Attributes,
    trials: Callable[[str], StoredTrials],
    current: Mapping[str, Any],
    *,
    accept: bool,
) -> dict[str, Any]:
    """The attributes to write into a study that continues; empty if nothing changed.

    What another objective or other code has measured is dropped, and measured again.

    Args:
        name: the name of the study.
        stored: its attributes.
        trials: as for :func:`compare`.
        current: the fingerprint, or only its ``objective``.
        accept: allow changes. Before the first success they are always allowed, but never other checkpoints.

    Raises:
        StudyStoreError: something changed and is not accepted.
    """
    before = stored["fingerprint"]
    changed = _changes(before, current)
    if not changed:
        return {}
    stored_trials = trials(name)
    stored_trajectory = before["objective"].get("trajectory")
    other_checkpoints = current["objective"].get("trajectory") != stored_trajectory
    if other_checkpoints or (stored_trials.succeeded and not accept):
        advice = "other checkpoints need a new study" if other_checkpoints else _ACCEPT
        raise StudyStoreError(
            f"{name}: changed since it began: {changed}. Undo the change, or give the study another name; {advice}"
        )
    change = {"before_trial": stored_trials.many, "changed": changed}
    now = {**before, **current}
    accepted: dict[str, Any] = {"changes": [*stored.get("changes", []), change], "fingerprint": now}
    if _measures_otherwise(before, now):
        outdated = [MEASURED]
        if not stored_trials.succeeded:  # else losses are still relative to what the earlier ones are relative to
            outdated.append(YARDSTICKS)
        accepted |= {attribute: {} for attribute in outdated if attribute in stored}
    return accepted


def _measures_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the objective or its code is another one, between two fingerprints."""
    return bool(_changes(before, {"objective": now["objective"], "code": now["code"]}))


def check_siblings(
    spec: StudySpec, studies: Mapping[str, Attributes], fingerprint: Mapping[str, Any], *, accept: bool
) -> None:
    """Compare a new study with the experiment's other studies, with which its losses will be compared.

    It is compared with the first of them and the first with the same optimizer: the others were compared with these.
    Landscapes of one experiment may be of different planes.

    Args:
        spec: of the new study.
        studies: name → attributes of all stored studies, in the order in which they were created.
        fingerprint: of the new study, as for :func:`compare`.
        accept: allow other code.

    Raises:
        StudyStoreError: the losses would not compare; the message says why.
    """
    same_experiment = []
    same_optimizer = []
    for name in studies:
        experiment, optimizer, _ = split_name(name)
        if experiment == spec.experiment:
            same_experiment.append(name)
            if optimizer == spec.optimizer.name and is_ranked(name):
                same_optimizer.append(name)

    for name in dict.fromkeys([*same_experiment[:1], *same_optimizer[:1]]):
        sibling = studies[name]
        specification = identity(spec)
        _keep_names(specification, sibling)
        specification = _without(_COMPARED_APART, specification)
        stored_specification = _without(_COMPARED_APART, sibling["specification"])
        compared = ("objective", "optimizer", "space", "start") if name in same_optimizer else ("objective",)
        lines: list[str] = []
        for key in compared:
            lines += differences(stored_specification[key], specification[key], key)
        if not lines:
            lines = _fingerprint_differences(sibling["fingerprint"], fingerprint, accept=accept)
        if lines:
            raise StudyStoreError(
                f"{spec.name}: its losses would not be comparable with those of {name}: {'; '.join(lines)}. Give the "
                f"experiment another name: lcsc run FILE name=...; where only code changed, {_ACCEPT}"
            )


def _fingerprint_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool) -> list[str]:
    """Differences in the code, unless they are accepted, and in the objective."""
    lines = []
    if not accept:
        lines.append(_changes(before, {"code": now["code"]}))
    lines.append(_objective_changes(before, now))
    return [line for line in lines if line]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every difference between two fingerprints, in words; what ``now`` lacks is not compared."""
    lines: list[str] = []
    if "environment" in now:
        for key in _ENVIRONMENT:
            stored = before["environment"].get(key)
            current = now["environment"].get(key)
            # a package that only one of them names is no change: the list of recorded packages may grow
            lines += differences(_common(stored, current), _common(current, stored), f"environment.{key}")
    if "code" in now:
        lines += _code_changes(before["code"], now["code"])
    if "objective" in now:
        current = json.loads(json.dumps(now["objective"]))  # tuples become lists, as in the database
        lines += differences(_without(_NEUTRAL, before["objective"]), _without(_NEUTRAL, current), "objective")
    return "; ".join(lines)


def _code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Which files changed, which are new, and which are gone; both map names to digests."""
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    kinds = {"changed": changed, "new": now.keys() - before.keys(), "gone": before.keys() - now.keys()}
    for kind, names in kinds.items():
        if names:
            yield f"{', '.join(sorted(names))} {kind}"


def _objective_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Differences between the objectives in two fingerprints that make losses incomparable, in words.

    What only one of them describes is left out, such as an extractor that only one of them reports.
    """
    current = _without(_COMPARED_APART, now["objective"])
    stored = _without(_COMPARED_APART, before["objective"])
    return _changes(
        {"objective": _common(stored, current)},
        {"objective": _common(current, stored)},
    )


def _without(names: Collection[str], value: Any) -> Any:
    """A JSON value without these keys, at any depth."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without(names, item) for key, item in value.items() if key not in names}


def _common(value: Any, reference: Any) -> Any:
    """``value`` without keys that ``reference`` does not have."""
    if not (isinstance(value, Mapping) and isinstance(reference, Mapping)):
        return value
    return {key: _common(item, reference[key]) for key, item in value.items() if key in reference}


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Every place where two JSON values differ, with its path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            key_path = f"{path}.{key}" if path else key
            yield from differences(before.get(key), now.get(key), key_path)
    elif before != now:
        yield f"{path} was {_shortened(before)}, is now {_shortened(now)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 3]}..."
