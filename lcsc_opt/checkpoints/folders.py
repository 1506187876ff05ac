"""Folders that are one checkpoint, or a whole pipeline: of diffusers, Accelerate, PEFT and torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.distributed import METADATA
from lcsc_opt.checkpoints.inventory import is_average
from lcsc_opt.checkpoints.names import CHECKPOINT_SUFFIXES, TORCH_SUFFIXES, is_plain_name, is_weights_file
from lcsc_opt.checkpoints.pickles import shown

_COMPONENTS = (  # running averages come before raw weights
    "unet_ema",
    "transformer_ema",
    "prior_ema",
    "unet",
    "transformer",
    "prior",
    "unet_lora",
    "transformer_lora",
    "pytorch_model_fsdp_0",  # of Accelerate with FSDP
)
_STEMS = ("diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")
_WEIGHTS_FILES = (
    *(f"{stem}.safetensors" for stem in (*_STEMS, "model")),
    *(f"{stem}.bin" for stem in (*_STEMS, "pytorch_model")),
)
_SUFFIXES_OF_A_KEY = (*CHECKPOINT_SUFFIXES, ".safetensors.index.json", ".bin.index.json")


class FolderWeights(NamedTuple):
    """Where the weights of a folder are.

    Attributes:
        file: the file, or the index of several.
        key: the part of the key that chooses this file; ``""`` when it lies in the folder itself.
        rest: the rest of the key, which finds the state dict in the file: ``""`` is the file itself, ``None`` is to
            guess.
        alternatives: keys of other components; empty where the user has chosen.
    """

    file: Path
    key: str
    rest: str | None = ""
    alternatives: tuple[str, ...] = ()

    @property
    def outer(self) -> str:
        """What keys in this folder begin with, before those inside of the file."""
        return f"{self.key}." if self.key else ""

    @property
    def raw_and_average(self) -> tuple[str | None, str | None]:
        """The keys of the raw weights and of their average; both are ``None`` where there are not both."""
        raw = self.key.removesuffix("_ema")
        if raw not in self.alternatives:
            return None, None
        return raw, self.key


def find_weights(folder: Path, key: str | None, *, may_be_alone: bool = True) -> FolderWeights:
    """The weights of a folder: in it, in the subfolder ``key``, or in its file ``key``.

    Args:
        folder: the folder.
        key: a subfolder such as ``unet``, or a file without its suffix; behind a dot, a key inside of it may follow.
            ``None`` and ``""`` take the usual places.
        may_be_alone: whether the only file of weights in the folder counts, whatever its name is.

    Raises:
        TrajectoryError: there are none, or several of which none can be preferred.
    """
    file = _weights_file(folder)
    if file is not None and not key:
        return FolderWeights(file, "", alternatives=_others_beside(file))
    if file is not None and key == folder.name:  # who chooses by key may name the subfolder in the path, too
        return FolderWeights(file, folder.name)
    weights = _weights_under_key(folder, key) if key else _components(folder)
    if weights is not None:
        return weights
    # the key may also be one inside of the file
    if file is None and may_be_alone:
        file = _only_file(folder)
        if file is None:
            weights = _only_part(folder)
            if weights is not None:
                return weights._replace(rest=key or None)
    elif file is not None and not has_keys(file):
        raise TrajectoryError(f"holds no weights in {shown(key)!r}: name the file itself, or pass --key SUBFOLDER.")
    if file is None:
        raise TrajectoryError("holds no known file of weights: name the file itself, or pass --key SUBFOLDER.")
    return FolderWeights(file, "", rest=key or None)


def has_keys(file: Path) -> bool:
    """Whether a file may hold several state dicts; one of safetensors does not."""
    return file.name == METADATA or file.name.endswith(TORCH_SUFFIXES)


def file_of_weights(path: Path, key: str | None) -> Path:
    """The file of a checkpoint's weights: ``path`` itself, or one in that folder; the folder, where it is not known."""
    if path.is_dir():
        with contextlib.suppress(TrajectoryError):
            return find_weights(path, key).file
    return path


