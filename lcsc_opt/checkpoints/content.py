"""Finding a state dict in what a file holds: guessed, or by a key such as ``ema`` or ``state_dict.model``.

Networks that were pickled whole are read by :mod:`lcsc_opt.checkpoints.modules`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.modules import init_arguments_of, is_module, module_weights
from lcsc_opt.checkpoints.pickles import Record, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, is_tensor, kind, other_tensor

_AVERAGE = re.compile(r"(.*_)?ema([-_.0-9].*)?", re.IGNORECASE)
GUESSED_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "unet", "module")
# which their trainers do not sample with: of JiT, icefall and Lightning
_COMPANIONS = ("model_ema2", "model_avg", "current_model_state")
_STATES = re.compile(r"(.*_)?(opt|optim|optimizers?|.*sched.*|scaler|rng|random|loss|criterion)(_.*)?", re.IGNORECASE)
CHOOSE = "key: NAME in a study file, --key NAME in commands"
_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step", "batch_idx_train")
_DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
_SHADOW = "shadow_params"  # a list of averages without names
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MAX_GUESSES = 100  # parts that are searched for the state dict
_MAX_SAMPLED = 10_000  # entries of a dict among which a tensor is searched
_MAX_LISTED = 8  # keys in a message
_MAX_KEY_PARTS = 32
_MAX_PREFIX = 2_000  # characters


def is_average(key: str) -> bool:
    """Whether a key is that of a running average: ``ema``, ``ema_model``, ``unet_ema``, ``state_dict_ema``."""
    return any(_AVERAGE.fullmatch(part) for part in key.split("."))


class Content:
    """Everything in a file: plain data, tensors or references to them, and records."""

    def __init__(self, value: Any) -> None:
        if _is_ddim_list(value):
            value = dict(zip(_DDIM_LIST, value, strict=False))
        self._value = value

    @property
    def step(self) -> int | TensorRef | None:
        """The training step that a file holds with the weights; a tensor of one whole number is a reference."""
        entries = _entries(self._value) or {}
        for name in _STEP_KEYS:
            value = entries.get(name)
            if type(value) is int and 0 <= value < 10**18:
                return value
            if isinstance(value, TensorRef) and _is_whole_number(value):
                return value
        return _updates_of_fairseq(entries)

    @property
    def epoch(self) -> int | None:
        """The epoch that a file holds with the weights."""
        value = (_entries(self._value) or {}).get("epoch")
        return value if type(value) is int else None

    @property
    def is_post_hoc_ema(self) -> bool:
        """Whether it is an average of ema-pytorch's PostHocEMA, all of whose entries have the dtype of the weights."""
        entries = _entries(self._value) or {}
        return "initted" in entries and isinstance(entries.get("step"), TensorRef)

    def guess(self) -> str:
        """The key of the state dict: ``""`` when all entries are tensors, else of the only one, or the only average.

        Raises:
            TrajectoryError: there is none, or several of which none is the only average.
        """
        key = _guess_key(self._value, {id(self._value): None})
        if key is not None:
            return key
        parts = _parts(self._value)
        if parts is None:
            raise TrajectoryError(f"holds {kind(self._value)}, not a state dict: save model.state_dict().")
        names = _listed(parts) or "nothing"
        raise TrajectoryError(f"holds no state dict in a usual place: choose one ({CHOOSE}); it has {names}.")

    def other_keys(self, key: str) -> list[str]:
        """The keys of other state dicts than the one under ``key``; NVlabs' losses are left out."""
        if not key:
            return []
        first_part = key.split(".", 1)[0]
        names = []
        for name, value in itertools.islice((_entries(self._value) or {}).items(), _MAX_GUESSES):
            is_candidate = isinstance(name, str) and name != first_part and _is_weights(value)
            if is_candidate and (name in GUESSED_KEYS or not (is_module(value) or _STATES.fullmatch(name))):
                names.append(name)
        return names[:_MAX_LISTED]

    def raw_beside(self, average: str) -> str | None:
        """The key of the only other weights beside an average that are no average; ``None`` without or with several."""
        others = [name for name in self.other_keys(average) if not is_average(name) and name not in _COMPANIONS]
        return others[0] if len(others) == 1 else None

    def state_dict(self, key: str) -> Mapping[Any, Any]:
        """The state dict under ``key``: names of parts joined by dots, which the start of tensors' names may follow.

        Raises:
            TrajectoryError: there is nothing under that key, or no state dict.
        """
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
        if _is_list_of_averages(tensors):
            return _name_averages(tensors[_SHADOW], self._value)
        return _of_pseudo_optimizer(tensors) or _flattened(tensors) or _without_extra_states(tensors)

    def init_arguments(self, key: str) -> dict[str, Any]:
        """``class_name``, ``init_args`` and ``init_kwargs`` of NVlabs' network ``key``, as plain data.

        Raises:
            TrajectoryError: there is no such network, or an argument is something else.
        """
        network = (_entries(self._value) or {}).get(key)
        arguments = init_arguments_of(network)
        if arguments is None:
            raise TrajectoryError(
                f"holds no network of NVlabs' code under {shown(key)!r}: expected network-snapshot-*.pkl."
            )
        return arguments


