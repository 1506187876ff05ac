"""A study file: YAML in, one frozen and validated specification out.

All errors are reported at once, each with its path in the file and what was expected; an unknown key also with the
nearest known one. Nothing deeper in the library reads the YAML again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.overrides import with_overrides
from lcsc_opt.base.settings import FrozenModel, parse_settings, parse_yaml, plain
from lcsc_opt.base.study_spec import (
    AUTO,
    Budget,
    BudgetSpec,
    Experiment,
    FailureSpec,
    HeldOutSpec,
    ObjectiveSpec,
    Optimizers,
    RayWorkers,
    Seeds,
    SpaceSpec,
    StudySpec,
    Workers,
)

FILL_IN = "FILL IN"  # a value that the user must replace
DEFAULT_STORAGE = "sqlite:///studies.db"


class StudyFile(FrozenModel):
    """One study file. It stands for Optuna studies called ``name/optimizer/seed`` (:meth:`studies`).

    Without ``optimizers`` or ``space``, :mod:`lcsc_opt.experiment.defaults` chooses them. Without ``budget``, each
    optimizer has its own (:meth:`BudgetSpec.default`). ``start`` is the name of a stored study, at whose answer every
    search begins in place of the space's origin; grids, which list their candidates, do not use it.
    """

    name: Experiment
    objective: ObjectiveSpec
    space: SpaceSpec = SpaceSpec(rows=AUTO)
    start: str | None = None
    optimizers: Optimizers = ()
    seeds: Seeds = (0,)
    budget: BudgetSpec | None = None
    workers: Workers = 1
    failures: FailureSpec = FailureSpec()
    storage: str = DEFAULT_STORAGE
    held_out: HeldOutSpec | None = None

    def on_ray(self, address: str) -> StudyFile:
        """The same study with as many workers as the file names, on the Ray cluster at this address.

        Raises:
            StudySpecError: ``workers`` is ``auto`` or a list, which counts the devices of this machine.
        """
        workers = self.workers
        if isinstance(workers, int):
            workers = RayWorkers(ray=workers)
        if not isinstance(workers, RayWorkers):
            raise StudySpecError("--ray: workers counts the devices of this machine; give a number, as in workers=8")
        return self.model_copy(update={"workers": workers.model_copy(update={"address": address})})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _strength_of_adapters(cls, content: Any) -> Any:
        """``space: {strength: true}`` is said to the objective, whose checkpoints then contain the base model."""
        if not isinstance(content, Mapping):
            return content
        space, objective = content.get("space"), content.get("objective")
        if not isinstance(space, Mapping) or not isinstance(objective, Mapping) or "strength" not in space:
            return content
        rest = {key: value for key, value in space.items() if key != "strength"}
        settings = {**(objective.get("settings") or {}), "strength": space["strength"]}
        changed = {**content, "space": rest, "objective": {**objective, "settings": settings}}
        if not rest:  # nothing else is said of the space, so it is the usual one
            del changed["space"]
        return changed

    @pydantic.field_validator("space", mode="before")
    @classmethod
    def _read_space(cls, value: Any) -> Any:
        """``convex`` is short for ``{kind: convex}``."""
        if isinstance(value, str):
            return {"kind": value}
        return value

    @pydantic.model_validator(mode="after")
    def _no_study_twice(self) -> StudyFile:
        _check_distinct("optimizers", [optimizer.name for optimizer in self.optimizers])
        _check_distinct("seeds", [str(seed) for seed in self.seeds])
        return self

    def with_choices(self, *, optimizers: Any = None, seeds: Any = None, budget: Budget | None = None) -> StudyFile:
        """The same study file for only these optimizers and seeds, and with another budget; ``None`` changes nothing.

        Args:
            optimizers: as a study file has them. One without options has those of the file, if it is listed there.
            seeds: as a study file has them; the file need not list them.
            budget: another total, in the unit of the file's budget; or a time.

        Raises:
            StudySpecError: one of them is wrong.
        """
        choices = {"optimizers": optimizers, "seeds": seeds}
        given = {key: plain(value) for key, value in choices.items() if value is not None}
        if not given and budget is None:
            return self
        if budget is not None:
            # any optimizer's default: only its unit counts
            given["budget"] = (self.budget or BudgetSpec.default("")).with_total(budget)
        # the choices in a file without the rest of this one: an empty tuple of optimizers would be refused
        chosen = parse_settings(StudyFile, {"name": self.name, "objective": self.objective, **given}, source=self.name)
        changes = {key: getattr(chosen, key) for key in given}
        if optimizers is not None:
            listed = {optimizer.name: optimizer for optimizer in self.optimizers}
            changes["optimizers"] = tuple(
                optimizer if optimizer.options else listed.get(optimizer.name, optimizer)
                for optimizer in chosen.optimizers
            )
        return self.model_copy(update=changes)

    def studies(self) -> list[StudySpec]:
        """A study for each seed and optimizer.

        A grid has one, of the first seed, and no ``start``: its candidates depend on neither.

        Raises:
            StudySpecError: the workers, or Ray, choose the devices, and the objective's settings name one.
        """
        shared_keys = StudySpec.model_fields.keys() & StudyFile.model_fields.keys() - {"budget"}
        shared = {key: getattr(self, key) for key in shared_keys}
        studies = []
        for seed, optimizer in itertools.product(self.seeds, self.optimizers):
            budget = self.budget or BudgetSpec.default(optimizer.name)
            spec = StudySpec(experiment=self.name, optimizer=optimizer, seed=seed, budget=budget, **shared)
            if not spec.is_grid:
                studies.append(spec)
            elif seed == self.seeds[0]:
                studies.append(spec.model_copy(update={"start": None}))
        for spec in studies[:1]:  # there may be none; all have the same workers and devices
            _check_devices(spec)
        return studies


def _check_devices(spec: StudySpec) -> None:
    """Refuse a device in the objective's settings where the workers, or Ray, choose the devices."""
    if spec.ray is not None:
        if spec.device.partition(":")[2] not in ("", "0"):  # a worker sees its own as number 0
            raise StudySpecError(
                f"objective.settings.device {spec.device}: Ray gives each worker its own; leave it out"
            )
    elif spec.devices and spec.names_device:
        names = ", ".join(spec.devices)
        raise StudySpecError(f"workers: {names} and objective.settings.device {spec.device}: give only one of them")