def in_file(path: Path, key: str) -> tuple[Path, str, str]:
    """The file of a checkpoint's weights under ``key``, what is before the key in that file, and that key.

    Raises:
        TrajectoryError: the folder has no such weights.
    """
    if not path.is_dir():
        return path, "", key
    weights = find_weights(path, key)
    return weights.file, weights.outer, weights.rest or ""


def place_in_file(path: Path, key: str) -> tuple[Path, str]:
    """The file of a checkpoint's weights, and the key inside of it; ``path`` itself where that is not known."""
    with contextlib.suppress(TrajectoryError):
        file, _, inner = in_file(path, key)
        return file, inner
    return path, key


def folder_of_weights(path: Path, key: str | None) -> Path:
    """The folder that the weights of a checkpoint lie in: around a file, or in a folder."""
    file = file_of_weights(path, key)
    return file if file.is_dir() else file.parent


def _components(folder: Path) -> FolderWeights | None:
    """The weights of the first of the usual components of a pipeline, with the others as alternatives, or ``None``."""
    files = {name: _weights_file(folder / name) or _only_file(folder / name) for name in _COMPONENTS}
    components = {name: file for name, file in files.items() if file is not None}
    if not components:
        return None
    first, *alternatives = components
    return FolderWeights(components[first], first, alternatives=tuple(alternatives))


def _only_file(folder: Path) -> Path | None:
    """The only file of weights in a folder, whatever its name is; ``net.pth`` beside ``net_ema.pth`` is the only one.

    Raises:
        TrajectoryError: there are several, as variants of diffusers.
    """
    files = [path for path in folder.glob("*") if is_weights_file(path)]
    raw = [path for path in files if not is_average(path.stem)]
    if len(raw) == 1:
        return raw[0]
    if len(files) > 1:
        names = ", ".join(sorted(path.name for path in files)[:4])
        raise TrajectoryError(
            f"holds several variants of its weights ({names} in {folder.name}): name one of these files."
        )
    return next(iter(files), None)


def _only_part(folder: Path) -> FolderWeights | None:
    """The weights of the only subfolder that has some, as Megatron's ``mp_rank_00``."""
    files = {
        path.name: _only_file(path) for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")
    }
    found = [(name, file) for name, file in files.items() if file is not None]
    if len(found) != 1:
        return None
    ((name, file),) = found
    return FolderWeights(file, name, rest=None)


def _others_beside(file: Path) -> tuple[str, ...]:
    """The keys of further models beside a file of weights, as Accelerate's ``model_1``."""
    stem, _, suffix = file.name.partition(".")
    further = file.parent.glob(f"{stem}_[0-9]*.{suffix}")
    return tuple(sorted(path.name.removesuffix(f".{suffix}") for path in further))


def _weights_under_key(folder: Path, key: str) -> FolderWeights | None:
    """The subfolder or file ``key``; or that of its first part, with the rest of the key inside.

    The whole key comes first, since names may have dots.
    """
    first, _, rest = key.partition(".")
    for name, rest_of_key in ((key, ""), (first, rest)):
        if not is_plain_name(name):
            continue
        subfolder_file = _weights_file(folder / name) or _only_file(folder / name)
        if subfolder_file is not None and (has_keys(subfolder_file) or not rest_of_key):
            return FolderWeights(subfolder_file, name, rest=rest_of_key)
        for suffix in _SUFFIXES_OF_A_KEY:
            file = folder / f"{name}{suffix}"
            if file.is_file():
                return FolderWeights(file, name, rest=rest_of_key or None)
    return None


def _weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder, or their index, under one of the names that libraries use."""
    for name in _WEIGHTS_FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    if any(folder.glob("*.distcp")):  # a distributed checkpoint; where its metadata are missing, reading says so
        return folder / METADATA
    return None
