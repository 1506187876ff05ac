"""Finding a state dict in what a file holds: guessed, or by a key such as ``ema`` or ``state_dict.model``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.modules import is_module, is_network, network_weights
from lcsc_opt.checkpoints.pickles import Record, is_tensor, kind, shown

GUESSED_KEYS = (
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "params",
    "unet",
)
_WRAPPERS = ("module.", "_orig_mod.")  # put by DataParallel and by torch.compile
_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step")
_DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
_SHADOW = "shadow_params"
_DEEPEST = 4
_GLANCE = 10_000  # entries of a dict among which a tensor is looked for
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parts_of(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network; else ``None``."""
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    if isinstance(value, Record) and is_network(value):
        return network_weights(value)
    return _entries(value)


def named_content(content: Any) -> Any:
    """``content``, with names where DDIM's code has saved a list."""
    if not isinstance(content, list) or len(content) not in (4, 5):
        return content
    if "param_groups" not in (_entries(content[1]) or {}) or not _is_weights(content[0]):
        return content
    return dict(zip(_DDIM_LIST, content, strict=False))


def guess_key(content: Any) -> str | None:
    """The key of the state dict: ``""`` when all entries are tensors, else the first usual key that has tensors."""
    return _guessed(content, 0, {})


def _guessed(content: Any, depth: int, seen: dict[int, int]) -> str | None:
    """``seen``: the least depth at which each part was looked at, so that shared parts cost nothing again."""
    if is_module(content):
        return ""
    parts = _entries(content)
    if depth > _DEEPEST or not parts:
        return None
    seen[id(content)] = depth
    if all(map(is_tensor, parts.values())):
        return _averaged_prefix(parts)
    for key in GUESSED_KEYS:
        inner = parts.get(key)
        if seen.get(id(inner), _DEEPEST + 2) <= depth + 1:
            continue
        seen[id(inner)] = depth + 1
        if _is_weights(inner):
            rest: str | None = _averaged_prefix(_entries(inner) or {})
        else:
            rest = None if is_module(inner) else _guessed(inner, depth + 1, seen)
        if rest is not None:
            return f"{key}.{rest}" if rest else key
    if _is_weights(content):
        return _averaged_prefix(parts)
    return next((key for key in GUESSED_KEYS if is_module(parts.get(key))), None)  # refused later, with the reason


def other_keys(content: Any, taken: str) -> list[str]:
    """The keys of other state dicts than the one that was taken, for a message; NVlabs' losses are left out."""
    found = [
        name
        for name, value in itertools.islice((_entries(content) or {}).items(), 100)
        if isinstance(name, str) and _is_weights(value) and (name in GUESSED_KEYS or not is_module(value))
    ]
    return [name for name in found if name != taken.split(".", 1)[0]][:8]


def look_up(content: Any, key: str) -> Mapping[Any, Any]:
    """The state dict under ``key``: names of parts joined by dots, which the start of the tensors' names may follow.

    Raises:
        TrajectoryError: there is nothing under that key, or no state dict.
    """
    root, rest = content, key
    while rest:
        parts = parts_of(content)
        if parts is None:
            raise TrajectoryError(f"has no key {shown(key)!r}: {shown(rest)!r} is sought in {kind(content)}.")
        pieces = rest.split(".")[:32]  # names may have dots in them, as ema_0.9999: the longest is meant
        names = (".".join(pieces[:count]) for count in range(len(pieces), 0, -1))
        name = next((name for name in names if name in parts), None)
        if name is None:
            return _under_prefix(parts, rest, key)
        content, rest = parts[name], rest[len(name) + 1 :]
    if is_module(content) and not is_network(content):
        raise TrajectoryError(f"holds a whole module ({kind(content)}), not its weights: save model.state_dict().")
    found = parts_of(content)
    if found is None or isinstance(content, (list, tuple)):
        where = f"has {kind(content)} under {shown(key)!r}" if key else f"holds {kind(content)}"
        raise TrajectoryError(f"{where}, not a state dict: save model.state_dict(), or pass another --key.")
    return _name_averages(found[_SHADOW], root) if _is_list_of_averages(found) else found


def inner_step(content: Any) -> int | None:
    """The training step that a file holds with the weights."""
    entries = _entries(content) or {}
    values = (entries.get(name) for name in _STEP_KEYS)
    return next((value for value in values if type(value) is int and 0 <= value < 10**18), None)


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of ``DataParallel`` and ``torch.compile`` where every name carries them."""
    prefix = ""
    for _ in range(8):
        prefix += next((w for w in _WRAPPERS if tensors and all(n.startswith(prefix + w) for n in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """What a dict holds, or an object like one."""
    value = value.items if isinstance(value, Record) else value
    return value if isinstance(value, Mapping) else None


def _is_weights(value: Any) -> bool:
    """Whether ``value`` is a network, a dict with tensors in it, or a saved list of averages."""
    entries = _entries(value) or {}
    glance = itertools.islice(entries.values(), _GLANCE)
    return is_network(value) or any(map(is_tensor, glance)) or _is_list_of_averages(entries)


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
    return isinstance(averages, list) and bool(averages) and is_tensor(averages[0])


def _name_averages(averages: Sequence[Any], root: Any) -> dict[str, Any]:
    """Name → average, of a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` save it.

    It is matched with the model's state dict, in order and by shape: the list has one tensor for each of
    ``model.parameters()``, the state dict has buffers in between.

    Raises:
        TrajectoryError: there is no way to match them, or more than one.
    """
    models = (_entries((_entries(root) or {}).get(key)) or {} for key in GUESSED_KEYS)
    model = next((m for m in models if m and all(isinstance(n, str) and is_tensor(v) for n, v in m.items())), {})
    names = [name for name in model if name.rpartition(".")[2] not in _STATISTICS]
    shapes = [tuple(model[name].shape) for name in names]
    wanted = [tuple(tensor.shape) if is_tensor(tensor) else None for tensor in averages]
    first, last = _embedded(wanted, shapes), _embedded(wanted[::-1], shapes[::-1])
    if first is None or last is None or first != [len(names) - 1 - place for place in reversed(last)]:
        raise TrajectoryError(
            f"holds {len(averages)} averages without names, which do not fit the model's {len(model)} in exactly one "
            "way: save a state dict of them, or take the raw weights with --key model."
        )
    return {names[place]: tensor for place, tensor in zip(first, averages, strict=True)}


def _embedded(short: Sequence[Any], long: Sequence[Any]) -> list[int] | None:
    """The earliest places in ``long`` of what is in ``short``, in order; if they are the latest, there is one way."""
    places: list[int] = []
    candidates = iter(range(len(long)))
    for wanted in short:
        place = next((place for place in candidates if long[place] == wanted), None)
        if place is None:
            return None
        places.append(place)
    return places
