"""Finding a state dict in what a file holds: guessed, or by a key such as ``ema`` or ``state_dict.model``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from lcsc_opt.checkpoints.averages import name_averages
from lcsc_opt.checkpoints.contents import Record, Refused, is_tensor, kind, shown
from lcsc_opt.checkpoints.nvlabs import is_module, is_network, network_weights

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
MOST_WRAPPERS = 8
WRAPPERS = ("module.", "_orig_mod.")  # put by DataParallel and by torch.compile
STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step")
DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
SHADOW = "shadow_params"
DEEPEST = 4
GLANCE = 10_000  # entries of a dict among which a tensor is looked for


def parts_of(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network; else ``None``."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    if isinstance(value, Record):
        if is_network(value):
            return network_weights(value)
        return value.items
    return None


def named_content(content: Any) -> Any:
    """``content``, with names where DDIM's code has saved a list."""
    if not isinstance(content, list) or len(content) not in (4, 5):
        return content
    optimizer = _entries(content[1]) or {}
    if "param_groups" not in optimizer or not is_weights(content[0]):
        return content
    return dict(zip(DDIM_LIST, content, strict=False))


def guess_key(content: Any) -> str | None:
    """The key of the state dict: ``""`` when all entries are tensors, else the first usual key that has tensors."""
    return _guessed(content, 0, {})


def _guessed(content: Any, depth: int, seen: dict[int, int]) -> str | None:
    """``seen``: the least depth at which each part was looked at, so that shared parts cost nothing again."""
    if is_module(content):
        return ""
    parts = _entries(content)
    if depth > DEEPEST or not parts:
        return None
    seen[id(content)] = depth
    if all(map(is_tensor, parts.values())):
        return _averaged_prefix(parts)
    for key in GUESSED_KEYS:
        inner = parts.get(key)
        if seen.get(id(inner), DEEPEST + 2) <= depth + 1:
            continue
        seen[id(inner)] = depth + 1
        if is_weights(inner):
            return _joined(key, _averaged_prefix(_entries(inner) or {}))
        if not is_module(inner) and (deeper := _guessed(inner, depth + 1, seen)) is not None:
            return _joined(key, deeper)
    if is_weights(content):
        return _averaged_prefix(parts)
    return next((key for key in GUESSED_KEYS if is_module(parts.get(key))), None)  # refused later, with the reason


def other_keys(content: Any, taken: str) -> list[str]:
    """The keys of state dicts beside the one that was taken, for a message; NVlabs' losses are left out."""
    first = taken.split(".", 1)[0]
    parts = itertools.islice((_entries(content) or {}).items(), 100)
    return [
        name
        for name, value in parts
        if isinstance(name, str)
        and name != first
        and is_weights(value)
        and (name in GUESSED_KEYS or not is_module(value))
    ][:8]


def is_weights(value: Any) -> bool:
    """Whether ``value`` is a network, a dict with tensors in it, or a saved list of averages."""
    if is_network(value):
        return True
    entries = _entries(value) or {}
    return any(map(is_tensor, itertools.islice(entries.values(), GLANCE))) or _is_list_of_averages(entries)


def look_up(content: Any, key: str) -> Mapping[Any, Any]:
    """The state dict under ``key``: names of parts joined by dots, which the start of the tensors' names may follow.

    Raises:
        Refused: there is nothing under that key, or no state dict.
    """
    root, rest = content, key
    while rest:
        parts = parts_of(content)
        if parts is None:
            raise Refused(f"has no key {shown(key)!r}: {shown(rest)!r} is sought in {kind(content)}.")
        name = _first_part(parts, rest)
        if name is None:
            return _under_prefix(parts, rest, key)
        content, rest = parts[name], rest[len(name) + 1 :]
    if is_module(content) and not is_network(content):
        raise Refused(f"holds a whole module ({kind(content)}), not its weights: save model.state_dict().")
    found = parts_of(content)
    if found is None or isinstance(content, (list, tuple)):
        where = f"has {kind(content)} under {shown(key)!r}" if key else f"holds {kind(content)}"
        raise Refused(f"{where}, not a state dict: save model.state_dict(), or pass another --key.")
    if _is_list_of_averages(found):
        return name_averages(found[SHADOW], _named_model(root))
    return found


def inner_step(content: Any) -> int | None:
    """The training step that a file holds beside the weights."""
    entries = _entries(content) or {}
    for name in STEP_KEYS:
        value = entries.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
            return value
    return None


def wrapper_prefix(names: list[str]) -> str:
    """The prefixes of ``DataParallel`` and ``torch.compile`` that every name carries."""
    prefix = ""
    for _ in range(MOST_WRAPPERS):
        prefix += next((w for w in WRAPPERS if names and all(n.startswith(prefix + w) for n in names)), "")
    return prefix


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """What a dict holds, or an object like one."""
    value = value.items if isinstance(value, Record) else value
    return value if isinstance(value, Mapping) else None


def _first_part(parts: Mapping[Any, Any], key: str) -> str | None:
    """The longest name in ``parts`` that ``key`` starts with: names may have dots in them, as ``ema_0.9999``."""
    pieces = key.split(".")
    candidates = (".".join(pieces[:count]) for count in range(min(len(pieces), 32), 0, -1))
    return next((name for name in candidates if name in parts), None)


def _under_prefix(parts: Mapping[Any, Any], prefix: str, key: str) -> dict[Any, Any]:
    found = {
        name[len(prefix) + 1 :]: value
        for name, value in parts.items()
        if isinstance(name, str) and name.startswith(f"{prefix}.")
    }
    if not found:
        there = ", ".join(shown(name) for name in list(parts)[:8])
        raise Refused(
            f"has no key {shown(key)!r}: {shown(prefix)!r} is not among {there}; pass another, or leave out --key."
        )
    if prefix == "model_ema" and "num_updates" in found:
        return _named_like_model(found, parts)
    return found


def _named_like_model(averages: dict[Any, Any], parts: Mapping[Any, Any]) -> dict[Any, Any]:
    """Restore the model's names in CompVis' ``LitEma``, which leaves the dots out of them."""
    names = {
        name[6:].replace(".", ""): name[6:] for name in parts if isinstance(name, str) and name.startswith("model.")
    }
    return {names.get(name, name): value for name, value in averages.items() if name not in ("decay", "num_updates")}


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


def _named_model(root: Any) -> Mapping[str, Any]:
    """The model's state dict, whose names an average without names gets."""
    parts = _entries(root) or {}
    for key in GUESSED_KEYS:
        model = _entries(parts.get(key))
        if model and all(isinstance(name, str) and is_tensor(value) for name, value in model.items()):
            return {str(name): value for name, value in model.items()}
    return {}


def _is_list_of_averages(parts: Mapping[Any, Any]) -> bool:
    averages = parts.get(SHADOW)
    return isinstance(averages, list) and bool(averages) and is_tensor(averages[0])


def _joined(key: str, rest: str) -> str:
    return f"{key}.{rest}" if rest else key
