"""Networks that were pickled whole: their weights, and the arguments that NVlabs' networks were made with.

Such a network is a tree of records, which were never made into modules: those of ``torch.save(model)``; those of
NVlabs' ``torch_utils.persistence`` (EDM, EDM2, StyleGAN), a call with the source code of the class and the network's
``__dict__``; and those of ``torch.jit.save``. Their weights are named as ``state_dict()`` would name them, and in its
order.
"""

from __future__ import annotations

from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.copying import PlainCopier
from lcsc_opt.checkpoints.pickles import Record, shown
from lcsc_opt.checkpoints.torch_files import is_tensor

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MAX_PARTS = 100_000  # modules and tensors of a network
_MAX_NAME_LENGTH = 1_000  # of a tensor, with its modules' names


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
    parts_left = _MAX_PARTS  # which ends, too, where modules contain themselves
    while pending:
        prefix, value = pending.pop()
        part_count, tensors, modules = _saved_parts(value)
        parts_left -= 1 + part_count
        if parts_left < 0:
            raise TrajectoryError("holds networks in one another, or too many: save model.state_dict().")
        for name in (*tensors, *modules):
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME_LENGTH:
                raise TrajectoryError(f"holds a network whose parts have impossible names ({shown(name)}).")
        weights |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        children = [(f"{prefix}{name}.", module) for name, module in modules.items()]
        pending += reversed(children)  # the last one is popped first
    return weights


def init_arguments_of(network: Any) -> dict[str, Any] | None:
    """``class_name``, ``init_args`` and ``init_kwargs`` of a network of NVlabs' code; ``None`` if it is none.

    Raises:
        TrajectoryError: an argument is not plain data, or they are too deep.
    """
    state = _module_state(network)
    if state is None or network.name != _PERSISTENT:
        return None
    arguments = {
        "class_name": network.args[0].get("class_name"),
        "init_args": list(state.get("_init_args") or ()),
        "init_kwargs": state.get("_init_kwargs") or {},
    }
    copier = PlainCopier({})
    copied: dict[str, Any] = copier.copy(arguments, "")
    if copier.left_out:
        raise TrajectoryError(f"{copier.left_out[0]} is not plain data: build the network by its own settings.")
    return copied


def _saved_parts(value: Any) -> tuple[int, dict[Any, Any], dict[Any, Any]]:
    """How many entries one module has in all, its tensors and its submodules by name: those that are saved.

    The number limits the work for a hostile file, in which many networks may share the same entries.
    """
    if _is_script(value):  # its attributes are tensors, modules and settings, in one dict
        attributes = value.state
        tensors = {name: part for name, part in attributes.items() if is_tensor(part)}
        return len(attributes), tensors, {name: part for name, part in attributes.items() if _is_script(part)}
    state = _module_state(value)
    if state is None:
        raise TrajectoryError("holds a network with a part that is no module: leave it out.")
    transient = state.get("_non_persistent_buffers_set") or ()
    tensors = state["_parameters"] | (state.get("_buffers") or {})
    modules = state["_modules"]
    count = len(transient) + len(tensors) + len(modules)
    not_saved = {name for name in transient if isinstance(name, str)}
    # ``None`` stands for what a module may have and lacks, such as a bias
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None and name not in not_saved}
    return count, tensors, {name: module for name, module in modules.items() if module is not None}


def _is_script(value: Any) -> bool:
    """Whether this is a module of TorchScript, whose pickle names a class under ``__torch__``."""
    if not isinstance(value, Record) or not value.name.startswith("__torch__."):
        return False
    return isinstance(value.state, dict)


def _module_state(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of a pickled ``torch.nn.Module``; ``None`` for anything else."""
    if not isinstance(value, Record):
        return None
    state = value.state
    if value.name == _PERSISTENT and value.args and isinstance(value.args[0], dict):
        state = value.args[0].get("state")
    if not isinstance(state, dict):
        return None
    has_parts = isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict)
    if not has_parts:
        return None
    return state
