"""What lies in a file: every container of tensors, which of them is the model, and which are averages of it.

The role of a container follows from the words of its key and from the names of its tensors. What is read, what a user
is asked, what a notice mentions, and what an export replaces, is decided here and nowhere else.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.modules import is_module, module_weights
from lcsc_opt.checkpoints.pickles import Record, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, is_tensor, kind, other_tensor

CHOOSE = "key: NAME in a study file, --key NAME in commands"
GUESSED_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "unet", "module")
_SHADOW = "shadow_params"  # a list of averages without names
_AVERAGE = re.compile(r"(.*_)?ema([-_.0-9].*)?", re.IGNORECASE)
_OTHER_AVERAGE = re.compile(r"(.*_)?(swa|avg|average|averaged|polyak)([-_.0-9].*)?", re.IGNORECASE)
_STATES = re.compile(r"(.*_)?(opt|optim|optimizers?|.*sched.*|scaler|rng|random|loss|criterion)(_.*)?", re.IGNORECASE)
_COMPANIONS = ("model_ema2", "current_model_state")  # which their trainers do not sample with
_WHY_NO_AVERAGE = " (of other names than the model, so no average of it)"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile, FSDP
_SETTINGS = ("decay", "num_updates")  # of LitEma, among its averages
_MAX_PARTS = 1000  # that are looked at
_MAX_SAMPLED = 10_000  # entries of a dict among which a tensor is searched
_MAX_LISTED = 8  # keys in a message
_MAX_PREFIX = 2_000  # characters


class Role(enum.Enum):
    """What a container of tensors is."""

    WEIGHTS = "weights"
    AVERAGE = "an average of the weights"
    OTHER = "another network, or other tensors"  # states of optimizers and the like are not looked at


class _Place(NamedTuple):
    """Where a trainer or a module keeps an average and the raw weights, and by which names this is known."""

    signs: tuple[str, ...]
    average: str
    raw: str


_SWAPS = (  # keys of trainers that save their average as the model
    _Place(("current_model_state",), "state_dict", "current_model_state"),  # Lightning's WeightAveraging
    _Place(("message_hub",), "state_dict", "ema_state_dict"),  # mmengine's EMAHook
)
_SPLITS = (  # prefixes of modules that have both in one state dict
    _Place(("model_ema.num_updates",), "model_ema", "model"),  # CompVis' LitEma
    _Place(("ema_model.", "initted"), "ema_model", "online_model"),  # ema-pytorch
    _Place(("ema_model.", "online_model."), "ema_model", "online_model"),
    _Place(("n_averaged", "module."), "module", "online_model"),  # torch.optim.swa_utils.AveragedModel
)


@dataclasses.dataclass(eq=False)
class Container:
    """A state dict in a file, or what looks like one.

    Attributes:
        key: what reads it.
        tensors: name → tensor or reference; of averages in a list, number → tensor until their names are found.
        role: what it is.
        average_of: the key of the weights that it is an average of, if it is one.
        is_prefix: whether it is a part of a state dict, by the beginning of its names.
        is_module: whether it is a network that was pickled whole.
        is_shadow: whether it is a list that is an average in any case, of torch-ema.
    """

    key: str
    tensors: Mapping[Any, Any]
    role: Role = Role.OTHER
    average_of: str | None = None
    is_prefix: bool = False
    is_module: bool = False
    is_shadow: bool = False

    @property
    def outer(self) -> int:
        """How many parts of the file it is in whose names do not say what they hold."""
        parts = self.key.split(".")
        return next((place for place, part in enumerate(parts) if word_of(part) is not None), len(parts) - 1)

    @property
    def is_companion(self) -> bool:
        """Whether its trainer samples with something else, and it is read only if somebody asks for it."""
        name = self.key.rpartition(".")[2]
        return name in _COMPANIONS or _OTHER_AVERAGE.fullmatch(name) is not None

    @property
    def has_no_names(self) -> bool:
        """Whether it is a list."""
        return 0 in self.tensors

    @property
    def is_offered(self) -> bool:
        """Whether a user may want it: by its words, or since it lies in no other part of the file."""
        if self.role is not Role.OTHER:
            return True
        has_shapes = any(getattr(value, "shape", None) or other_tensor(value) for value in self.tensors.values())
        return "." not in self.key and has_shapes

    @property
    def is_no_average(self) -> bool:
        """Whether it is called an average and has not the names of a model."""
        return self.role is Role.OTHER and word_of(self.key) is Role.AVERAGE

    @property
    def named(self) -> dict[str, Any]:
        """The tensors with names, without those of wrappers."""
        return unwrapped({name: value for name, value in self.tensors.items() if isinstance(name, str)})


class Inventory:
    """The containers of a file's content, plain data with tensors or references to them."""

    def __init__(self, content: Any) -> None:
        self._content = content
        self._mixed_root: Container | None = None  # a state dict with other things in it
        self.containers = list(self._found())
        _give_roles(self.containers, entries_of(content) or {})

    def guess(self) -> str:
        """The key of the state dict: of the only average, else of the only weights.

        Raises:
            TrajectoryError: there is none, or several of which none is the only average.
        """
        offered = [found for found in self.containers if found.is_offered and not found.is_no_average]
        offered = [found for found in offered if found.outer == min(each.outer for each in offered)]
        usual = [found for found in offered if not found.is_companion] or offered
        averages = [found for found in usual if found.role is Role.AVERAGE]
        chosen = averages or usual
        if self._mixed_root is not None and not averages:  # what has no usual name lies beside other tensors
            chosen = [found for found in usual if found.role is Role.WEIGHTS] or [self._mixed_root]
        if len(chosen) > 1:
            names = ", ".join(shown(found.key) for found in chosen[:_MAX_LISTED])
            raise TrajectoryError(f"holds several state dicts ({names}): choose one ({CHOOSE}).")
        if chosen:
            return chosen[0].key
        if not isinstance(self._content, (list, tuple)) and entries_of(self._content) is None:
            raise TrajectoryError(f"holds {kind(self._content)}, not a state dict: save model.state_dict().")
        names = listed(entries_of(self._content) or {}) or "nothing"
        raise TrajectoryError(f"holds no state dict in a usual place: choose one ({CHOOSE}); it has {names}.")

    def at(self, key: str) -> Container | None:
        """The container under a key, if it is one of the inventory."""
        return next((found for found in self.containers if found.key == key), None)

    def others(self, key: str) -> list[str]:
        """What a user may want, too, with the state dict under ``key``: keys, and why one was not taken."""
        place = key.partition(".")[0]
        others = [found for found in self.containers if found.is_offered and found.key.partition(".")[0] != place]
        if not key:  # the whole file was read
            return []
        others = [found for found in others if word_of(found.key) or not found.is_module]
        return [_mentioned(found) for found in others[:_MAX_LISTED]]

    def raw_of(self, average: str) -> str | None:
        """The key of the raw weights that an average belongs to, if they are searched unless somebody chooses."""
        found = self.at(average)
        raw = None if found is None or found.average_of is None else self.at(found.average_of)
        is_searched = raw is not None and not raw.is_prefix and not any(raw.key == swap.raw for swap in _SWAPS)
        return raw.key if raw is not None and is_searched else None

    def average_of(self, key: str) -> str | None:
        """The key of the average of the weights under ``key`` that their trainer samples with; ``None`` for several."""
        averages = [found.key for found in self.containers if found.average_of == key and not found.is_companion]
        return averages[0] if len(averages) == 1 and is_average(averages[0]) else None

    def named(self, average: Container) -> dict[str, Any]:
        """The tensors of an average, under the names of the weights that it belongs to.

        Raises:
            TrajectoryError: it is a list, and does not fit them in one way.
        """
        usual = (found.key for found in self.containers if found.role is Role.WEIGHTS)
        raw = self.at(next(usual, "") if average.average_of is None else average.average_of)
        model = {} if raw is None else raw.named
        if average.has_no_names:
            return named_averages([*average.tensors.values()], model)
        names = counterparts(average.named, model) or {}
        return {names.get(name, name): tensor for name, tensor in average.named.items()}

    def family(self, key: str) -> list[Container]:
        """The weights that ``key`` belongs to, their averages, and other names of the same tensors."""
        chosen = self.at(key)
        if chosen is None:
            return []
        raw = chosen if chosen.average_of is None else self.at(chosen.average_of) or chosen
        memory = _memory(raw)
        return [
            found
            for found in self.containers
            if found in (chosen, raw) or found.average_of == raw.key or (memory and _memory(found) == memory)
        ]

    def _found(self) -> Iterator[Container]:
        """The containers of a file, the outer ones first; the state of an optimizer is not looked into."""
        pending: collections.deque[tuple[str, Any]] = collections.deque([("", self._content)])
        seen: set[int] = set()
        for _ in range(_MAX_PARTS):
            if not pending:
                return
            key, value = pending.popleft()
            entries: Mapping[Any, Any] = entries_of(value) or {}
            whole = _whole(key, value, entries)
            if whole is not None:
                yield from _split(whole)
            if whole is not None or id(value) in seen:
                continue
            seen.add(id(value))  # a part may contain itself
            if any(is_any_tensor(entry) and getattr(entry, "shape", True) for entry in _sample(entries)):
                mixed = Container(key, entries)
                if key:
                    yield mixed
                else:
                    self._mixed_root = mixed
            for name, entry in itertools.islice(entries.items(), _MAX_SAMPLED):
                is_part = isinstance(name, str) and isinstance(entry, (dict, list, tuple, Record))
                if is_part and not _is_state(name, entry):
                    pending.append((f"{key}.{name}".lstrip("."), entry))


