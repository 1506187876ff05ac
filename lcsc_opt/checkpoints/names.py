"""Reads a checkpoint's path: its training step, and the series that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".index.json")
_PRECISION = r"(?:fp|bf|float)[0-9]+"
_NAMED = r"(?:step|iter|iteration)s?[=_-]?([0-9]{1,18})(?![0-9])"
_WHOLE = r"(?<![0-9.])([0-9]{1,18})(?![0-9]|\.[0-9])"  # not a part of 0.9999
_SETTING = r"[A-Za-z_/]*=-?[0-9.]+(?:e-?[0-9]+)?"  # epoch=3, val_loss=0.25
_DECIMAL = r"[0-9]+\.[0-9]+"
_AVERAGE = r"ema|snapshot"
_FOLDER = r"(?:checkpoint|ckpt|global_step|step|iter|iteration)?[-_]?([0-9]{1,18})(?:\.ckpt)?"


def named_step(path: Path) -> int | None:
    """The number behind "step" or "iter" in the name."""
    found = re.findall(_NAMED, _stem(path), flags=re.IGNORECASE)
    return int(found[-1]) if found else None


def numbered_step(path: Path) -> int | None:
    """The last whole number in the name, else N of a folder ``checkpoint-N`` around it."""
    found = re.findall(_WHOLE, _stem(path))
    if found:
        return int(found[-1])
    folder = _numbered_folder(path)
    return int(folder[1]) if folder else None


def checkpoint_series(path: str | Path) -> str:
    """The series in a folder that a checkpoint belongs to: its name without step, epoch and metrics.

    ``ema_0.9999_012345.pt`` is of ``ema_0.9999``, ``network-snapshot-0001000-0.050.pkl`` of
    ``network-snapshot-0.050``, ``checkpoint-500/unet`` of ``checkpoint/unet``. Only checkpoints of one series make a
    trajectory.
    """
    path = Path(path)
    name = _series(_without_suffix(path.name))
    if name is not None:
        return name
    folders = path.parts[:-1]
    for depth in (1, 2):
        around = folders[-depth] if len(folders) >= depth else ""
        if re.fullmatch(_FOLDER, around):
            rest = (*folders[len(folders) - depth + 1 :], _without_suffix(path.name))
            return "/".join((_series(_without_suffix(around)) or "step", *rest))
    return _without_suffix(path.name)


def series_of_all(paths: Sequence[Path]) -> list[str]:
    """The series of each of these checkpoints: decimal numbers behind the step may be metrics, and no part of it.

    ``net_1000_0.53.pt``, ``net_2000_0.48.pt`` and ``net_3000_0.41.pt`` are of ``net``. That takes three different
    numbers, no step that is there twice, and no average in the name (``ema``, ``network-snapshot``), whose rate or
    width the number would be.
    """
    series = [checkpoint_series(path) for path in paths]
    without = {_without_metrics(path) for path in paths}
    if len(set(series)) < 3 or len(without) > 1 or None in without:
        return series
    steps = {_step_in_name(path) for path in paths}
    return [str(name) for name in without] * len(paths) if len(steps) == len(paths) else series


def _without_metrics(path: Path) -> str | None:
    """The series without decimal numbers behind the step; ``None`` for an average, or where the name has no step."""
    name = _without_suffix(path.name)
    step = _step_in_text(name)
    if step is None or re.search(_AVERAGE, name, flags=re.IGNORECASE):
        return None
    return _bare(name[: step.start()] + re.sub(_DECIMAL, "", name[step.end() :]))


def _step_in_name(path: Path) -> int | None:
    step = named_step(path)
    return numbered_step(path) if step is None else step


def _series(name: str) -> str | None:
    """``name`` without its step, epoch and metrics; ``None`` when it has no step."""
    step = _step_in_text(name)
    return None if step is None else _bare(name[: step.start()] + name[step.end() :])


def _step_in_text(name: str) -> re.Match[str] | None:
    """Where the step is in a name."""
    hidden = re.sub(_PRECISION, lambda match: "x" * len(match[0]), name, flags=re.IGNORECASE)
    found = [*re.finditer(_NAMED, hidden, flags=re.IGNORECASE)] or [*re.finditer(_WHOLE, hidden)]
    return found[-1] if found else None


def _bare(name: str) -> str:
    """A name that has lost its step, without settings such as ``epoch=3``, and without separators that are left."""
    bare = re.sub(_SETTING, "", name)
    return re.sub(r"([-_. ])[-_. ]+", r"\1", bare).strip("-_. ") or "step"


def _without_suffix(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _stem(path: Path) -> str:
    """The name without its suffix and its precision (``fp16``), whose digits are not a step."""
    return re.sub(_PRECISION, "", _without_suffix(path.name), flags=re.IGNORECASE)


def _numbered_folder(path: Path) -> re.Match[str] | None:
    for folder in path.absolute().parts[-2:-4:-1]:
        if match := re.fullmatch(_FOLDER, folder):
            return match
    return None


MANIFEST = "manifest.json"


WEIGHTS = "weights.bin"


REFERENCE = "reference.bin"  # the exact row of one checkpoint, where the others are stored as differences from it
