"""The state dict under a key such as ``ema`` or ``state_dict.model``, and the counters beside it.

Networks that were pickled whole are read by :mod:`lcsc_opt.checkpoints.modules`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.inventory import Inventory, entries_of, flattened, listed, of_pseudo_optimizer
from lcsc_opt.checkpoints.modules import init_arguments_of, is_module, module_weights
from lcsc_opt.checkpoints.pickles import Record, Span, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, is_tensor, kind, map_tensors

_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step", "batch_idx_train")
_DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
_EPOCH_KEYS = ("epoch", "current_epoch")
_MAX_KEY_PARTS = 32
_MAX_NUMBER = 10**18


class Content:
    """Everything in a file: plain data, tensors or references to them, and records."""

    def __init__(self, value: Any) -> None:
        if _is_ddim_list(value):
            value = dict(zip(_DDIM_LIST, value, strict=False))
        self._value = value

    @property
    def steps(self) -> list[Any]:
        """What may be the training step that a file holds with the weights; :func:`whole_number` tells its number."""
        entries = entries_of(self._value) or {}
        return [*(entries.get(name) for name in _STEP_KEYS), _updates_of_fairseq(entries)]

    @property
    def epochs(self) -> list[Any]:
        """As :attr:`steps`, what may be the epoch."""
        entries = entries_of(self._value) or {}
        return [entries.get(name) for name in _EPOCH_KEYS]

    @property
    def is_post_hoc_ema(self) -> bool:
        """Whether it is an average of ema-pytorch's PostHocEMA, all of whose entries have the dtype of the weights."""
        entries = entries_of(self._value) or {}
        return "initted" in entries and isinstance(entries.get("step"), TensorRef)

    @functools.cached_property
    def inventory(self) -> Inventory:
        """Every container of tensors in the file."""
        return Inventory(self._value)

    def state_dict(self, key: str) -> Mapping[Any, Any]:
        """The state dict under ``key``: names of parts joined by dots, which the start of tensors' names may follow.

        Raises:
            TrajectoryError: there is nothing under that key, or no state dict.
        """
        found = self.inventory.at(key)
        if found is not None and (found.average_of is not None or found.has_no_names):
            return self.inventory.named(found)
        content = self._value
        rest = key
        while rest:
            parts = _parts(content)
            if parts is None:
                raise TrajectoryError(f"has no key {shown(key)!r}: {shown(rest)!r} is sought in {kind(content)}.")
            name = _longest_name(rest, parts)
            if name is None:
                return _under_prefix(parts, rest, key)
            content = parts[name]
            rest = rest[len(name) + 1 :]
        tensors = _parts(content)
        if tensors is None or isinstance(content, (list, tuple)):
            place = f" under {shown(key)!r}" if key else ""
            raise TrajectoryError(
                f"has {kind(content)}{place}, not a state dict: save model.state_dict(), or pass another --key."
            )
        return of_pseudo_optimizer(tensors) or flattened(tensors) or _without_extra_states(tensors)

    def init_arguments(self, key: str) -> dict[str, Any]:
        """``class_name``, ``init_args`` and ``init_kwargs`` of NVlabs' network ``key``, as plain data.

        Raises:
            TrajectoryError: there is no such network, or an argument is something else.
        """
        network = (entries_of(self._value) or {}).get(key)
        arguments = init_arguments_of(network)
        if arguments is None:
            raise TrajectoryError(
                f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl."
            )
        return arguments


def _is_ddim_list(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (4, 5):
        return False
    optimizer = entries_of(value[1]) or {}
    return "param_groups" in optimizer and bool(_parts(value[0]))


def _updates_of_fairseq(entries: Mapping[Any, Any]) -> Any:
    """The number of updates at the end of fairseq's ``optimizer_history``."""
    history = entries.get("optimizer_history")
    if not isinstance(history, list) or not history:
        return None
    return (entries_of(history[-1]) or {}).get("num_updates")


def whole_number(value: Any, path: Path) -> int | None:
    """A number from 0 of any type, of Python, NumPy or torch, out of the file ``path``; ``None`` for anything else."""
    if isinstance(value, TensorRef):
        is_exact = str(value.dtype) in ("torch.float32", "torch.float64") or str(value.dtype).startswith("torch.int")
        value = map_tensors(path, {"": value})[""].item() if value.shape == () and is_exact else None
    elif isinstance(value, Record) and value.name.endswith(".multiarray.scalar"):
        value = _numpy_number(value, path)
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < _MAX_NUMBER else None


def _numpy_number(scalar: Record, path: Path) -> Any:
    """The value of a scalar of NumPy, whose bytes are text in old pickles, and in the file in new ones."""
    dtype, content = scalar.args
    if isinstance(content, Record):  # _codecs.encode(text, "latin1")
        content = content.args[0].encode("latin1")
    elif isinstance(content, Span):
        with path.open("rb") as file:
            file.seek(content.start)
            content = file.read(min(content.size, 8))
    code = str(dtype.args[0])
    return np.frombuffer(content, code).item() if code[:1] in "iuf" else None


def _longest_name(key: str, parts: Mapping[Any, Any]) -> str | None:
    """The longest name of a part that ``key`` begins with: names may have dots, as ``ema_0.9999``."""
    words = key.split(".")[:_MAX_KEY_PARTS]
    for count in range(len(words), 0, -1):
        name = ".".join(words[:count])
        if name in parts:
            return name
    return None


def _without_extra_states(parts: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Without what modules keep beside their weights (``get_extra_state``), unless that is a tensor."""
    return {name: value for name, value in parts.items() if is_tensor(value) or not str(name).endswith("_extra_state")}


def _parts(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network."""
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    if is_module(value):
        return module_weights(value)
    return entries_of(value)


def _under_prefix(parts: Mapping[Any, Any], prefix: str, key: str) -> dict[Any, Any]:
    """The entries whose names begin with ``prefix`` and a dot, without them; ``key`` is for the message."""
    names = (name for name in parts if isinstance(name, str) and name.startswith(f"{prefix}."))
    tensors = {name.removeprefix(f"{prefix}."): parts[name] for name in names}
    if not tensors:
        raise TrajectoryError(
            f"has no key {shown(key)!r}: {shown(prefix)!r} is not among {listed(parts)}; pass another, or leave out "
            "--key."
        )
    return tensors
