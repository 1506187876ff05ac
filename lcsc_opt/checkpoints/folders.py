"""Folders that are one checkpoint: of diffusers, Accelerate, PEFT, whole pipelines; and weights in several files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import shown

_COMPONENTS = (
    "unet_ema",
    "transformer_ema",
    "prior_ema",
    "unet",
    "transformer",
    "prior",
    "unet_lora",
    "transformer_lora",
)
_WEIGHTS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
    "pytorch_model.bin",
)
_NAMED_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pkl", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Found:
    """The file of a folder that has the weights.

    Attributes:
        file: a weights file, or the index of several.
        key: the key that chooses this file in the folder; ``""`` when it lies in the folder itself.
        rest: the rest of the key, which finds the state dict in the file; with ``None`` it is guessed.
        others: keys of other components that a user could choose; empty where the user has chosen.
    """

    file: Path
    key: str
    rest: str | None = ""
    others: tuple[str, ...] = ()


def find_weights(folder: Path, key: str | None) -> Found:
    """The weights of a folder: in it, in the subfolder ``key``, or in its file ``key``.

    Raises:
        TrajectoryError: there are none, or several of which none can be preferred.
    """
    if key in (None, "", folder.name) and (file := _weights_file(folder)):
        return Found(file, key or "")
    if key:
        return _by_key(folder, key)
    there = [(name, file) for name in _COMPONENTS if (file := _weights_file(folder / name))]
    if not there:
        raise TrajectoryError("holds no weights that are known: name the file itself, or pass --key SUBFOLDER.")
    return Found(there[0][1], there[0][0], others=tuple(name for name, _ in there[1:]))


def is_index(path: Path) -> bool:
    """Whether a file is an index, which lists the files that weights were split into."""
    return path.name.endswith(".json") and ".index." in path.name


def read_index(path: Path) -> dict[str, list[str]]:
    """File → names of its tensors, of an index such as ``model.safetensors.index.json``.

    Raises:
        TrajectoryError: it is not such an index, or it names a file outside of the folder.
        OSError: it cannot be opened.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        names = content["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrajectoryError("is no index of weights: save the model again, or name its files.") from error
    files: dict[str, list[str]] = {}
    for name, file in names:
        if not isinstance(file, str) or not _is_plain_name(file) or is_index(Path(file)):
            raise TrajectoryError(f"names a file outside of its folder ({shown(file)}): leave it out.")
        files.setdefault(file, []).append(name)
    if not files:
        raise TrajectoryError("is an index of no weights: leave it out.")
    return files


def _is_plain_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _by_key(folder: Path, key: str) -> Found:
    first, _, rest = key.partition(".")
    for name, left in ((key, ""), (first, rest)):
        if not _is_plain_name(name):
            continue
        if not left and (file := _weights_file(folder / name)):
            return Found(file, name)
        for suffix in _NAMED_FILES:
            if (file := folder / f"{name}{suffix}").is_file():
                return Found(file, name, rest=left or None)
    raise TrajectoryError(f"holds no weights in {shown(key)!r}: name the file itself, or pass --key SUBFOLDER.")


def _weights_file(folder: Path) -> Path | None:
    for name in _WEIGHTS_FILES:
        for candidate in (folder / name, folder / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    for name in _WEIGHTS_FILES:
        stem, _, suffix = name.rpartition(".")
        variants = [*folder.glob(f"{stem}.*.{suffix}"), *folder.glob(f"{stem}.{suffix}.index.*.json")]
        variants = [file for file in variants if "-of-" not in file.name]  # the parts that an index lists
        if len(variants) > 1:
            names = ", ".join(sorted(file.name for file in variants)[:4])
            raise TrajectoryError(f"holds several variants of its weights ({names}): name one of these files.")
        if variants:
            return variants[0]
    return None