def _check_distinct(key: str, names: Sequence[str]) -> None:
    """Refuse a name that is given twice; ``key`` is where in the file the names are."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{key}: {', '.join(repeated)} is given twice; each study needs its own name")


def read_study_file(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """Parse and validate one study file.

    Args:
        path: the path of the file.
        overrides: as :func:`lcsc_opt.base.overrides.with_overrides` takes them.

    Raises:
        StudySpecError: the lines that are still to be filled in; or one line: that the file or an override cannot be
            read, or every wrong key with its path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudySpecError(f"{path}: cannot be read as a study file ({error})") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise StudySpecError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        raise StudySpecError(f"{path}: is empty; a study file has at least name and objective")
    content = with_overrides(content, overrides)
    missing = lines_to_fill_in(text, content)
    if missing:
        raise StudySpecError("\n".join([f"{path}: to be filled in:", *missing]))
    return parse_study_file(content, source=" ".join([str(path), *overrides]))


def parse_study_file(content: Any, *, source: str) -> StudyFile:
    """Validate the content of a study file; ``source`` begins the message of an error.

    Raises:
        StudySpecError: one line that names every wrong key with its path.
    """
    return parse_settings(StudyFile, plain(content), source=source)


def storage_of_folder(folder: Path, name: str | None = None) -> str | None:
    """The database of the study files in a folder; ``None`` if there are none, or they have several.

    Args:
        folder: only files directly in it count.
        name: a study (``digits/LCSC/0``) or an experiment (``digits``), whose file decides alone if there is one.
    """
    storages: dict[str, str] = {}  # experiment → database
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            content = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # no file of ours
        if isinstance(content, Mapping) and {"name", "objective"} <= content.keys():
            storages[str(content["name"])] = str(content.get("storage", DEFAULT_STORAGE))
    if name is not None:
        experiment = name.split("/")[0]
        if experiment in storages:
            return storages[experiment]
    different = set(storages.values())
    if len(different) == 1:
        return different.pop()
    return None


def lines_to_fill_in(text: str, content: Any) -> list[str]:
    """The lines of a study file whose values the user has yet to give; their comments say what belongs there.

    Args:
        text: of the file.
        content: what it means, with the overrides of a command line, which may have given some of the values.
    """
    # a value inside of braces has no line that begins with its key
    written = {line.partition(":")[0].strip(): line for line in text.splitlines() if FILL_IN in line}
    return [written.get(key, f"{key}: {FILL_IN}") for key in _keys_to_fill_in(content)]


def _keys_to_fill_in(content: Any) -> Iterator[str]:
    """The last parts of the keys, at any depth of mappings, whose value the user has yet to give."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if value == FILL_IN:
            yield str(key)
        yield from _keys_to_fill_in(value)
