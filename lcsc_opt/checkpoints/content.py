"""Finding a state dict in what a file holds: guessed, or by a key such as ``ema`` or ``state_dict.model``.

Networks that were pickled whole are trees of records, which were never made into modules: those of
``torch.save(model)``; those of NVlabs' ``torch_utils.persistence`` (EDM, EDM2, StyleGAN), a call with the source code
of the class and the network's ``__dict__``; and those of ``torch.jit.save``. Their weights are named as
``state_dict()`` would name them, and in its order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import Record
from lcsc_opt.checkpoints.torch_files import TensorRef

_AVERAGES = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model")
_RAW = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "unet")
GUESSED_KEYS = (*_AVERAGES, *_RAW)
_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step")
_DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
_SHADOW = "shadow_params"
_MOST_GUESSES = 100  # parts that are looked at for the state dict
_GLANCE = 10_000  # entries of a dict among which a tensor is looked for
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MOST_PARTS = 100_000  # modules and tensors of a network
_LONGEST_NAME = 1_000  # of a tensor, with its modules' names
_MOST_ARGUMENTS = 10_000
_SHOWN = 80  # characters of a text from a file that a message may repeat


class Content:
    """Everything in a file: plain data, tensors or references to them, and records."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, list) and len(value) in (4, 5) and "param_groups" in (_entries(value[1]) or {}):
            value = dict(zip(_DDIM_LIST, value, strict=False)) if _is_weights(value[0]) else value
        self._value = value

    @property
    def step(self) -> int | None:
        """The training step that a file holds with the weights."""
        entries = _entries(self._value) or {}
        values = (entries.get(name) for name in _STEP_KEYS)
        return next((value for value in values if type(value) is int and 0 <= value < 10**18), None)

    def guess(self) -> str:
        """The key of the state dict: ``""`` when all entries are tensors, else the first usual key that has tensors.

        Raises:
            TrajectoryError: no usual key has any.
        """
        found = _guessed(self._value, {id(self._value)})
        if found is None:
            parts = _parts(self._value)
            if parts is None:
                raise TrajectoryError(f"holds {kind(self._value)}, not a state dict: save model.state_dict().")
            there = ", ".join(shown(name) for name in list(parts)[:8])
            raise TrajectoryError(f"holds no state dict in a usual place: pass --key; it has {there or 'nothing'}.")
        return found

    def others(self, taken: str) -> list[str]:
        """The keys of other state dicts than the one that was taken; NVlabs' losses are left out."""
        found = [
            name
            for name, value in itertools.islice((_entries(self._value) or {}).items(), 100)
            if isinstance(name, str) and _is_weights(value) and (name in GUESSED_KEYS or not _is_module(value))
        ]
        return [name for name in found if name != taken.split(".", 1)[0]][:8] if taken else []

    def state_dict(self, key: str) -> Mapping[Any, Any]:
        """The state dict under ``key``: names of parts joined by dots, which the start of tensors' names may follow.

        Raises:
            TrajectoryError: there is nothing under that key, or no state dict.
        """
        content, rest = self._value, key
        while rest:
            parts = _parts(content)
            if parts is None:
                raise TrajectoryError(f"has no key {shown(key)!r}: {shown(rest)!r} is sought in {kind(content)}.")
            pieces = rest.split(".")[:32]  # names may have dots in them, as ema_0.9999: the longest is meant
            names = (".".join(pieces[:count]) for count in range(len(pieces), 0, -1))
            name = next((name for name in names if name in parts), None)
            if name is None:
                return _under_prefix(parts, rest, key)
            content, rest = parts[name], rest[len(name) + 1 :]
        found = _parts(content)
        if found is None or isinstance(content, (list, tuple)):
            where = f"has {kind(content)} under {shown(key)!r}" if key else f"holds {kind(content)}"
            raise TrajectoryError(f"{where}, not a state dict: save model.state_dict(), or pass another --key.")
        return _name_averages(found[_SHADOW], self._value) if _is_list_of_averages(found) else found

    def init_arguments(self, key: str) -> dict[str, Any]:
        """``class_name``, ``init_args`` and ``init_kwargs`` of NVlabs' network ``key``, as plain data.

        Raises:
            TrajectoryError: there is no such network, or an argument is something else.
        """
        network = (_entries(self._value) or {}).get(key)
        state = _state(network)
        if state is None or network.name != _PERSISTENT:  # type: ignore[union-attr]
            message = f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl."
            raise TrajectoryError(message)
        found = {
            "class_name": network.args[0].get("class_name"),  # type: ignore[union-attr]
            "init_args": list(state.get("_init_args") or ()),
            "init_kwargs": state.get("_init_kwargs") or {},
        }
        left = [_MOST_ARGUMENTS]
        return {name: _plain(value, name, left) for name, value in found.items()}


