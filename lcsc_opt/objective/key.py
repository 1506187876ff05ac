"""What evaluations are of: everything that was read, by its content, in one table; and the one comparison of two keys.

A key is flat, name → JSON value, so that two of them are compared name by name. Files stand in it with their digests:
a file that was moved, copied or renamed is the same input, and other content under the same name is another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcsc_opt.base.code import code_reached
from lcsc_opt.base.digests import Digests, stamp_of
from lcsc_opt.base.files import shown_size
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import as_json
from lcsc_opt.base.study_spec import ObjectiveSpec

if TYPE_CHECKING:  # torch is imported by objectives that need it
    from lcsc_opt.objective.contract import Objective
    from lcsc_opt.trajectory import Trajectory

CHECKPOINTS = "the checkpoints"
AVERAGE = "the trainer's average"
_CODE = "code "  # before the name of a module or file of the user's
_MOST_CHARACTERS = 60  # of a value in a message


@dataclasses.dataclass(frozen=True)
class Input:
    """Something that was read.

    Attributes:
        digest: of its content, in hex.
        text: for people, as ``150 images of test``.
        place: its whole path; empty where it has none, or where its content is compared in another way.
        stamp: what changes there when it is written again.
    """

    digest: str
    text: str
    place: str = ""
    stamp: str = ""


@dataclasses.dataclass(frozen=True)
class Key:
    """What the evaluations of an objective are of.

    Attributes:
        decides: what decides the losses of searches: settings, checkpoints, real images, code.
        reported: what further decides the values of the choice and of reports, such as held-out images.
        asked: settings that say what reports measure, such as the names of metrics.
        inputs: name in ``decides`` or ``reported`` → what was read.
    """

    decides: Mapping[str, Any]
    reported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Input] = dataclasses.field(default_factory=dict)

    def changes_to(self, now: Key, part: str = "decides") -> list[str]:
        """How a part of this key differs from that of another one, in words; empty if it does not."""
        return differences(getattr(self, part), getattr(now, part), self.inputs, now.inputs)

    @classmethod
    def of(cls, spec: ObjectiveSpec, objective: Objective, context: BuildContext, file: Path) -> Key:
        """The key of an objective that was loaded.

        Args:
            spec: of the study file.
            objective: what was loaded by it.
            context: with which it was loaded; digests are kept in its folder.
            file: that built it.
        """
        parts: dict[str, dict[str, Any]] = {"decides": {}, "reported": {}, "asked": {}}
        inputs: dict[str, Input] = {}
        digests = Digests(context.files)
        if objective.trajectory is not None:
            inputs[CHECKPOINTS] = _checkpoints(objective.trajectory)
            parts["decides"][CHECKPOINTS] = inputs[CHECKPOINTS].digest
            inputs |= _average_beside(objective.trajectory)
        deciding_settings = {}
        for path, value in _leaves(spec.settings):
            role = objective.role_of(path)
            if role in parts:
                name = ".".join(path) if role == "asked" else objective.name_of(path)
                read = _read(value, objective, context, digests)
                if read is not None:
                    inputs[name] = read
                    value = read.digest
                if read is not None or not _is_folder(value, objective):  # objectives describe what they read in it
                    parts[role][name] = value
            if role == "decides":
                deciding_settings[".".join(path)] = value
        parts["decides"] |= {
            "file": Path(spec.file).name,  # on another machine it lies in another folder
            "steps": [int(step) for step in objective.steps],
            "maximizes": objective.maximizes,
        }
        digests_read = [read.digest for read in inputs.values()]
        for name, value in flat(objective.describe(), "objective").items():
            if value not in digests_read:  # which need not be said twice
                parts["decides"][name] = value
        parts["reported"] |= flat(objective.describe_reports(), "reports")
        deciding_code = code_reached(objective.code, file.name, deciding_settings)
        for name, code_file in objective.code.items():
            part = "decides" if name in deciding_code else "reported"
            parts[part][f"{_CODE}{name}"] = code_file.sha256
        return cls(**parts, inputs=inputs)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Key:
        """A key that is stored; ``dataclasses.asdict`` gives what is stored of one."""
        inputs = {name: Input(**fields) for name, fields in stored["inputs"].items()}
        return cls(**{**stored, "inputs": inputs})

    @property
    def given(self) -> dict[str, Any]:
        """What of the key a user gave: settings, what was read, and code; not what an objective says of itself."""
        every = {**self.decides, **self.reported}
        return {name: every[name] for name in every if name in self.inputs or name.startswith(("settings.", _CODE))}

    def measures_as(self, other: Key) -> bool:
        """Whether real images, other files that were read and code are the same; the checkpoints may be others."""

        def measured_with(key: Key) -> dict[str, Any]:
            read = key.inputs.keys() - {CHECKPOINTS, AVERAGE}
            return {name: value for name, value in key.given.items() if name in read or name.startswith(_CODE)}

        return measured_with(self) == measured_with(other)

    @property
    def of_trials(self) -> dict[str, Any]:
        """What a trial of the choice or of a report is of."""
        return {"search": digest_of(self.decides), **self.reported}


def digest_of(value: Any) -> str:
    """A digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two keys have the same values under all names that both have: a further metric changes no other one."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    inputs_before: Mapping[str, Input] | None = None,
    inputs_now: Mapping[str, Input] | None = None,
) -> list[str]:
    """How two keys differ, in words; empty if they do not. This is the only place where keys are compared for people.

    Args:
        before: name → value.
        now: the same, of now.
        inputs_before: what was read under the names, as far as that is known.
        inputs_now: the same, of now.
    """
    before_inputs, now_inputs = inputs_before or {}, inputs_now or {}
    differ = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    # a setting that became a mapping, or the other way round, is one difference; modules have dots in their names, too
    settings = {name for name in differ if not name.startswith(_CODE)}
    inside = {name for name in settings if any(name.startswith(f"{other}.") for other in settings)}
    names = [*(differ - inside)]
    # what was read first: what an objective says of itself often follows from it
    names.sort(key=lambda name: (name not in now_inputs and name not in before_inputs, name))
    lines = []
    for name in names:
        if name.startswith(_CODE):
            continue
        if name in before_inputs or name in now_inputs:
            was = _in_words(name, before, before_inputs)
            is_now = _in_words(name, now, now_inputs)
            lines.append(f"{name}: {was}, now {is_now if is_now != was else 'with other content'}")
        else:
            was, is_now = (_shortened(_nested(name, key)) for key in (before, now))
            lines.append(f"{name} was {was}, is now {is_now}")
    return [*lines, *_code_differences([name for name in names if name.startswith(_CODE)], before, now)]


