"""Networks that were pickled whole: their weights, and the arguments that NVlabs' networks were made with.

Such a network is a tree of records, which were never made into modules: those of ``torch.save(model)``; those of
NVlabs' ``torch_utils.persistence`` (EDM, EDM2, StyleGAN), a call with the source code of the class and the network's
``__dict__``; and those of ``torch.jit.save``. Their weights are named as ``state_dict()`` would name them, and in its
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import Record, shown
from lcsc_opt.checkpoints.torch_files import is_tensor, kind

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MAX_PARTS = 100_000  # modules and tensors of a network
_MAX_NAME_LENGTH = 1_000  # of a tensor, with its modules' names
_MAX_ARGUMENTS = 10_000
_MAX_DEPTH = 20  # of arguments in one another


def is_module(value: Any) -> bool:
    """Whether this is a network, or a part of one."""
    return _is_script(value) or _module_state(value) is not None


def module_weights(root: Any) -> dict[str, Any]:
    """Name → tensor of a network.

    Raises:
        TrajectoryError: modules that contain themselves, or are too many, or a part that is no module.
    """
    weights: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", root)]
    parts_left = _MAX_PARTS
    while pending:
        prefix, value = pending.pop()
        module = _module(value)
        parts_left -= 1 + module.parts
        if parts_left < 0:
            raise TrajectoryError("holds networks in one another, or too many: save model.state_dict().")
        for name in (*module.tensors, *module.children):
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME_LENGTH:
                raise TrajectoryError(f"holds a network whose parts have impossible names ({shown(name)}).")
        for name, tensor in module.saved_tensors().items():
            weights[f"{prefix}{name}"] = tensor
        children = [(f"{prefix}{name}.", child) for name, child in module.saved_children().items()]
        pending += reversed(children)  # the last one is popped first
    return weights


def init_arguments_of(network: Any) -> dict[str, Any] | None:
    """``class_name``, ``init_args`` and ``init_kwargs`` of a network of NVlabs' code; ``None`` if it is none.

    Raises:
        TrajectoryError: an argument is not plain data, or there are too many.
    """
    state = _module_state(network)
    if state is None or network.name != _PERSISTENT:
        return None
    arguments = {
        "class_name": network.args[0].get("class_name"),
        "init_args": list(state.get("_init_args") or ()),
        "init_kwargs": state.get("_init_kwargs") or {},
    }
    copy = _PlainCopy()
    return {name: copy.of(value, name) for name, value in arguments.items()}


class _Module(NamedTuple):
    """One module, as its record has it: unchecked, and with parts that ``state_dict()`` leaves out."""

    tensors: Mapping[Any, Any]
    children: Mapping[Any, Any]
    transient: tuple[Any, ...]  # names of buffers that are not saved
    is_script: bool

    @property
    def parts(self) -> int:
        """How many entries must be visited."""
        return len(self.tensors) + len(self.children) + len(self.transient)

    def saved_tensors(self) -> dict[str, Any]:
        """Name → tensor, of those that ``state_dict()`` has."""
        if self.is_script:
            return {name: value for name, value in self.tensors.items() if is_tensor(value)}
        transient = {name for name in self.transient if isinstance(name, str)}
        saved = {name: value for name, value in self.tensors.items() if name not in transient}
        return {name: value for name, value in saved.items() if value is not None}

    def saved_children(self) -> dict[str, Any]:
        """Name → module."""
        if self.is_script:
            return {name: value for name, value in self.children.items() if _is_script(value)}
        return {name: value for name, value in self.children.items() if value is not None}


def _module(value: Any) -> _Module:
    if _is_script(value):  # its attributes are tensors, modules and settings, in one dict
        return _Module(value.state, value.state, (), is_script=True)
    state = _module_state(value)
    if state is None:
        raise TrajectoryError("holds a network with a part that is no module: leave it out.")
    tensors = state["_parameters"] | (state.get("_buffers") or {})
    transient = state.get("_non_persistent_buffers_set") or ()
    return _Module(tensors, state["_modules"], transient, is_script=False)


def _is_script(value: Any) -> bool:
    if not isinstance(value, Record) or not value.name.startswith("__torch__."):
        return False
    return isinstance(value.state, dict)


def _module_state(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of a pickled ``torch.nn.Module``."""
    if not isinstance(value, Record):
        return None
    state = value.state
    if value.name == _PERSISTENT and value.args and isinstance(value.args[0], dict):
        state = value.args[0].get("state")
    if not isinstance(state, dict):
        return None
    has_parts = isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict)
    return state if has_parts else None


class _PlainCopy:
    """Copies values without any record in them, up to a number of values in all."""

    def __init__(self) -> None:
        self._values_left = _MAX_ARGUMENTS

    def of(self, value: Any, place: str) -> Any:
        """A copy of ``value``; ``place`` names it in messages."""
        self._values_left -= 1
        if self._values_left < 0 or place.count(".") > _MAX_DEPTH:
            raise TrajectoryError("holds a network with too many arguments: leave it out.")
        if isinstance(value, Record) and value.name.endswith(".EasyDict") and not value.args:
            value = value.items or {}
        if isinstance(value, dict) and not any(isinstance(name, Record) for name in value):
            return {name: self.of(part, f"{place}.{shown(name)}") for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(part, f"{place}.{index}") for index, part in enumerate(value))
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise TrajectoryError(f"{place} is {kind(value)}, not plain data: build the network by its own settings.")
