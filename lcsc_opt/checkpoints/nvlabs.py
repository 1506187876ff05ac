"""Networks in NVlabs' snapshots: their weights and arguments, from records of objects that were never made.

``torch_utils.persistence`` of EDM, EDM2 and StyleGAN pickles a network as a call with the source code of its class and
the network's ``__dict__``. Here, this source is only data. Weights are named as ``state_dict()`` would name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lcsc_opt.checkpoints.contents import Record, Refused, is_tensor, kind, shown

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
MAX_MODULES = 100_000
MAX_NAME = 1_000  # characters of a tensor's whole name
MAX_ARGUMENTS = 10_000


def is_network(value: object) -> bool:
    """Whether ``value`` is a network that NVlabs' code has pickled."""
    return isinstance(value, Record) and value.name == PERSISTENT and _state(value) is not None


def is_module(value: object) -> bool:
    """Whether ``value`` is any pickled ``torch.nn.Module``."""
    return isinstance(value, Record) and _state(value) is not None


def _meta(record: Record) -> Mapping[str, Any]:
    found = record.args[0] if record.args else None
    return found if isinstance(found, dict) else {}


def _state(record: Record) -> dict[str, Any] | None:
    state = _meta(record).get("state") if record.name == PERSISTENT else record.state
    if not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
        return None
    return state if isinstance(state.get("_parameters"), dict) else None


def network_weights(record: Record) -> dict[str, Any]:
    """Name → tensor, as the network's ``state_dict()`` names them and in its order.

    Raises:
        Refused: modules that contain themselves, or are too many.
    """
    weights: dict[str, Any] = {}
    seen = 0
    for prefix, state in _walk(record):
        parameters, buffers = state["_parameters"], state.get("_buffers") or {}
        transient = state.get("_non_persistent_buffers_set") or ()
        seen += len(parameters) + len(buffers) + len(transient)
        if seen > MAX_MODULES:
            raise Refused(f"holds a network of more than {MAX_MODULES:,} tensors: leave it out.")
        left_out = {name for name in transient if isinstance(name, str)}
        kept = {name: value for name, value in buffers.items() if name not in left_out}
        for name, value in (*parameters.items(), *kept.items()):
            _check_name(prefix, name)
            if value is not None:
                weights[f"{prefix}{name}"] = value
    return weights


def _walk(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every module before its children, which is the order of ``state_dict()``."""
    pending: list[tuple[str, Any]] = [("", record)]
    seen = 0
    while pending:
        prefix, module = pending.pop()
        state = _state(module) if isinstance(module, Record) else None
        if state is None:
            raise Refused(f"holds a network with a part {shown(prefix)!r} that is no module: leave it out.")
        yield prefix, state
        seen += 1 + len(state["_modules"])
        if seen > MAX_MODULES:
            raise Refused(f"holds a network of more than {MAX_MODULES:,} modules: leave it out.")
        for name, child in reversed(state["_modules"].items()):
            _check_name(prefix, name)
            if child is not None:
                pending.append((f"{prefix}{name}.", child))


def _check_name(prefix: str, name: object) -> None:
    if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
        raise Refused(f"holds a network whose parts have impossible names ({shown(name)}): leave it out.")


def init_arguments(record: Record) -> dict[str, Any]:
    """``class_name``, ``init_args`` and ``init_kwargs`` of a network: strings, numbers, lists and dicts.

    Raises:
        Refused: an argument is something else.
    """
    state = _state(record) or {}
    args = state.get("_init_args")
    return {
        "class_name": _plain(_meta(record).get("class_name"), "class_name", [MAX_ARGUMENTS]),
        "init_args": _plain(list(args) if isinstance(args, (list, tuple)) else [], "init_args", [MAX_ARGUMENTS]),
        "init_kwargs": _plain(state.get("_init_kwargs") or {}, "init_kwargs", [MAX_ARGUMENTS]),
    }


def _plain(value: Any, where: str, left: list[int]) -> Any:
    """A copy of ``value`` without any record in it; ``left`` counts how much more it may hold."""
    left[0] -= 1
    if left[0] < 0 or where.count(".") > 20:
        raise Refused("holds a network with too many arguments: leave it out.")
    if isinstance(value, Record) and value.name.endswith(".EasyDict") and not value.args:
        value = value.items or {}
    if isinstance(value, dict) and not any(isinstance(name, Record) for name in value):
        return {name: _plain(part, f"{where}.{shown(name)}", left) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part, f"{where}.{index}", left) for index, part in enumerate(value))
    if value is None or (isinstance(value, (str, int, float, bool)) and not is_tensor(value)):
        return value
    raise Refused(f"{where} is {kind(value)}, not plain data: build the network by its own settings.")
