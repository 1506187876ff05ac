"""Reads a checkpoint's path: its training step, and the series that it belongs to."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".index.json")
_PRECISION = r"(?:fp|bf|float)[0-9]+"
_NAMED = r"(?:step|iter|iteration)s?[=_-]?([0-9]{1,18})(?![0-9])"
_WHOLE = r"(?<![0-9.])([0-9]{1,18})(?![0-9]|\.[0-9])"  # not a part of 0.9999
_SETTING = r"[A-Za-z_/]*=-?[0-9.]+(?:e-?[0-9]+)?"  # epoch=3, val_loss=0.25
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
    folders = (re.fullmatch(_FOLDER, folder) for folder in path.absolute().parts[-2:-4:-1])
    return next((int(folder[1]) for folder in folders if folder), None)


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


def _series(name: str) -> str | None:
    """``name`` without its step, settings such as ``epoch=3`` and separators that are left; ``None`` without a step."""
    hidden = re.sub(_PRECISION, lambda match: "x" * len(match[0]), name, flags=re.IGNORECASE)
    found = [*re.finditer(_NAMED, hidden, flags=re.IGNORECASE)] or [*re.finditer(_WHOLE, hidden)]
    if not found:
        return None
    bare = re.sub(_SETTING, "", name[: found[-1].start()] + name[found[-1].end() :])
    return re.sub(r"([-_. ])[-_. ]+", r"\1", bare).strip("-_. ") or "step"


def _without_suffix(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _stem(path: Path) -> str:
    """The name without its suffix and its precision (``fp16``), whose digits are not a step."""
    return re.sub(_PRECISION, "", _without_suffix(path.name), flags=re.IGNORECASE)