def _mentioned(container: Container) -> str:
    """The key of a container that was not taken, and why where its name promises something else."""
    if container.is_no_average:
        return container.key + _WHY_NO_AVERAGE
    return container.key


def is_average(key: str) -> bool:
    """Whether a key is that of a running average: ``ema``, ``ema_model``, ``unet_ema``, ``state_dict_ema``."""
    return any(_AVERAGE.fullmatch(part) for part in key.split("."))


def word_of(key: str) -> Role | None:
    """What the words of a key say that it holds; ``None`` if they say nothing."""
    parts = key.split(".")
    if any(_AVERAGE.fullmatch(part) or _OTHER_AVERAGE.fullmatch(part) for part in parts) or parts[-1] == _SHADOW:
        return Role.AVERAGE
    return Role.WEIGHTS if any(part in GUESSED_KEYS for part in parts) else None


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Without the names of the wrappers of ``torch.compile`` and FSDP, which no network has of its own."""
    bare = dict(tensors)
    for wrapper in _WRAPPERS:
        bare = {name.replace(wrapper, ""): tensor for name, tensor in bare.items()}
    return bare if len(bare) == len(tensors) else dict(tensors)


def counterparts(names: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str] | None:
    """Each of ``names`` → its name among ``others``, of the same shape; ``None`` if one has none.

    The names are the same, or all of either have one more prefix, or lack their dots, as in CompVis' LitEma.
    """
    first = next((name for name in names if isinstance(name, str)), None)
    if first is None:
        return None
    for rename in _renamings(first, others):
        found = {name: rename(name) for name in names if isinstance(name, str)}
        if all(_same_shape(names[name], others.get(other)) for name, other in found.items()):
            return found
    return None


def _renamings(first: str, others: Mapping[str, Any]) -> Iterator[Callable[[str], str]]:
    """What may turn the names of one state dict, of which ``first`` is one, into those of another."""
    prefixes = [name.removesuffix(first) for name in others if isinstance(name, str) and name.endswith(first)]
    whole_words = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    for prefix in sorted(whole_words, key=len)[:_MAX_LISTED]:
        yield functools.partial(_with_prefix, prefix)
    words = first.split(".")
    for count in range(1, len(words)):
        prefix = ".".join(words[:count]) + "."
        if first.removeprefix(prefix) in others:
            yield functools.partial(_without_prefix, prefix)
    without_dots = {name.replace(".", ""): name for name in others if isinstance(name, str)}
    yield lambda name: without_dots.get(name, name)


def _with_prefix(prefix: str, name: str) -> str:
    return prefix + name


def _without_prefix(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _same_shape(value: Any, other: Any) -> bool:
    shape = getattr(value, "shape", None)
    return shape is not None and other is not None and tuple(shape) == tuple(getattr(other, "shape", (-1,)))


def named_averages(averages: Sequence[Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Name → average, of a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` save it.

    It is matched with the model's state dict, in order and by shape: the list has one tensor for each of
    ``model.parameters()``, the state dict has buffers in between.

    Raises:
        TrajectoryError: there is no way to match them, or more than one.
    """
    names = [
        name for name in model if name.rpartition(".")[2] not in _STATISTICS and model[name].dtype.is_floating_point
    ]
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


