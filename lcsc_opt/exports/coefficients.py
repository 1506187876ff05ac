"""Coefficients that a user names: ``uniform``, ``last:N``, ``step:N``, ``ema:RATE``, ``power:WIDTH``, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import SpaceSpec
from lcsc_opt.coefficients.profiles import (
    check_coefficients,
    decay_coefficients,
    ema_coefficients,
    power_ema_coefficients,
)
from lcsc_opt.trajectory import Trajectory

CoefficientsOf = Callable[[Trajectory], tuple[Trajectory, Coefficients]]
"""Checkpoints → their coefficients, with the trajectory in layer groups where each has a row of its own."""

_PROFILES = {"ema": ema_coefficients, "power": power_ema_coefficients}
_WINDOWS = ("uniform", "last", "step")
_EXPECTED = "uniform, last:N, step:N, ema:RATE (as ema:0.9999) or power:WIDTH (as power:0.1)"


def _coefficients_of_kind(kind: str, steps: Sequence[int]) -> Coefficients:
    """The coefficients ``[K]`` of ``uniform``, ``last:N``, ``step:N``, ``ema:RATE`` or ``power:WIDTH``.

    Raises:
        StudySpecError: its number is none or out of range, or there is no such step, or not so many.
    """
    name, _, text = kind.partition(":")
    if name in _PROFILES:
        value = _number_in(kind)
        try:
            return _PROFILES[name](steps, value)
        except StudySpecError as error:
            raise StudySpecError(f"{kind}: {error}") from error
    if kind == "uniform":
        return decay_coefficients(len(steps), len(steps))
    if name == "uniform" or not text.isdecimal() or (name == "last" and int(text) == 0):
        raise StudySpecError(f"{kind}: expected {_EXPECTED}")
    if name == "last" and int(text) > len(steps):
        raise StudySpecError(f"{kind}: there are {len(steps)} checkpoints")
    if name == "last":
        return decay_coefficients(len(steps), int(text))
    if int(text) not in steps:
        listed = ", ".join(str(step) for step in steps[:8])
        if len(steps) > 8:
            listed += f" … {steps[-1]}"
        raise StudySpecError(f"{kind}: there is no checkpoint of this step; there are {listed}")
    one_hot = np.zeros(len(steps))
    one_hot[list(steps).index(int(text))] = 1.0
    return one_hot


def _check_kind(kind: str) -> None:
    """Refuse what :func:`_coefficients_of_kind` would refuse, before checkpoints are read.

    Raises:
        StudySpecError: its number is none or out of range.
    """
    name, _, text = kind.partition(":")
    if name == "step" and text.isdecimal():
        return  # only the checkpoints tell whether there is such a step
    if name == "last" and text.isdecimal() and int(text) > 0:
        return  # nor whether there are so many
    _coefficients_of_kind(kind, (1, 2))  # of any two steps


def coefficients_named(source: str) -> CoefficientsOf | None:
    """``uniform``, ``last:N`` …, or a JSON file of coefficients, as a function of the checkpoints.

    A file holds ``[K]`` numbers, or has them under the key ``coefficients``, as what ``lcsc show STUDY --format json``
    prints; there may be ``[S, K]`` of them then, with ``layer_groups``, a mapping with the ``names`` ``[S]`` and the
    ``rows`` of a study file's space.

    Returns:
        ``None`` for anything else, such as a recipe.

    Raises:
        StudySpecError: what follows the colon is no rate, width or number, or there is no such file, or a .json file
            cannot be read or holds something else.
    """
    name = source.partition(":")[0]
    if name in _PROFILES or name in _WINDOWS:
        _check_kind(source)
        return lambda trajectory: (trajectory, _coefficients_of_kind(source, trajectory.steps))
    path = Path(source)
    if not path.exists():
        raise StudySpecError(
            f"{source}: no such file; expected {_EXPECTED}; or the file of a recipe, an exported model or coefficients "
            "in JSON. lcsc export merges the answer of a study"
        )
    if path.suffix != ".json":
        return None
    content = _read_json(path)
    is_recipe = isinstance(content, Mapping) and "checkpoint_sha256" in content
    if is_recipe:
        return None
    if isinstance(content, Mapping) and "coefficients" in content:
        numbers = content["coefficients"]
        layer_groups = content.get("layer_groups")
    else:
        numbers = content
        layer_groups = None
    if not _are_numbers(numbers):
        raise StudySpecError(
            f"{path}: expected a list of numbers, one for each checkpoint in the order of the steps, or a mapping with "
            "such a list under coefficients, as lcsc show STUDY --format json prints it"
        )
    if layer_groups is None:
        return lambda trajectory: (trajectory, check_coefficients(numbers, len(trajectory.steps)))
    if not isinstance(layer_groups, Mapping) or not isinstance(layer_groups.get("names"), list):
        raise StudySpecError(f"{path}: layer_groups: expected rows and names, as of lcsc show STUDY --format json")
    return _in_layer_groups(path, numbers, layer_groups)


def _number_in(source: str) -> float:
    """The number of ``ema:0.9999``."""
    try:
        return float(source.partition(":")[2])
    except ValueError as error:
        raise StudySpecError(f"{source}: expected a number, as in ema:0.9999 or power:0.1") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudySpecError(f"{path}: cannot be read as JSON ({error})") from error


def _are_numbers(value: Any) -> bool:
    """Whether this is a list of numbers, or a list of such lists."""
    if not isinstance(value, list):
        return False
    rows = value if all(isinstance(row, list) for row in value) else [value]
    return all(isinstance(number, (int, float)) for row in rows for number in row)


def _in_layer_groups(path: Path, numbers: list[Any], layer_groups: Mapping[str, Any]) -> CoefficientsOf:
    """Coefficients for the layer groups that a file names.

    Args:
        path: the file.
        numbers: ``[S, K]``, a row for each group; or ``[K]``, one for all.
        layer_groups: the ``names`` of the groups, ``[S]``; and ``rows``, the rule of the study file that made them.
    """
    expected_names = layer_groups["names"]

    def coefficients_of(trajectory: Trajectory) -> tuple[Trajectory, Coefficients]:
        rule = parse_settings(SpaceSpec, {"rows": layer_groups.get("rows")}, source=str(path)).rows
        grouped = trajectory.in_rows(rule)
        names: list[str] = []
        if grouped.layer_groups is not None:
            names = list(grouped.layer_groups.names)
        if names != expected_names:
            additional = [name for name in names if name not in expected_names]
            difference = f"they have {len(names)} of {len(expected_names)}"
            if additional:
                difference = f"there is no row for {additional[0]}"
            raise StudySpecError(f"{path}: the layer groups of these checkpoints differ: {difference}")
        return grouped, check_coefficients(numbers, len(grouped.steps), rows=len(names))

    return coefficients_of
