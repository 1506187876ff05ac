"""Reading one checkpoint from the files that people save: safetensors, torch, and diffusers folders.

A format is one function ``(path, key) -> Checkpoint``; :func:`read_checkpoint` chooses it by the file's
suffix.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcsc_opt.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
GUESSED_KEYS = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "params",
    "unet",
)
FOLDER_KEYS = ("unet", "transformer")
FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_lora_weights.bin",
    "pytorch_model.bin",
)
WRAPPERS = ("module.", "_orig_mod.")  # put by DataParallel and by torch.compile
STEP_NAMES = ("step", "ss_steps")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes:
        tensors: name → tensor on the CPU; they may be mapped from the file, so copy before writing to them.
        key: where in the file they were: ``"a.b"`` for nested dicts, the subfolder of a diffusers folder,
            ``""`` when the file is the bare state dict.
        metadata: the texts of a safetensors header; empty for other formats.
    """

    tensors: dict[str, Tensor]
    key: str
    metadata: Mapping[str, str]


def read_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """Read the state dict that is in ``path``; code in the file is never run.

    Args:
        path: ``.safetensors``; ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` of torch; or a diffusers folder
            such as ``checkpoint-500`` or ``checkpoint-500/unet``.
        key: which state dict of the file, as in :class:`Checkpoint`; ``None`` looks in the usual places,
            running averages (``ema`` …) before raw weights.

    Raises:
        CheckpointError: not there, truncated, not weights, would run code, or ``key`` is not in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, key)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: the save was interrupted; leave it out.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, key)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, key)
    raise CheckpointError(f"{path} is not a checkpoint: expected .safetensors, {', '.join(TORCH_SUFFIXES)}.")


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """The texts of a safetensors header, without the weights; empty for other formats.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def checkpoint_step(path: str | Path, metadata: Mapping[str, str] | None = None) -> int:
    """The training step of a checkpoint.

    It is ``step`` or ``ss_steps`` of the safetensors metadata; else the number behind "step" in the name;
    else the last number in the name (``model012345.pt``); else N of a folder ``checkpoint-N`` around it.

    Raises:
        CheckpointError: there is no number in any of these places.
    """
    path = Path(path)
    for name in STEP_NAMES:
        text = (metadata or {}).get(name, "")
        if re.fullmatch(r"[0-9]{1,18}", text):
            return int(text)
    for step in _steps_in_names(path):
        return step
    raise CheckpointError(f"{path} does not tell its training step: pass the steps with --steps.")


def _steps_in_names(path: Path) -> Iterator[int]:
    stem = path.stem if path.suffix in (".safetensors", *TORCH_SUFFIXES) else path.name
    stem = re.sub(r"(fp|bf|float)[0-9]+", "", stem, flags=re.IGNORECASE)
    named = re.findall(r"(?:step|iter)s?[=_-]?([0-9]{1,18})", stem, flags=re.IGNORECASE)
    yield from map(int, named[-1:] or re.findall(r"[0-9]{1,18}", stem)[-1:])
    for folder in path.absolute().parts[-2:-4:-1]:
        if match := re.fullmatch(r"checkpoint[-_]?([0-9]{1,18})", folder):
            yield int(match[1])


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of ``DataParallel`` and ``torch.compile`` where every name carries them."""
    names = list(tensors)
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if names and all(n.startswith(prefix + w) for n in names)), ""):
        prefix += wrapper
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path, key: str | None) -> Checkpoint:
    if key:
        raise CheckpointError(f"{path} is one state dict without the key {key!r}: leave out --key.")
    with _opened(path) as file:
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:
            raise _unreadable(path, error) from error
        metadata = dict(file.metadata() or {})
    return _checkpoint(path, tensors, "", metadata)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path.") from None
    except Exception as error:  # the parser's own type is private
        raise _unreadable(path, error) from error


def _read_torch(path: Path, key: str | None) -> Checkpoint:
    content = _load_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {_kind(content)}, not a state dict: save model.state_dict().")
    found = _guess(content) if key is None else key
    if found is None:
        keys = ", ".join(str(name) for name in list(content)[:8])
        raise CheckpointError(f"{path} holds no state dict in a usual place: pass --key; it has {keys}.")
    return _checkpoint(path, _look_up(path, content, found), found, {})


def _load_torch(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # saved by torch < 1.6
    except Exception as error:  # a hostile pickle can raise anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path} cannot be read: permission denied.")
    if "Unsupported" in str(error) or "GLOBAL" in str(error):
        return CheckpointError(
            f"{path} holds more than weights and would run code when loaded: "
            "save model.state_dict() alone, best as .safetensors."
        )
    return CheckpointError(f"{path} is truncated or is not weights: save or copy it again, or leave it out.")


def _guess(content: Mapping[Any, Any]) -> str | None:
    """Where the state dict is: bare when all are tensors, else under the first usual key that has tensors."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return ""
    for key in GUESSED_KEYS:
        inner = content.get(key)
        if not isinstance(inner, Mapping):
            continue
        if any(isinstance(value, Tensor) for value in inner.values()):
            return key
        if (deeper := _guess(inner)) is not None:
            return f"{key}.{deeper}"
    return "" if any(isinstance(value, Tensor) for value in content.values()) else None


def _look_up(path: Path, content: Any, key: str) -> Mapping[Any, Any]:
    for part in key.split(".") if key else []:
        if not isinstance(content, Mapping) or part not in content:
            there = ", ".join(map(str, content)) if isinstance(content, Mapping) else _kind(content)
            raise CheckpointError(f"{path} has no key {key!r}: {part!r} is not among {there[:200]}.")
        content = content[part]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: {key!r} is {_kind(content)}, not a state dict: pass another --key.")
    return content


def _checkpoint(path: Path, content: Mapping[Any, Any], key: str, metadata: Mapping[str, str]) -> Checkpoint:
    if not content:
        raise CheckpointError(f"{path} holds no tensor{f' under {key!r}' if key else ''}: leave it out.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            where = f"{key}.{name}" if key else str(name)
            raise CheckpointError(
                f"{path}: {where!r} is {_kind(value)}, not a tensor: pass --key, or save the weights alone."
            )
    return Checkpoint(strip_wrappers(content), key, metadata)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _read_folder(path: Path, key: str | None) -> Checkpoint:
    """A diffusers folder: the weights lie in it, or in the subfolder ``key``."""
    inside = _weights_file(path) if key in (None, "", path.name) else None
    folders = [] if inside else [key] if key else FOLDER_KEYS
    for folder in folders:
        if found := _weights_file(path / folder):
            return dataclasses.replace(read_checkpoint(found, key=""), key=folder)
    if inside is None:
        wanted = f"no weights in {key!r}" if key else "no weights that are known"
        raise CheckpointError(f"{path} holds {wanted}: name the file itself, or pass --key SUBFOLDER.")
    return dataclasses.replace(read_checkpoint(inside), key=key or "")


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
