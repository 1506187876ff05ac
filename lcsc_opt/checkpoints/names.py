"""What the name of a checkpoint tells: its training step, its series, and its place in natural order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
CHECKPOINT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# "digits" are the step itself, and "removed" is what a series' name does not have
_STEP_WITH_WORD = re.compile(
    r"(?P<removed>(?:step|iter|iteration)s?[=_-]?(?P<digits>[0-9]{1,18}))(?![0-9])", re.IGNORECASE
)
_WHOLE_NUMBER = re.compile(
    r"(?<![0-9.])(?P<removed>(?P<digits>[0-9]{1,18}))(?![0-9]|\.[0-9])"  # not a part of 0.9999
)
_WIDTH_AND_STEP = re.compile(
    r"[0-9]{1,3}(?P<removed>\.(?P<digits>[1-9][0-9]{0,17}))"  # 0.50.pt of ema-pytorch's PostHocEMA
)
_SETTING = re.compile(r"[A-Za-z_/]*=-?[0-9.]+(?:e-?[0-9]+)?")  # epoch=3, val_loss=0.25
_TOKENS = re.compile(r"(tokens)[0-9.]+[KMBT]?", re.IGNORECASE)  # step10000-tokens21B of OLMo
_PRECISION = re.compile(r"(?:fp|bf|float)[0-9]+", re.IGNORECASE)
_NUMBERED_FOLDER = re.compile(r"(?:checkpoint|ckpt|global_step|step|iter|iteration)?[-_]?([0-9]{1,18})(?:\.ckpt)?")


def step_in_name(path: Path) -> int | None:
    """The training step that a checkpoint's name tells, or ``None``.

    It is the number behind "step" or "iter"; else the last whole number (``model012345.pt``); else N of one of the two
    folders around it: ``checkpoint-N``, ``step_N``, or a bare ``N``, so ``2024/model.pt`` is of step 2024. A name such
    as ``0.999.pt`` tells none: that may be an EMA's rate, and the files of PostHocEMA hold their step.
    """
    if _WIDTH_AND_STEP.fullmatch(_without_suffix(path.name)):  # only the content tells it from an EMA's rate
        return None
    step = _find_step(_without_suffix(path.name))
    if step is not None:
        return int(step["digits"])
    numbered_folder = _numbered_folder(path)
    return None if numbered_folder is None else numbered_folder.step


def checkpoint_series(path: str | Path) -> str:
    """The series in a folder that a checkpoint belongs to: its name without step, epoch, tokens and metrics.

    ``ema_0.9999_012345.pt`` is of ``ema_0.9999``, ``network-snapshot-0001000-0.050.pkl`` of
    ``network-snapshot-0.050``, ``0.5000.pt`` of ``0``, ``checkpoint-500/unet`` of ``checkpoint/unet``. Only checkpoints
    of one series make a trajectory.
    """
    path = Path(path)
    name = _without_suffix(path.name)
    series = _series_of_name(name)
    if series is not None:
        return series
    numbered_folder = _numbered_folder(path)
    if numbered_folder is None:
        return name
    parts = path.absolute().parts
    folder = _without_suffix(parts[-1 - numbered_folder.depth])
    inside = parts[len(parts) - numbered_folder.depth : -1]
    return "/".join((_series_of_name(folder) or "step", *inside, name))


def post_hoc_step(path: Path) -> int | None:
    """The step in a name as of ema-pytorch's PostHocEMA, ``0.5000.pt``: which width, and the step; or ``None``."""
    width_and_step = _WIDTH_AND_STEP.fullmatch(_without_suffix(path.name))
    return None if width_and_step is None else int(width_and_step["digits"])


def series_glob(path: Path) -> str:
    """A glob of the series of a checkpoint: its path, with ``*`` for the step and for settings such as ``epoch=3``."""
    depth = 0  # of the part with the step, above the name
    if _find_step(_without_suffix(path.name)) is None:
        numbered_folder = _numbered_folder(path)
        if numbered_folder is not None:
            depth = numbered_folder.depth
    if depth >= len(path.parts):  # the working directory is in that folder
        path = path.absolute()
    parts = list(path.parts)
    place = len(parts) - 1 - depth
    stem = _without_suffix(parts[place])
    suffix = parts[place].removeprefix(stem)
    step = _find_step(stem)
    if step is not None:
        stem = f"{stem[: step.start('digits')]}*{stem[step.end('digits') :]}"
        stem = _SETTING.sub(lambda setting: f"{setting[0].partition('=')[0]}=*", stem)
        stem = _TOKENS.sub(r"\1*", stem)
    parts[place] = stem + suffix
    return str(Path(*parts))


def natural_order(path: Path) -> list[object]:
    """The key that sorts ``model2.pt`` before ``model10.pt``."""
    texts_and_numbers = re.split("([0-9]+)", str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(texts_and_numbers)]


def is_numbered(path: Path) -> bool:
    """Whether there is any number in the name."""
    return re.search("[0-9]", path.stem) is not None


def _find_step(name: str) -> re.Match[str] | None:
    """The step in a name without its suffix."""
    width_and_step = _WIDTH_AND_STEP.fullmatch(name)
    if width_and_step is not None:
        return width_and_step
    # the digits of fp16 are no step
    without_precision = _PRECISION.sub(lambda precision: "x" * len(precision[0]), name)
    for pattern in (_STEP_WITH_WORD, _WHOLE_NUMBER):
        matches = list(pattern.finditer(without_precision))
        if matches:
            return matches[-1]
    return None


def _series_of_name(name: str) -> str | None:
    """``name`` without its step, settings such as ``epoch=3``, and the separators that remain; ``None`` without one."""
    step = _find_step(name)
    if step is None:
        return None
    constant = name[: step.start("removed")] + name[step.end("removed") :]
    constant = _TOKENS.sub("", _SETTING.sub("", constant))
    return re.sub(r"([-_. ])[-_. ]+", r"\1", constant).strip("-_. ") or "step"


class _NumberedFolder(NamedTuple):
    """A folder such as ``checkpoint-500``: how far above a path it is, 1 or 2, and its step."""

    depth: int
    step: int


def _numbered_folder(path: Path) -> _NumberedFolder | None:
    """The nearest such folder of ``checkpoint-500/model.pt`` or ``checkpoint-500/unet/model.pt``; ``None`` for none."""
    nearest_folders = path.absolute().parts[-2:-4:-1]
    for depth, folder in enumerate(nearest_folders, start=1):
        numbered = _NUMBERED_FOLDER.fullmatch(folder)
        if numbered is not None:
            return _NumberedFolder(depth, int(numbered[1]))
    return None


def _without_suffix(name: str) -> str:
    for suffix in (*CHECKPOINT_SUFFIXES, ".index.json"):
        name = name.removesuffix(suffix)
    return name