def shown(text: object) -> str:
    """A text out of a file, made fit for one line of a message."""
    line = str(text.name if isinstance(text, Record) else text)[: _SHOWN + 1]
    line = line.encode("unicode_escape", "replace").decode("ascii")
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, Record):
        return f"a {shown(value.name)}"
    return "a Tensor" if _is_tensor(value) else f"a {type(value).__name__}"


def _is_tensor(value: object) -> bool:
    return isinstance(value, (Tensor, TensorRef))


def _guessed(content: Any, seen: set[int]) -> str | None:
    """``seen``: the parts that were looked at, so that shared parts cost nothing again."""
    if _is_module(content):
        return ""
    parts = _entries(content)
    if not parts or len(seen) > _MOST_GUESSES:
        return None
    if all(map(_is_tensor, parts.values())):
        return _averaged_prefix(parts)
    for key in GUESSED_KEYS:
        inner = parts.get(key)
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        rest = _averaged_prefix(_entries(inner) or {}) if _is_weights(inner) else _guessed(inner, seen)
        if rest is not None:
            return f"{key}.{rest}" if rest else key
    return _averaged_prefix(parts) if _is_weights(content) else None


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """What a dict holds, or an object like one."""
    value = value.items if isinstance(value, Record) else value
    return value if isinstance(value, Mapping) else None


