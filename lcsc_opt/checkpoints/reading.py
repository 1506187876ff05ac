"""One checkpoint out of any file or folder that people save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.contents import MappedTensors, Record, Refused, TensorRef, is_tensor, kind, shown
from lcsc_opt.checkpoints.folders import find_weights, is_index, read_index
from lcsc_opt.checkpoints.keys import (
    guess_key,
    inner_step,
    look_up,
    named_content,
    other_keys,
    parts_of,
    wrapper_prefix,
)
from lcsc_opt.checkpoints.names import named_step, numbered_step
from lcsc_opt.checkpoints.nvlabs import init_arguments, is_network
from lcsc_opt.checkpoints.pickles import MALFORMED
from lcsc_opt.checkpoints.safetensors_files import read_header_texts, read_safetensors
from lcsc_opt.checkpoints.torch_files import read_content

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
STEP_NAMES = ("step", "ss_steps")
MAX_TENSORS = 100_000
MAX_NAME = 2_000  # characters
REPEATED = 16  # how much larger than the file its tensors may be, where they share memory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

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
        path: ``.safetensors``, an index of several, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or ``.pkl`` of torch,
            Lightning or NVlabs; or a folder of diffusers, PEFT or Accelerate such as ``checkpoint-500``.
        key: which state dict of the file, as in :class:`Checkpoint`; the start of the tensors' names may follow it
            (``state_dict.model``). ``None`` looks in the usual places, for running averages (``ema`` …) before raw
            weights; where there was a choice, a notice says what was taken.

    Raises:
        TrajectoryError: not there, truncated, not weights, would run code, or ``key`` is not in it.
    """
    path = Path(path)
    try:
        return _read(path, key)
    except Exception as error:  # a hostile file can raise anything
        raise _error(path, error) from error


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """The texts of a safetensors header, without the weights; empty for other formats.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    try:
        _check_there(path)
        return read_header_texts(path)
    except Exception as error:
        raise _error(path, error) from error


def read_init_arguments(path: str | Path, *, key: str = "ema") -> dict[str, Any]:
    """How the network in a snapshot of EDM or EDM2 was made, as plain data; nothing in the file is run.

    Args:
        path: ``network-snapshot-*.pkl``.
        key: which network of the file.

    Returns:
        ``class_name`` (such as ``"EDMPrecond"``), ``init_args`` (a list) and ``init_kwargs`` (a dict).

    Raises:
        TrajectoryError: as :func:`read_checkpoint`; or an argument is not plain data.
    """
    path = Path(path)
    try:
        _check_there(path)
        network = (parts_of(read_content(path)) or {}).get(key)
        if not isinstance(network, Record) or not is_network(network):
            raise Refused(f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl.")
        return init_arguments(network)
    except Exception as error:
        raise _error(path, error) from error


def checkpoint_step(path: str | Path, metadata: Mapping[str, str] | None = None) -> int:
    """The training step of a checkpoint; no weights are read.

    It is ``step`` or ``ss_steps`` of the safetensors metadata; else the number behind "step" or "iter" in the
    name; else ``global_step``, ``step`` or ``iteration`` inside a torch file; else the last whole number in the name
    (``model012345.pt``); else N of a folder ``checkpoint-N`` around it.

    Raises:
        TrajectoryError: there is no number in any of these places, or the file cannot be read.
    """
    path = Path(path)
    for name in STEP_NAMES:
        text = (metadata or {}).get(name, "")
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return int(text)
    step = named_step(path)
    if step is None and path.suffix in TORCH_SUFFIXES and path.is_file():
        step = _step_inside(path)
    if step is None:
        step = numbered_step(path)
    if step is None:
        raise TrajectoryError(f"{path} does not tell its training step: pass the steps with --steps.")
    return step


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of ``DataParallel`` and ``torch.compile`` where every name carries them."""
    prefix = wrapper_prefix(list(tensors))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def module_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, without the prefixes of wrappers.

    Of a module that averages a model, such as ``AveragedModel`` of torch and ``EMA`` of ema-pytorch, these are the
    averaged weights under the model's names.
    """
    state = module.state_dict()
    return strip_wrappers(look_up(state, guess_key(state) or ""))


def _read(path: Path, key: str | None) -> Checkpoint:
    if path.is_dir():
        return _read_folder(path, key)
    _check_there(path)
    if is_index(path):
        return _chosen(path, _read_shards(path), {}, key)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return _chosen(path, tensors, metadata, key)
    if path.suffix in TORCH_SUFFIXES:
        return _chosen(path, named_content(read_content(path)), {}, key)
    raise Refused(f"is not a checkpoint: expected .safetensors, {', '.join(TORCH_SUFFIXES)}.")


def _check_there(path: Path) -> None:
    if not path.exists():
        raise Refused("does not exist: check the path.")
    if path.stat().st_size == 0:
        raise Refused("is empty: the save was interrupted; leave it out.")


def _chosen(path: Path, content: Any, metadata: Mapping[str, str], key: str | None) -> Checkpoint:
    found = guess_key(content) if key is None else key
    if found is None:
        parts = parts_of(content)
        if parts is None:
            raise Refused(f"holds {kind(content)}, not a state dict: save model.state_dict().")
        there = ", ".join(shown(name) for name in list(parts)[:8])
        raise Refused(f"holds no state dict in a usual place: pass --key; it has {there or 'nothing'}.")
    if key is None and found and (others := other_keys(content, found)):
        notice(f"{path.name}: taking {found!r}; there is also {', '.join(map(shown, others))} (choose with --key).")
    state = look_up(content, found)
    return Checkpoint(strip_wrappers(_tensors(path, state, found)), found, metadata)


def _tensors(path: Path, state: Mapping[Any, Any], key: str) -> dict[str, Tensor]:
    if not state:
        raise Refused(f"holds no tensor{f' under {shown(key)!r}' if key else ''}: leave it out.")
    if len(state) > MAX_TENSORS:
        raise Refused(f"holds more than {MAX_TENSORS:,} tensors: leave it out.")
    for name, value in state.items():
        if isinstance(name, str) and len(name) > MAX_NAME:
            raise Refused(f"holds a tensor with a name of {len(name):,} characters: leave it out.")
        if not isinstance(name, str) or not is_tensor(value):
            where = shown(f"{key}.{name}" if key else name)
            raise Refused(f"has {kind(value)} at {where!r}, not a tensor: pass --key, or save the weights alone.")
    mapped = MappedTensors(path) if any(isinstance(value, TensorRef) for value in state.values()) else None
    tensors = {name: mapped.tensor(v) if mapped and isinstance(v, TensorRef) else v for name, v in state.items()}
    _check_size(path, tensors)
    return tensors


def _check_size(path: Path, tensors: Mapping[str, Tensor]) -> None:
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    folder = path.parent.glob("*") if is_index(path) else [path]
    size = sum(file.stat().st_size for file in folder if file.is_file())
    if claimed > REPEATED * size + 2**24:
        raise Refused(f"has tensors of {claimed / 2**30:,.1f} GiB in a file of {size / 2**30:,.1f} GiB: leave it out.")


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, names in read_index(index).items():
        shard = read_checkpoint(index.parent / file, key="").tensors
        missing = next((name for name in names if name not in shard), None)
        if missing is not None:
            raise Refused(f"lists {shown(missing)!r}, which is not in {shown(file)}: save the model again.")
        tensors.update((name, shard[name]) for name in names)
    return tensors


def _read_folder(path: Path, key: str | None) -> Checkpoint:
    found = find_weights(path, key)
    if found.others:
        notice(f"{path.name}: taking {found.key!r}; there is also {', '.join(found.others)} (choose with --key).")
    checkpoint = read_checkpoint(found.file, key=found.rest)
    parts = [part for part in (found.key, checkpoint.key) if part]
    return dataclasses.replace(checkpoint, key=".".join(parts))


def _step_inside(path: Path) -> int | None:
    try:
        return inner_step(named_content(read_content(path, locate=False)))
    except Exception as error:
        raise _error(path, error) from error


def _error(path: Path, error: Exception) -> TrajectoryError:
    """The line for the user about what went wrong with ``path``."""
    if isinstance(error, TrajectoryError):
        return error
    if isinstance(error, Refused):
        return TrajectoryError(f"{path} {error}")
    if isinstance(error, PermissionError):
        return TrajectoryError(f"{path} cannot be read: permission denied.")
    return TrajectoryError(f"{path} {MALFORMED}")
