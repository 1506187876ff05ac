"""The weights of networks that were pickled as trees of modules, from records of objects that were never made.

``torch_utils.persistence`` of NVlabs (EDM, EDM2, StyleGAN) pickles a network as a call with the source code of its
class and the network's ``__dict__``. ``torch.jit.save`` writes source code and a pickle of the modules. The source is
only data here. Weights are named as ``state_dict()`` would name them, and in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import Record, is_tensor, kind, shown

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MOST_PARTS = 100_000  # modules and tensors
_LONGEST_NAME = 1_000  # of a tensor, with its modules' names
_MOST_ARGUMENTS = 10_000

_Parts = tuple[Mapping[Any, Any], Mapping[Any, Any], int]
"""Tensors and modules inside a module, by name, and what it costs to look at them."""


def is_network(value: object) -> bool:
    """Whether ``value`` is a network that NVlabs' code has pickled."""
    return is_module(value) and isinstance(value, Record) and value.name == _PERSISTENT


def is_module(value: object) -> bool:
    """Whether ``value`` is any pickled ``torch.nn.Module``."""
    return isinstance(value, Record) and _state(value) is not None


def network_weights(record: Record) -> dict[str, Any]:
    """Name → tensor of a network of NVlabs.

    Raises:
        TrajectoryError: modules that contain themselves, or are too many.
    """

    def parts(module: Any) -> _Parts:
        state = _state(module) if isinstance(module, Record) else None
        if state is None:
            raise TrajectoryError("holds a network with a part that is no module: leave it out.")
        buffers, transient = state.get("_buffers") or {}, state.get("_non_persistent_buffers_set") or ()
        if len(transient) > _MOST_PARTS:
            return {}, {}, len(transient)
        left_out = {name for name in transient if isinstance(name, str)}
        kept = {name: value for name, value in buffers.items() if name not in left_out}
        return state["_parameters"] | kept, state["_modules"], len(transient)

    return _weights(record, parts)


def script_weights(root: Any) -> dict[str, Any]:
    """Name → tensor of a TorchScript archive, such as OpenAI's CLIP.

    Raises:
        TrajectoryError: no tree of modules, or one that contains itself.
    """
    if not _is_script(root):
        raise TrajectoryError(f"is a TorchScript archive of {kind(root)}, not of a module: save model.state_dict().")

    def parts(module: Record) -> _Parts:
        tensors = {name: value for name, value in module.state.items() if is_tensor(value)}
        return tensors, {name: v for name, v in module.state.items() if _is_script(v)}, len(module.state)

    return _weights(root, parts)


def _weights(root: Record, parts_of: Callable[[Any], _Parts]) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", root)]
    seen = 0
    while pending:
        prefix, module = pending.pop()
        tensors, modules, cost = parts_of(module)
        seen += 1 + cost + len(tensors) + len(modules)
        if seen > _MOST_PARTS:
            raise TrajectoryError("holds networks in one another, or too many: save model.state_dict().")
        for name in (*tensors, *modules):
            if not isinstance(name, str) or len(prefix) + len(name) > _LONGEST_NAME:
                raise TrajectoryError(f"holds a network whose parts have impossible names ({shown(name)}).")
        weights |= {f"{prefix}{name}": value for name, value in tensors.items() if value is not None}
        children = [(f"{prefix}{name}.", child) for name, child in modules.items() if child is not None]
        pending += reversed(children)
    return weights


def init_arguments(record: Record) -> dict[str, Any]:
    """``class_name``, ``init_args`` and ``init_kwargs`` of a network: strings, numbers, lists and dicts.

    Raises:
        TrajectoryError: an argument is something else.
    """
    state = _state(record) or {}
    found = {
        "class_name": _meta(record).get("class_name"),
        "init_args": list(state.get("_init_args") or ()),
        "init_kwargs": state.get("_init_kwargs") or {},
    }
    left = [_MOST_ARGUMENTS]
    return {name: _plain(value, name, left) for name, value in found.items()}


def _plain(value: Any, where: str, left: list[int]) -> Any:
    """A copy of ``value`` without any record in it; ``left`` counts how much more it may hold."""
    left[0] -= 1
    if left[0] < 0 or where.count(".") > 20:
        raise TrajectoryError("holds a network with too many arguments: leave it out.")
    if isinstance(value, Record) and value.name.endswith(".EasyDict") and not value.args:
        value = value.items or {}
    if isinstance(value, dict) and not any(isinstance(name, Record) for name in value):
        return {name: _plain(part, f"{where}.{shown(name)}", left) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part, f"{where}.{index}", left) for index, part in enumerate(value))
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TrajectoryError(f"{where} is {kind(value)}, not plain data: build the network by its own settings.")


def _meta(record: Record) -> Mapping[str, Any]:
    found = record.args[0] if record.args else None
    return found if isinstance(found, dict) else {}


def _state(record: Record) -> dict[str, Any] | None:
    state = _meta(record).get("state") if record.name == _PERSISTENT else record.state
    dicts = isinstance(state, dict) and all(isinstance(state.get(name), dict) for name in ("_modules", "_parameters"))
    return state if dicts else None


def _is_script(value: Any) -> bool:
    return isinstance(value, Record) and value.name.startswith("__torch__.") and isinstance(value.state, dict)
