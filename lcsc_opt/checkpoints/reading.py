"""One checkpoint out of any file or folder that people save."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.folders import find_weights, is_index, read_index
from lcsc_opt.checkpoints.keys import (
    guess_key,
    inner_step,
    look_up,
    named_content,
    other_keys,
    parts_of,
    strip_wrappers,
)
from lcsc_opt.checkpoints.modules import init_arguments, is_network
from lcsc_opt.checkpoints.names import named_step, numbered_step
from lcsc_opt.checkpoints.pickles import MALFORMED, Record, TensorRef, is_tensor, kind, shown
from lcsc_opt.checkpoints.torch_files import MappedTensors, read_content
from lcsc_opt.checkpoints.weights import read_header_texts, read_safetensors

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_MOST_TENSORS = 100_000
_LONGEST_NAME = 2_000
_REPEATED = 16  # how much larger than the file its tensors may be, where they share memory


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
        TrajectoryError: not there, truncated, not weights, made to harm, or ``key`` is not in it.
    """
    path = Path(path)
    with _naming(path):
        _check_there(path)
        if not path.is_dir():
            return _read_file(path, key)
        found = find_weights(path, key)
    if found.others:
        notice(f"{path.name}: taking {found.key!r}; there is also {', '.join(found.others)} (choose with --key).")
    checkpoint = read_checkpoint(found.file, key=found.rest)
    return dataclasses.replace(checkpoint, key=".".join(filter(None, (found.key, checkpoint.key))))


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """The texts of a safetensors header, without the weights; empty for other formats.

    Raises:
        TrajectoryError: as :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        return {}
    with _naming(path):
        _check_there(path)
        return read_header_texts(path)


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
    with _naming(path):
        _check_there(path)
        network = (parts_of(read_content(path)) or {}).get(key)
        if not isinstance(network, Record) or not is_network(network):
            message = f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl."
            raise TrajectoryError(message)
        return init_arguments(network)


def checkpoint_step(path: str | Path) -> int:
    """The training step of a checkpoint; no weights are read.

    It is ``step`` or ``ss_steps`` of the safetensors metadata; else the number behind "step" or "iter" in the
    name; else ``global_step``, ``step`` or ``iteration`` inside a torch file; else the last whole number in the name
    (``model012345.pt``); else N of a folder ``checkpoint-N`` around it.

    Raises:
        TrajectoryError: there is no number in any of these places, or the file cannot be read.
    """
    path = Path(path)
    metadata = read_metadata(path) if path.is_file() else {}
    for text in (metadata.get("step", ""), metadata.get("ss_steps", "")):
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return int(text)
    step = named_step(path)
    if step is None and path.suffix in TORCH_SUFFIXES and path.is_file():
        with _naming(path):
            step = inner_step(named_content(read_content(path)))
    if step is None:
        step = numbered_step(path)
    if step is None:
        raise TrajectoryError(f"{path} does not tell its training step: pass the steps with --steps.")
    return step


def module_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, without the prefixes of wrappers.

    Of a module that averages a model, such as ``AveragedModel`` of torch and ``EMA`` of ema-pytorch, these are the
    averaged weights under the model's names.
    """
    state = module.state_dict()
    return strip_wrappers(look_up(state, guess_key(state) or ""))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong while this is open becomes one line that begins with ``path``."""
    try:
        yield
    except TrajectoryError as error:
        raise TrajectoryError(f"{path} {error}") from error
    except PermissionError as error:
        raise TrajectoryError(f"{path} cannot be read: permission denied.") from error
    except Exception as error:  # a hostile file can raise anything
        raise TrajectoryError(f"{path} {MALFORMED}") from error


def _check_there(path: Path) -> None:
    if not path.exists():
        raise TrajectoryError("does not exist: check the path.")
    if path.stat().st_size == 0:
        raise TrajectoryError("is empty: the save was interrupted; leave it out.")


def _read_file(path: Path, key: str | None) -> Checkpoint:
    metadata: Mapping[str, str] = {}
    content: Any
    if is_index(path):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = named_content(read_content(path))
    else:
        raise TrajectoryError(f"is not a checkpoint: expected .safetensors, {', '.join(TORCH_SUFFIXES)}.")
    found = guess_key(content) if key is None else key
    if found is None:
        parts = parts_of(content)
        if parts is None:
            raise TrajectoryError(f"holds {kind(content)}, not a state dict: save model.state_dict().")
        there = ", ".join(shown(name) for name in list(parts)[:8])
        raise TrajectoryError(f"holds no state dict in a usual place: pass --key; it has {there or 'nothing'}.")
    if key is None and found and (others := other_keys(content, found)):
        notice(f"{path.name}: taking {found!r}; there is also {', '.join(map(shown, others))} (choose with --key).")
    return Checkpoint(strip_wrappers(_tensors(path, look_up(content, found), found)), found, metadata)


def _tensors(path: Path, state: Mapping[Any, Any], key: str) -> dict[str, Tensor]:
    if not state:
        raise TrajectoryError(f"holds no tensor{f' under {shown(key)!r}' if key else ''}: leave it out.")
    if len(state) > _MOST_TENSORS:
        raise TrajectoryError(f"holds more than {_MOST_TENSORS:,} tensors: leave it out.")
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not is_tensor(value):
            where = shown(f"{key}.{name}" if key and isinstance(name, str) else name)
            raise TrajectoryError(
                f"has {kind(value)} at {where!r}, not a tensor: pass --key, or save the weights alone."
            )
    mapped = MappedTensors(path) if any(isinstance(value, TensorRef) for value in state.values()) else None
    tensors = {name: mapped.tensor(v) if mapped and isinstance(v, TensorRef) else v for name, v in state.items()}
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    size = sum(file.stat().st_size for file in (path.parent.glob("*") if is_index(path) else [path]) if file.is_file())
    if claimed > _REPEATED * size + 2**24:
        message = f"has tensors of {claimed / 2**30:,.1f} GiB in a file of {size / 2**30:,.1f} GiB: leave it out."
        raise TrajectoryError(message)
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, names in read_index(index).items():
        shard = _read_file(index.parent / file, "").tensors
        missing = next((name for name in names if name not in shard), None)
        if missing is not None:
            raise TrajectoryError(f"lists {shown(missing)!r}, which is not in {shown(file)}: save the model again.")
        tensors.update((name, shard[name]) for name in names)
    return tensors