def _is_ddim_list(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (4, 5):
        return False
    optimizer = _entries(value[1]) or {}
    return "param_groups" in optimizer and _is_weights(value[0])


def _updates_of_fairseq(entries: Mapping[Any, Any]) -> int | None:
    """The number of updates at the end of fairseq's ``optimizer_history``."""
    history = entries.get("optimizer_history")
    if not isinstance(history, list) or not history:
        return None
    updates = (_entries(history[-1]) or {}).get("num_updates")
    return updates if type(updates) is int and 0 <= updates < 10**18 else None


def _is_whole_number(tensor: TensorRef) -> bool:
    return tensor.shape == () and str(tensor.dtype).startswith(("torch.int", "torch.uint"))


def _listed(parts: Mapping[Any, Any]) -> str:
    return ", ".join(shown(name) for name in list(parts)[:_MAX_LISTED])


def _longest_name(key: str, parts: Mapping[Any, Any]) -> str | None:
    """The longest name of a part that ``key`` begins with: names may have dots, as ``ema_0.9999``."""
    words = key.split(".")[:_MAX_KEY_PARTS]
    for count in range(len(words), 0, -1):
        name = ".".join(words[:count])
        if name in parts:
            return name
    return None


def _guess_key(content: Any, seen: dict[int, str | None]) -> str | None:
    """``seen``: what was found in the parts that were searched before, so that shared parts cost nothing again."""
    if is_module(content):
        return ""
    parts = _entries(content)
    if not parts or len(seen) > _MAX_GUESSES:
        return None
    if all(_is_any_tensor(value) for value in parts.values()):
        return _averaged_prefix(parts)
    has_tensors = any(is_tensor(value) and value.shape for value in parts.values())  # beside other things
    found: dict[str, str] = {}
    for name, part in itertools.islice(parts.items(), _MAX_SAMPLED):
        is_usual = name in GUESSED_KEYS or (isinstance(name, str) and _AVERAGE.fullmatch(name) is not None)
        if not is_usual and (has_tensors or not isinstance(name, str) or _STATES.fullmatch(name)):
            continue
        if id(part) not in seen:
            seen[id(part)] = None  # a part may contain itself
            if _is_weights(part):
                seen[id(part)] = _averaged_prefix(_entries(part) or {})
            elif is_usual:
                seen[id(part)] = "" if _is_model_in_parts(part) else _guess_key(part, seen)
        rest = seen[id(part)]
        if rest is not None:
            found[name] = f"{name}.{rest}" if rest else name
    if not found:
        return _averaged_prefix(parts) if _is_weights(content) else None
    return found[_only_one(found, parts)]


def _only_one(found: Mapping[str, str], parts: Mapping[Any, Any]) -> str:
    """The only state dict, or the only average, by the convention of its trainer.

    Raises:
        TrajectoryError: there are several.
    """
    candidates = [name for name in found if name not in _COMPANIONS] or [*found]
    averages = [name for name in candidates if _AVERAGE.fullmatch(name)]
    if "message_hub" in parts and "state_dict" in found:  # of mmengine, whose ema_state_dict has the raw weights
        averages = ["state_dict"]
    chosen = averages or candidates
    if len(chosen) > 1:
        raise TrajectoryError(f"holds several state dicts ({', '.join(map(shown, chosen))}): choose one ({CHOOSE}).")
    return chosen[0]


def _is_model_in_parts(value: Any) -> bool:
    """Whether these are nested dicts of nothing but tensors, as Megatron saves a model: no further choice."""
    entries = _entries(value) or {}
    if len(entries) == 1:  # which may be the state dict, under a name of its own
        entries = _entries(next(iter(entries.values()))) or {}
    has_parts = not all(map(_is_any_tensor, entries.values()))
    return has_parts and entries.keys().isdisjoint(GUESSED_KEYS) and bool(_flattened(entries))


def _flattened(parts: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of nested dicts, their names joined by dots; empty if there is anything else in them."""
    tensors: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", parts)]
    while pending:
        prefix, part = pending.pop()
        entries = _entries(part)
        if entries is None or len(prefix) > _MAX_PREFIX or len(tensors) + len(pending) > _MAX_SAMPLED:
            return {}
        for name, value in entries.items():
            if _is_any_tensor(value):
                tensors[f"{prefix}{name}"] = value
            else:
                pending.append((f"{prefix}{name}.", value))
    return tensors


def _without_extra_states(parts: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Without what modules keep beside their weights (``get_extra_state``), unless that is a tensor."""
    return {name: value for name, value in parts.items() if is_tensor(value) or not str(name).endswith("_extra_state")}


def _is_any_tensor(value: Any) -> bool:
    """Whether it is a tensor, also one that cannot be read."""
    return is_tensor(value) or bool(other_tensor(value))


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict, or of an object like one."""
    if isinstance(value, Record):
        value = value.items
    return value if isinstance(value, Mapping) else None


def _parts(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network."""
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    if is_module(value):
        return module_weights(value)
    return _entries(value)


def _is_weights(value: Any) -> bool:
    """Whether ``value`` is a network, a dict with tensors in it, or a saved list of averages."""
    if is_module(value):
        return True
    entries = _entries(value) or {}
    sample = itertools.islice(entries.values(), _MAX_SAMPLED)
    return any(_is_any_tensor(entry) for entry in sample) or _is_list_of_averages(entries)


def _under_prefix(parts: Mapping[Any, Any], prefix: str, key: str) -> dict[Any, Any]:
    """The entries whose names begin with ``prefix`` and a dot, without them; ``key`` is for the message."""
    tensors = {name.removeprefix(f"{prefix}."): parts[name] for name in _names_under(prefix, parts)}
    if not tensors:
        raise TrajectoryError(
            f"has no key {shown(key)!r}: {shown(prefix)!r} is not among {_listed(parts)}; pass another, or leave out "
            "--key."
        )
    if prefix == "model_ema" and "num_updates" in tensors:
        return _with_dots_of_litema(tensors, parts)
    return tensors


def _names_under(prefix: str, parts: Mapping[Any, Any]) -> Iterator[str]:
    return (name for name in parts if isinstance(name, str) and name.startswith(f"{prefix}."))


def _with_dots_of_litema(averages: Mapping[str, Any], parts: Mapping[Any, Any]) -> dict[str, Any]:
    """CompVis' LitEma leaves the dots out of the names of its averages: those of the model next to it are used."""
    names = {}
    for name in _names_under("model", parts):
        dotted = name.removeprefix("model.")
        names[dotted.replace(".", "")] = dotted
    tensors = {names.get(name, name): value for name, value in averages.items()}
    del tensors["num_updates"]
    tensors.pop("decay", None)
    return tensors


def _averaged_prefix(names: Mapping[Any, Any]) -> str:
    """The prefix of the names under which a wrapper keeps its average; ``""`` for an ordinary state dict."""
    if "model_ema.num_updates" in names:  # CompVis' LitEma
        return "model_ema"
    texts = [name for name in names if isinstance(name, str)]
    if any(name.startswith("ema_model.") for name in texts):
        is_ema_pytorch = "initted" in names or any(name.startswith("online_model.") for name in texts)
        if is_ema_pytorch:
            return "ema_model"
    if "n_averaged" in names and all(name == "n_averaged" or name.startswith("module.") for name in texts):
        return "module"  # torch.optim.swa_utils.AveragedModel
    return ""


def _of_pseudo_optimizer(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The averages in the state of torchtitan's ``EMA``, an optimizer in form; empty for anything else."""
    averages: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(name, str) and name.startswith("state.") and name.endswith(".ema_params"):
            averages[name.removeprefix("state.").removesuffix(".ema_params")] = value
    return averages


def _is_list_of_averages(parts: Mapping[Any, Any]) -> bool:
    averages = parts.get(_SHADOW)
    return isinstance(averages, list) and bool(averages) and is_tensor(averages[0])


def _name_averages(averages: Sequence[Any], root: Any) -> dict[str, Any]:
    """Name → average, of a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` save it.

    It is matched with the model's state dict, in order and by shape: the list has one tensor for each of
    ``model.parameters()``, the state dict has buffers in between.

    Raises:
        TrajectoryError: there is no way to match them, or more than one.
    """
    model = _raw_model(root)
    names = [name for name in model if name.rpartition(".")[2] not in _STATISTICS]
    shapes = [tuple(model[name].shape) for name in names]
    averaged_shapes = [tuple(average.shape) if is_tensor(average) else None for average in averages]
    earliest = _earliest_places(averaged_shapes, shapes)
    # the latest places are the earliest ones from behind: where both agree, there is no other way
    places_from_behind = _earliest_places(averaged_shapes[::-1], shapes[::-1])
    latest = None
    if places_from_behind is not None:
        latest = [len(names) - 1 - place for place in reversed(places_from_behind)]
    if earliest is None or earliest != latest:
        raise TrajectoryError(
            f"holds {len(averages)} averages without names, which do not fit the model's {len(model)} in exactly one "
            "way: save a state dict of them, or use the raw weights with --key model."
        )
    return {names[place]: average for place, average in zip(earliest, averages, strict=True)}


def _raw_model(root: Any) -> Mapping[str, Any]:
    """The first state dict under a usual key; empty if there is none."""
    entries = _entries(root) or {}
    for key in GUESSED_KEYS:
        model = _entries(entries.get(key))
        if model and all(isinstance(name, str) and is_tensor(value) for name, value in model.items()):
            return model
    return {}


def _earliest_places(short: Sequence[Any], long: Sequence[Any]) -> list[int] | None:
    """The earliest places in ``long`` of the elements of ``short``, in order; ``None`` where one has no place."""
    places = []
    start = 0
    for element in short:
        try:
            place = long.index(element, start)
        except ValueError:
            return None
        places.append(place)
        start = place + 1
    return places