def _nested(name: str, key: Mapping[str, Any]) -> Any:
    """The value under a name of a flat key, or the mapping of those inside of it; ``None`` if there is neither."""
    of_parts = {part.removeprefix(f"{name}."): value for part, value in key.items() if part.startswith(f"{name}.")}
    return key.get(name, of_parts or None)


def _in_words(name: str, key: Mapping[str, Any], inputs: Mapping[str, Input]) -> str:
    """What was read under a name; by its digest where nothing else is known of it."""
    if name in inputs:
        return inputs[name].text
    return f"others ({str(key[name])[:8]})" if name in key else "none"


def _code_differences(names: Collection[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Which files changed, which are new, and which are gone."""
    kinds = {
        "changed": [name for name in names if name in before and name in now],
        "new": [name for name in names if name not in before],
        "gone": [name for name in names if name not in now],
    }
    for kind, named in kinds.items():
        if named:
            yield f"{', '.join(name.removeprefix(_CODE) for name in named)} {kind}"


def code_in(key: Mapping[str, Any]) -> dict[str, str]:
    """Name → digest of the code in a key."""
    return {name.removeprefix(_CODE): value for name, value in key.items() if name.startswith(_CODE)}


def is_written_again(name: str, read: Input) -> bool:
    """Whether something may have other content by now. What is gone was not written again."""
    if not read.place:
        return False
    place = Path(read.place)
    try:
        if name == AVERAGE:
            from lcsc_opt.checkpoints.averages import stamp_of_averages  # with torch

            return place.exists() and stamp_of_averages(place) != read.stamp
        return stamp_of(place) != read.stamp
    except OSError:
        return False


def _leaves(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The values inside of nested mappings, each with its keys."""
    leaves: list[tuple[tuple[str, ...], Any]] = []
    for key, item in value.items():
        at = (*path, str(key))
        if isinstance(item, Mapping) and item:
            leaves += _leaves(item, at)
        else:
            leaves.append((at, item))
    return leaves


def flat(described: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as a key: the names of a value, with dots between them → the value as JSON."""
    named = {".".join(filter(None, (prefix, *path))): value for path, value in _leaves(described)}
    as_stored: dict[str, Any] = as_json(named)
    return as_stored


def _read(value: Any, objective: Objective, context: BuildContext, digests: Digests) -> Input | None:
    """What was read at the place that a setting names; ``None`` if that is no file, and nothing that it has read."""
    if not isinstance(value, str) or value not in objective.places:
        return None
    place = Path(objective.places[value])
    if not place.exists():
        return None
    stamp = stamp_of(place)
    known = objective.content_of(place, context.files)
    if known is not None:
        digest, text = known
        return Input(digest, f"{text} of {value}", str(place), stamp)
    if place.is_dir():
        return None
    return Input(digests.of(place), f"{value} ({shown_size(place.stat().st_size)})", str(place), stamp)


def _is_folder(value: Any, objective: Objective) -> bool:
    """Whether a setting names a folder that was read."""
    return isinstance(value, str) and value in objective.places and Path(objective.places[value]).is_dir()


def _checkpoints(trajectory: Trajectory) -> Input:
    """The checkpoints that are combined; those of an author's own trajectory are known by their steps alone."""
    steps = trajectory.steps
    digest = str(getattr(trajectory, "sha256", None) or digest_of(list(steps)))
    return Input(digest, f"{len(steps)} of steps {steps[0]} to {steps[-1]} (SHA-256 {digest[:8]})")


def _average_beside(trajectory: Trajectory) -> dict[str, Input]:
    """The files that may hold the trainer's average, which are looked at in each run; its digest is that of a model."""
    sources = getattr(trajectory, "sources", ("",))
    if not sources[-1]:  # a training loop wrote them
        return {}
    from lcsc_opt.checkpoints.averages import stamp_of_averages  # with torch

    place = Path(sources[-1])
    return {AVERAGE: Input("", f"beside {place.name}", str(place), stamp_of_averages(place))}


def _shortened(value: Any) -> str:
    """A JSON value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 3]}..."
