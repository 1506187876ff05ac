"""What an experiment is about, and whether that is still the same: compared once, here.

A problem has three parts. What *decides* losses (checkpoints, network, sampler, reference, loss, code): with another
one it is another experiment, or it is refused. What is only *reported* (metrics, held-out data, a second sampler) may
change: what is missing is measured for all models of the report. What the *machine* is (batches, device, workers) may
always change, and is not stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find
from lcsc_opt.base.code import code_of_settings
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import plain
from lcsc_opt.base.study_spec import ObjectiveSpec, StudySpec
from lcsc_opt.database.names import split_name
from lcsc_opt.database.states import Attributes
from lcsc_opt.metrics.reference.images import DATASETS
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.model_files import MODEL_FILES
from lcsc_opt.objective.of_study import CHECKPOINTS

# settings; held_out inside of reference decides: it says which real images the loss does not see
_REPORTED = frozenset(("metrics", "held_out_metrics", "held_out"))
_REFERENCE = "reference"
_SECOND_SAMPLER = "also"  # a setting of reports that stands inside of others
_MACHINE = frozenset(("batch_size", "gradient_batch_size", "device"))
_SEARCH = ("optimizer", "space", "start")  # what of a specification decides the candidates of a search
_ENVIRONMENT = ("packages", "blas", "machine")  # Python's version and the number of cores change no results
_MOST_CHARACTERS = 60  # of a value in a message
ANEW = "lcsc run FILE name=NEW (in Python: name='NEW')"
ACCEPT = "if that cannot change a loss, continue with --accept-changes (in Python: accept_changes=True)"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides, and what is only reported, both as JSON.

    Attributes:
        decides: ``file`` and ``settings`` of the study file, what the ``objective`` says of itself, and the ``code``.
        reported: the ``settings``, what the ``objective`` says and the ``code`` of reports.
    """

    decides: Mapping[str, Any]
    reported: Mapping[str, Any]

    @classmethod
    def of(cls, spec: ObjectiveSpec, objective: Objective, directory: Path | None) -> Problem:
        """The problem of an objective as it is now; its file was looked for in ``directory`` first."""
        described = plain(objective.describe())
        decides, reported = settings_of(spec, described)
        path = find("objectives", spec.file, study_folder=directory)
        deciding_code = code_of_settings(path, decides)
        code = {name: file.sha256 for name, file in objective.code.items()}
        return cls(
            {
                "file": spec.file,
                "settings": decides,
                "objective": described,
                "code": {name: digest for name, digest in code.items() if name in deciding_code},
            },
            {
                "settings": reported,
                "objective": plain(objective.describe_reports()),
                "code": {name: digest for name, digest in code.items() if name not in deciding_code},
            },
        )

    def changes(self, now: Problem) -> Changes:
        """How the problem differs from what it was when it was stored."""
        before_objective = self.decides["objective"]
        now_objective = now.decides["objective"]
        settings = [
            *differences(self.decides["file"], now.decides["file"], "file"),
            *differences(self.decides["settings"], now.decides["settings"], "settings"),
        ]
        loaded = [
            *differences(before_objective, now_objective, "objective"),
            *code_changes(self.decides["code"], now.decides["code"]),
        ]
        reported_before = {key: self.reported[key] for key in ("objective", "code")}
        reported_now = {key: now.reported[key] for key in ("objective", "code")}
        return Changes(
            settings=tuple(settings),
            loaded=tuple(loaded),
            checkpoints=before_objective.get("trajectory") != now_objective.get("trajectory"),
            reported=tuple(differences(self.reported["settings"], now.reported["settings"], "settings")),
            # a metric that is new or gone changes no stored measurement
            measures_otherwise=_common(reported_before, reported_now) != _common(reported_now, reported_before),
        )