def _parts(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network."""
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    return _module_weights(value) if _is_module(value) else _entries(value)


def _is_weights(value: Any) -> bool:
    """Whether ``value`` is a network, a dict with tensors in it, or a saved list of averages."""
    entries = _entries(value) or {}
    glance = itertools.islice(entries.values(), _GLANCE)
    return _is_module(value) or any(map(_is_tensor, glance)) or _is_list_of_averages(entries)


def _under_prefix(parts: Mapping[Any, Any], prefix: str, key: str) -> dict[Any, Any]:
    texts = [name for name in parts if isinstance(name, str)]
    found = {name[len(prefix) + 1 :]: parts[name] for name in texts if name.startswith(f"{prefix}.")}
    if not found:
        there = ", ".join(shown(name) for name in list(parts)[:8])
        raise TrajectoryError(
            f"has no key {shown(key)!r}: {shown(prefix)!r} is not among {there}; pass another, or leave out --key."
        )
    if prefix == "model_ema" and "num_updates" in found:  # CompVis' LitEma leaves the dots out of the model's names
        names = {name[6:].replace(".", ""): name[6:] for name in texts if name.startswith("model.")}
        own = ("decay", "num_updates")
        return {names.get(name, name): value for name, value in found.items() if name not in own}
    return found


def _averaged_prefix(names: Mapping[Any, Any]) -> str:
    """The prefix of the names under which a wrapper keeps its average; ``""`` for an ordinary state dict."""
    if "model_ema.num_updates" in names:  # CompVis' LitEma
        return "model_ema"
    texts = [name for name in names if isinstance(name, str)]
    if any(n.startswith("ema_model.") for n in texts) and any(
        n.startswith("online_model.") or n == "initted" for n in texts
    ):
        return "ema_model"  # ema-pytorch
    if "n_averaged" in names and all(n == "n_averaged" or n.startswith("module.") for n in texts):
        return "module"  # torch.optim.swa_utils.AveragedModel
    return ""


def _is_list_of_averages(parts: Mapping[Any, Any]) -> bool:
    averages = parts.get(_SHADOW)
    return isinstance(averages, list) and bool(averages) and _is_tensor(averages[0])


def _name_averages(averages: Sequence[Any], root: Any) -> dict[str, Any]:
    """Name → average, of a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` save it.

    It is matched with the model's state dict, in order and by shape: the list has one tensor for each of
    ``model.parameters()``, the state dict has buffers in between.

    Raises:
        TrajectoryError: there is no way to match them, or more than one.
    """
    models = (_entries((_entries(root) or {}).get(key)) or {} for key in GUESSED_KEYS)
    model = next((m for m in models if m and all(isinstance(n, str) and _is_tensor(v) for n, v in m.items())), {})
    names = [name for name in model if name.rpartition(".")[2] not in _STATISTICS]
    shapes = [tuple(model[name].shape) for name in names]
    wanted = [tuple(tensor.shape) if _is_tensor(tensor) else None for tensor in averages]
    first, last = _embedded(wanted, shapes), _embedded(wanted[::-1], shapes[::-1])
    if first is None or last is None or first != [len(names) - 1 - place for place in reversed(last)]:
        raise TrajectoryError(
            f"holds {len(averages)} averages without names, which do not fit the model's {len(model)} in exactly one "
            "way: save a state dict of them, or take the raw weights with --key model."
        )
    return {names[place]: tensor for place, tensor in zip(first, averages, strict=True)}


def _embedded(short: Sequence[Any], long: Sequence[Any]) -> list[int] | None:
    """The earliest places in ``long`` of what is in ``short``, in order; if they are the latest, there is one way."""
    candidates = iter(range(len(long)))
    places = [next((place for place in candidates if long[place] == wanted), None) for wanted in short]
    return None if None in places else places  # type: ignore[return-value]


def _state(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of a pickled ``torch.nn.Module``."""
    if not isinstance(value, Record):
        return None
    meta = value.args[0] if value.name == _PERSISTENT and value.args else None
    state = meta.get("state") if isinstance(meta, dict) else value.state
    dicts = isinstance(state, dict) and all(isinstance(state.get(name), dict) for name in ("_modules", "_parameters"))
    return state if dicts else None


def _is_script(value: Any) -> bool:
    return isinstance(value, Record) and value.name.startswith("__torch__.") and isinstance(value.state, dict)


def _is_module(value: Any) -> bool:
    return _is_script(value) or _state(value) is not None


def _module_weights(root: Any) -> dict[str, Any]:
    """Name → tensor of a network.

    Raises:
        TrajectoryError: modules that contain themselves, or are too many, or a part that is no module.
    """
    weights: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", root)]
    seen = 0
    while pending:
        prefix, module = pending.pop()
        script, state = _is_script(module), _state(module)
        transient: Sequence[Any] = ()
        if script:
            tensors = modules = module.state
        elif state is None:
            raise TrajectoryError("holds a network with a part that is no module: leave it out.")
        else:
            tensors, modules = state["_parameters"] | (state.get("_buffers") or {}), state["_modules"]
            transient = state.get("_non_persistent_buffers_set") or ()
        seen += 1 + len(transient) + len(tensors) + len(modules)
        if seen > _MOST_PARTS:
            raise TrajectoryError("holds networks in one another, or too many: save model.state_dict().")
        for name in (*tensors, *modules):
            if not isinstance(name, str) or len(prefix) + len(name) > _LONGEST_NAME:
                raise TrajectoryError(f"holds a network whose parts have impossible names ({shown(name)}).")
        if script:
            tensors = {name: value for name, value in tensors.items() if _is_tensor(value)}
            modules = {name: value for name, value in modules.items() if _is_script(value)}
        left_out = {name for name in transient if isinstance(name, str)}
        kept = {name: value for name, value in tensors.items() if value is not None and name not in left_out}
        weights |= {f"{prefix}{name}": value for name, value in kept.items()}
        children = [(f"{prefix}{name}.", child) for name, child in modules.items() if child is not None]
        pending += reversed(children)
    return weights


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