def flattened(parts: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of nested dicts, their names joined by dots; empty if there is anything else in them."""
    tensors: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", parts)]
    while pending:
        prefix, part = pending.pop()
        entries = entries_of(part)
        if entries is None or len(prefix) > _MAX_PREFIX or len(tensors) + len(pending) > _MAX_SAMPLED:
            return {}
        for name, value in entries.items():
            if is_any_tensor(value):
                tensors[f"{prefix}{name}"] = value
            else:
                pending.append((f"{prefix}{name}.", value))
    return tensors


def of_pseudo_optimizer(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The averages in the state of torchtitan's ``EMA``, an optimizer in form; empty for anything else."""
    averages: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(name, str) and name.startswith("state.") and name.endswith(".ema_params"):
            averages[name.removeprefix("state.").removesuffix(".ema_params")] = value
    return averages


def entries_of(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict, or of an object like one."""
    if isinstance(value, Record):
        value = value.items
    return value if isinstance(value, Mapping) else None


def is_any_tensor(value: Any) -> bool:
    """Whether it is a tensor, also one that cannot be read."""
    return is_tensor(value) or bool(other_tensor(value))


def listed(parts: Mapping[Any, Any]) -> str:
    """The first names of parts, for a message."""
    return ", ".join(shown(name) for name in list(parts)[:_MAX_LISTED])


def _sample(entries: Mapping[Any, Any]) -> Iterator[Any]:
    return itertools.islice(entries.values(), _MAX_SAMPLED)


def _is_state(name: str, value: Any) -> bool:
    is_pseudo_optimizer = bool(of_pseudo_optimizer(entries_of(value) or {}))
    return _STATES.fullmatch(name) is not None and name not in GUESSED_KEYS and not is_pseudo_optimizer


def _whole(key: str, value: Any, entries: Mapping[Any, Any]) -> Container | None:
    """A part of a file that is one state dict; ``None`` if its own parts have to be looked at."""
    if is_module(value):
        weights: Mapping[Any, Any] = {}
        with contextlib.suppress(TrajectoryError):  # which comes if it is read
            weights = module_weights(value)
        return Container(key, weights, is_module=True)
    is_average = word_of(key) is Role.AVERAGE
    if isinstance(value, (list, tuple)):
        is_list = is_average and bool(value) and all(map(is_tensor, value[:_MAX_SAMPLED]))
        return Container(key, dict(enumerate(value))) if is_list else None
    averages = entries.get(_SHADOW)
    if isinstance(averages, list) and averages and is_tensor(averages[0]):
        return Container(key, dict(enumerate(averages)), is_shadow=True)
    tensors: Mapping[Any, Any] = of_pseudo_optimizer(entries)
    if not tensors and entries and all(map(is_any_tensor, entries.values())):
        tensors = entries
    elif not tensors and word_of(key) is not None and _is_in_parts(entries):
        tensors = flattened(entries)
    return Container(key, tensors) if tensors else None


def _is_in_parts(entries: Mapping[Any, Any]) -> bool:
    """Whether these are nested dicts of nothing but tensors, as Megatron saves a model: no further choice."""
    settings = [name for name, value in entries.items() if is_any_tensor(value) and not getattr(value, "shape", True)]
    if settings and len(entries) == len(settings) + 1:  # {"decay": …, "shadow": {…}}
        return False
    if len(entries) == 1:  # which may be the state dict, under a name of its own
        entries = entries_of(next(iter(entries.values()))) or {}
    has_parts = not all(map(is_any_tensor, entries.values()))
    return (
        has_parts and not any(word_of(name) for name in entries if isinstance(name, str)) and bool(flattened(entries))
    )


def _split(whole: Container) -> Iterator[Container]:
    """A state dict; or the average in it, and the model beside."""
    names = [name for name in whole.tensors if isinstance(name, str)]
    for split in _SPLITS:
        if all(any(name.startswith(sign) for name in names) for sign in split.signs):
            for part in (split.average, split.raw):
                prefix = f"{part}."
                inner = {name.removeprefix(prefix): whole.tensors[name] for name in names if name.startswith(prefix)}
                inner = {name: tensor for name, tensor in inner.items() if name not in _SETTINGS}
                if inner:
                    yield Container(f"{whole.key}.{part}".lstrip("."), inner, is_prefix=True)
            return
    yield whole


def _give_roles(containers: Sequence[Container], entries: Mapping[Any, Any]) -> None:
    """By the words of keys; an average must have the names of a model, and belongs to the nearest that has them."""
    swaps = [swap for swap in _SWAPS if swap.signs[0] in entries]
    for found in containers:
        word = word_of(found.key)
        if any(found.key == swap.average for swap in swaps):
            word = Role.AVERAGE
        elif found.key.endswith("online_model") or any(found.key == swap.raw for swap in swaps) or not found.key:
            word = Role.WEIGHTS
        found.role = word or Role.OTHER
    raws = [found for found in containers if found.role is not Role.AVERAGE and found.tensors]
    for average in containers:
        if average.role is Role.AVERAGE:
            _belongs_to(average, raws)


def _belongs_to(average: Container, raws: Sequence[Container]) -> None:
    """Find the weights that an average has the names of: first those with its own name but for the word."""
    stem = re.sub(r"_?(ema|swa)_?", "", average.key)
    ordered = sorted(raws, key=lambda raw: (raw.key != stem, raw.role is not Role.WEIGHTS, raw.outer, raw.is_prefix))
    for raw in ordered:
        named: Mapping[str, Any] = average.named
        if average.has_no_names:
            try:
                named = named_averages([*average.tensors.values()], raw.named)
            except (TrajectoryError, AttributeError):  # of another model, or that is not one
                continue
        if counterparts(named, raw.named) is not None:
            average.tensors = named
            average.average_of = raw.key
            return
    if any(raw.is_offered for raw in raws) and not average.is_shadow:
        average.role = Role.OTHER


def _memory(container: Container) -> tuple[int, int, int] | None:
    """Where in the file its first tensor is, which tells two names of one model."""
    for tensor in container.tensors.values():
        if isinstance(tensor, TensorRef) and tensor.shape and tensor.storage is not None:
            return tensor.storage.start, tensor.offset, tensor.storage.size
    return None