@dataclasses.dataclass(frozen=True)
class Changes:
    """How a problem differs from the stored one, in words.

    Attributes:
        settings: what the study file says of what decides.
        loaded: what was loaded by it: the reference, the network, the code.
        checkpoints: whether the checkpoints are others.
        reported: what the study file says of reports.
        measures_otherwise: whether something that was reported already has other code, or another network or reference.
    """

    settings: tuple[str, ...]
    loaded: tuple[str, ...]
    checkpoints: bool
    reported: tuple[str, ...]
    measures_otherwise: bool

    @property
    def decides(self) -> str:
        """All that decides, in a line; empty if nothing changed."""
        return "; ".join((*self.settings, *self.loaded))

    def check(self, name: str, *, succeeded: bool, accept: bool) -> None:
        """Refuse what makes losses incomparable. Before any trial has succeeded, all but the checkpoints may change.

        Args:
            name: of the experiment.
            succeeded: whether a trial of it has a loss.
            accept: whether the user says that what was found changes no loss.

        Raises:
            StudyStoreError: losses would not compare with those that are stored.
        """
        if self.checkpoints:
            raise StudyStoreError(
                f"{name}: began with other checkpoints: {self.decides}. Put them back, or give the new search another "
                f"name: {ANEW}"
            )
        if not succeeded or not self.decides:
            return
        if self.settings:
            raise StudyStoreError(
                f"{name}: differs from the stored experiment, so losses would not be comparable: {self.decides}. Give "
                f"the new one another name: {ANEW}"
            )
        if not accept:
            raise StudyStoreError(
                f"{name}: changed since it began: {self.decides}. Undo the change, or give another name: {ANEW}; "
                f"{ACCEPT}"
            )


def settings_of(spec: ObjectiveSpec, described: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that decide, and those that are only reported.

    Names of files whose digests the objective knows are in neither: files may move.

    Args:
        spec: of the objective.
        described: what the objective says of itself; empty where it was not loaded, and then all names of files decide.
    """
    moving = set()
    if "trajectory" in described:
        moving.add(CHECKPOINTS)
    sampler = described.get("sampler")
    if MODEL_FILES in described or (isinstance(sampler, Mapping) and sampler.get("architecture")):
        moving.add("model")  # the folder of a configuration, which is described itself
    decides: dict[str, Any] = {}
    reported: dict[str, Any] = {}
    settings = dict(spec.settings)
    if _REFERENCE in settings and "scores" in described:  # which hold the digests of the real images
        settings[_REFERENCE] = _without_places(settings[_REFERENCE])
    for key, value in settings.items():
        if key in _REPORTED or key == _SECOND_SAMPLER:
            reported[key] = value
        elif key not in moving | _MACHINE:
            decides[key] = _without({_SECOND_SAMPLER, *_MACHINE}, value)
            if isinstance(value, Mapping) and _SECOND_SAMPLER in value:
                reported[f"{key}.{_SECOND_SAMPLER}"] = value[_SECOND_SAMPLER]
    return plain(decides), plain(reported)


def _without_places(reference: Any) -> Any:
    """A reference without the places of the images that the loss sees, of which the objective knows the content."""
    if isinstance(reference, Mapping):
        return {key: value if key == "held_out" else _without_places(value) for key, value in reference.items()}
    if isinstance(reference, str) and reference not in DATASETS:
        return None
    return reference


def check_search(spec: StudySpec, studies: Mapping[str, Attributes]) -> None:
    """Compare a search with the stored one of its name, and with the others of its optimizer, of which it is a seed.

    Args:
        spec: of the search.
        studies: name → attributes of the experiment's stored studies.

    Raises:
        StudyStoreError: its candidates would be others.
    """
    now = _of_search(spec.model_dump(mode="json"))
    for name, stored in studies.items():
        _, optimizer, _ = split_name(name)
        is_same = name == spec.name
        is_other_seed = spec.name not in studies and optimizer == spec.optimizer.name
        if not (is_same or is_other_seed):
            continue
        changed = "; ".join(differences(_of_search(stored["specification"]), now))
        if changed:
            raise StudyStoreError(f"{spec.name}: differs from the stored {name}: {changed}. Give it another name")


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
    lines: list[str] = []
    for key in _ENVIRONMENT:
        # a package that only one of them names is no change: the list of recorded packages may grow
        old = _common(before.get(key), now.get(key))
        new = _common(now.get(key), before.get(key))
        lines += differences(old, new, f"environment.{key}")
    if lines and not accept:
        raise StudyStoreError(f"{name}: changed since it began: {'; '.join(lines)}. {ACCEPT}")
    return "; ".join(lines)


def _of_search(specification: Mapping[str, Any]) -> dict[str, Any]:
    """What of a specification decides candidates; budget, workers and the like do not."""
    return {key: specification[key] for key in _SEARCH}


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Which files changed, which are new, and which are gone; both map names to digests."""
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    kinds = {"changed": changed, "new": now.keys() - before.keys(), "gone": before.keys() - now.keys()}
    for kind, names in kinds.items():
        if names:
            yield f"{', '.join(sorted(names))} {kind}"


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
    """A JSON value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 3]}..."
