"""What lies in a file: every container of tensors, which of them is the model, and which are averages of it.

The role of a container follows from the words of its key and from the names of its tensors. What is read, what a user
is asked, what a notice mentions, and what an export replaces, is decided here and nowhere else.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.matching import counterparts, named_averages, unwrapped
from lcsc_opt.checkpoints.modules import is_module, module_weights
from lcsc_opt.checkpoints.pickles import Record, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, is_tensor, kind, other_tensor

CHOOSE = "key: NAME in a study file, --key NAME in commands"
GUESSED_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "unet", "module")
_SHADOW = "shadow_params"  # a list of averages without names
COLLECTED = "collected_params"  # beside it: the raw weights, kept while the averages are in the model
_AVERAGE = re.compile(r"(.*[-_])?emas?([-_.0-9].*)?", re.IGNORECASE)
_OTHER_AVERAGE = re.compile(r"(?!exp_avg)(.*_)?(swa|avg|average|averaged|averages|polyak)([-_.0-9].*)?", re.IGNORECASE)
_STATES = re.compile(r"(.*_)?(opt|optim|optimizers?|.*sched.*|scaler|rng|random|loss|criterion)(_.*)?", re.IGNORECASE)
_OF_OPTIMIZER = re.compile(r"ax|(.*_)?ema(_.*)?|slow_(buffer|params?|weights)|averaged?", re.IGNORECASE)
_RATES = re.compile(r"(ema_?)?(decay|rate|beta|momentum)|sigma_rel|std", re.IGNORECASE)  # beside one average
_LISTS_OF_RATES = re.compile(f"({_RATES.pattern})s", re.IGNORECASE)  # beside a list of them
_COMPANIONS = ("model_ema2", "current_model_state")  # which their trainers do not sample with
_ONLY = "0."  # the only module of a list, as imagen-pytorch keeps the averages of its U-Nets
ONLINE_MODEL = "online_model"  # beside the average in a module of ema-pytorch: the model that it averages
STARTED = "initted"  # in such a module: whether it has begun
_SETTINGS = ("decay", "num_updates")  # of LitEma, among its averages
_DDIM_LIST = ("model", "optimizer", "epoch", "step", "ema")  # torch.save([...]) of DDIM's code
_MAX_PARTS = 1000  # that are looked at
_MAX_ELEMENTS = 64  # of a list that are looked into
_MAX_SAMPLED = 10_000  # entries of a dict among which a tensor is searched
_MAX_LISTED = 16  # keys in a message
_MAX_PREFIX = 2_000  # characters
_MAX_KEY_PARTS = 32


class Role(enum.Enum):
    """What a container of tensors is."""

    WEIGHTS = "weights"
    AVERAGE = "an average of the weights"
    OTHER = "another network, or other tensors"  # states of optimizers and the like are not looked at


class _Place(NamedTuple):
    """Where a trainer or a module keeps an average and the raw weights: their keys or prefixes.

    ``signs`` are names that only its files have, all of them.
    """

    signs: tuple[str, ...]
    average: str
    raw: str


_SWAPS = (  # keys of trainers that save their average as the model
    _Place(("current_model_state",), "state_dict", "current_model_state"),  # Lightning's WeightAveraging
    _Place(("message_hub",), "state_dict", "ema_state_dict"),  # mmengine's EMAHook
)
_SPLITS = (  # prefixes of modules that have both in one state dict
    _Place(("model_ema.num_updates",), "model_ema", "model"),  # CompVis' LitEma
    _Place(("ema_model.", STARTED), "ema_model", ONLINE_MODEL),  # ema-pytorch
    _Place(("ema_model.", f"{ONLINE_MODEL}."), "ema_model", ONLINE_MODEL),
    _Place(("n_averaged", "module."), "module", ONLINE_MODEL),  # torch.optim.swa_utils.AveragedModel
)


@dataclasses.dataclass(eq=False)
class Container:
    """A state dict in a file, or what looks like one.

    Attributes:
        key: what reads it.
        tensors: name → tensor or reference; of averages in a list, number → tensor until their names are known.
        role: what it is.
        average_of: the weights that it is an average of, if it is one; then it has their names.
        rate: that of an average, as the file has it: in the key, or as a number beside; empty without one.
        is_prefix: whether it is a part of a state dict, by the beginning of its names.
        is_module: whether it is a network that was pickled whole.
        is_shadow: whether it is the list ``shadow_params`` of torch-ema, an average even where no weights fit it.
        is_collected: whether it is the list beside that, of the raw weights while the averages are in the model.
        is_in_state: whether it lies in the state of an optimizer or the like, where only averages are looked for.
        inside: a container of an average's key whose part this is, if its parts are not averages themselves.
    """

    key: str
    tensors: Mapping[Any, Any]
    role: Role = Role.OTHER
    average_of: Container | None = None
    rate: str = ""
    is_prefix: bool = False
    is_module: bool = False
    is_shadow: bool = False
    is_collected: bool = False
    is_in_state: bool = False
    inside: Container | None = None

    @property
    def depth(self) -> int:
        """How deep in the file it is: the parts of its key before the first whose name says what it holds.

        In ``state.ema.net`` that is 1; without such a name, all parts but the last count.
        """
        parts = self.key.split(".")
        return next((place for place, part in enumerate(parts) if _word_of(part) is not None), len(parts) - 1)

    @property
    def is_companion(self) -> bool:
        """Whether its trainer samples with something else, and it is read only if somebody asks for it."""
        name = self.key.rpartition(".")[2]
        return name in _COMPANIONS or _OTHER_AVERAGE.fullmatch(name) is not None

    @property
    def has_no_names(self) -> bool:
        """Whether it is a list of averages whose names are not known: its keys are numbers."""
        return 0 in self.tensors

    @property
    def is_offered(self) -> bool:
        """Whether a user may want it: by its words, or since it lies in no other part of the file."""
        if self.is_collected:
            return False
        if self.role is not Role.OTHER:
            return True
        has_shapes = any(getattr(value, "shape", None) or other_tensor(value) for value in self.tensors.values())
        return "." not in self.key and has_shapes

    @property
    def is_no_average(self) -> bool:
        """Whether it is called an average and is none: no weights in the file have its names."""
        return self.role is Role.OTHER and _word_of(self.key) is Role.AVERAGE

    @property
    def is_rate(self) -> bool:
        """Whether the last part of its key is a rate, so that others beside it are averages of other rates."""
        return bool(self.rate) and self.key.endswith(f".{self.rate}")

    @property
    def named(self) -> dict[str, Any]:
        """The tensors whose keys are names, without the names of wrappers; empty for a list."""
        return unwrapped({name: value for name, value in self.tensors.items() if isinstance(name, str)})


class Inventory:
    """The containers of a file's content, plain data with tensors or references to them."""

    def __init__(self, content: Any) -> None:
        self.content = content
        if _is_ddim_list(content):
            self.content = dict(zip(_DDIM_LIST, content, strict=False))
        self._mixed_root: Container | None = None  # a state dict with other things in it
        found = list(self._all())  # which notes the mixed root, too
        _give_roles(found, self.entries)  # in place
        self.containers = _without_parts(found)

    @property
    def entries(self) -> Mapping[Any, Any]:
        """The outermost entries of the file; empty if it is no dict."""
        return _entries_of(self.content) or {}

    def guess(self) -> str:
        """The key of the state dict: of the only average, else of the only weights, among the outermost containers.

        Raises:
            TrajectoryError: there is none, or several of which none is the only average.
        """
        chosen = self._possible()
        if len(chosen) > 1:
            raise _several(chosen)
        return chosen[0].key

    def raw_and_averages(self) -> tuple[str, list[str]]:
        """The key of the weights, raw ones where there are any, and those of the averages that the file has of them.

        Where a trainer saves its average as the model, that is what users mean, and counts as the weights.

        Raises:
            TrajectoryError: as :meth:`guess`, but several averages of one model are no choice.
        """
        chosen = self._possible()
        raw = chosen[0].average_of or chosen[0]
        are_of_one = raw.is_offered and all(container.average_of is raw for container in chosen)
        if len(chosen) > 1 and not are_of_one:
            raise _several(chosen)
        if len(chosen) == 1 and any(raw.key == swap.raw for swap in _SWAPS):
            raw = chosen[0]
        return raw.key, [average.key for average in self.averages_of(raw.key)]

    def _possible(self) -> list[Container]:
        """What may be meant where nobody chose: the averages, else the weights, among the outermost containers.

        Raises:
            TrajectoryError: there is nothing.
        """
        possible = [container for container in self.containers if container.is_offered and not container.is_no_average]
        least_depth = min((container.depth for container in possible), default=0)
        outermost = [container for container in possible if container.depth == least_depth]
        sampled_with = [container for container in outermost if not container.is_companion] or outermost
        averages = [container for container in sampled_with if container.role is Role.AVERAGE]
        chosen = averages or sampled_with
        if self._mixed_root is not None and not averages:  # a dict of other things may hide in a bare state dict
            chosen = [container for container in sampled_with if container.role is Role.WEIGHTS] or [self._mixed_root]
        if chosen:
            return chosen
        if not isinstance(self.content, (list, tuple)) and _entries_of(self.content) is None:
            raise TrajectoryError(f"holds {kind(self.content)}, not a state dict: save model.state_dict().")
        names = _listed(self.entries) or "nothing"
        raise TrajectoryError(f"holds no state dict in a usual place: choose one ({CHOOSE}); it has {names}.")

    def state_dict(self, key: str) -> Mapping[Any, Any]:
        """The state dict under ``key``: names of parts joined by dots, which the start of tensors' names may follow.

        An average has the names of its weights, and from them what it lacks, as buffers and frozen parts.

        Raises:
            TrajectoryError: there is nothing under that key, or no state dict.
        """
        container = self.at(key)
        if container is not None and container.average_of is not None:
            return container.average_of.named | container.named
        self._check_alternatives(key)
        # a list whose key tells of no average is named only now; one that fits no weights is refused here
        if container is not None and container.has_no_names:
            weights = (each.named for each in self.containers if each.role is Role.WEIGHTS)
            return named_averages([*container.tensors.values()], next(weights, {}))
        part = self.content
        rest = key  # of the key, inside of ``part``
        while rest:
            parts = _parts(part)
            if parts is None:
                raise TrajectoryError(f"has no key {shown(key)!r}: {shown(rest)!r} is sought in {kind(part)}.")
            name = _longest_name(rest, parts)
            if name is None:
                named = _beginning_with(f"{rest}.", parts)
                if not named:
                    raise TrajectoryError(
                        f"has no key {shown(key)!r}: {shown(rest)!r} is not among {_listed(parts)}; pass another "
                        "--key, or --key '' for none."
                    )
                return named
            part = parts[name]
            rest = rest[len(name) + 1 :]
        tensors = _parts(part)
        if tensors is None or isinstance(part, (list, tuple)):
            place = f" under {shown(key)!r}" if key else ""
            raise TrajectoryError(
                f"has {kind(part)}{place}, not a state dict: save model.state_dict(), or pass another --key."
            )
        return _flattened(tensors) or _without_extra_states(tensors)

    def _check_alternatives(self, key: str) -> None:
        """Refuse a key under which there are several state dicts of one model, as averages of several rates.

        The whole content, under the empty key, was asked for as it is.
        """
        inside = [each for each in self.containers if key and each.key.startswith(f"{key}.")]
        if any(each.key == key for each in self.containers):
            return
        models = [each.average_of or each for each in inside]
        if len({id(model) for model in models}) < len(models) or any(each.is_rate for each in inside[1:]):
            raise _several(inside, f" under {shown(key)!r}")

    def at(self, key: str) -> Container | None:
        """The container under a key; where an entry of that key holds one container and no weights itself, that one."""
        inside = []
        for container in self.containers:
            if container.key == key:
                return container
            if container.key.startswith(f"{key}."):
                inside.append(container)
        return inside[0] if len(inside) == 1 else None

    def others(self, key: str) -> list[str]:
        """The keys that a message offers beside the state dict under ``key``, those of other entries of the file.

        Of networks that were pickled whole, only those whose key tells what they are: StyleGAN's discriminator is no
        choice.
        """
        if not key:  # the whole file was read
            return []
        beside = []
        for container in self.containers:
            is_chosen_entry = container.key.partition(".")[0] == key.partition(".")[0]
            is_unnamed_network = container.is_module and _word_of(container.key) is None
            if not container.is_offered or is_chosen_entry or is_unnamed_network:
                continue
            offered = container.key
            if container.is_no_average:
                offered += " (of other names than the model, so no average of it)"
            beside.append(offered)
        return beside[:_MAX_LISTED]

    def averages_of(self, key: str) -> list[Container]:
        """The averages of the weights under ``key``, those of higher rates later; last, what its trainer samples with.

        Where ``key`` are raw weights that were kept while the averages were in the model, that model is one of them.
        """
        chosen = self.at(key)
        if chosen is None:
            return []
        raw = chosen
        averages = []
        if chosen.is_collected and chosen.average_of is not None:
            raw = chosen.average_of
            averages.append(raw)
        averages += [each for each in self.containers if each.role is Role.AVERAGE and each.average_of is raw]
        return sorted(averages, key=lambda each: (not each.is_companion, number_of(each.rate)))

    def alike(self, key: str) -> list[Container]:
        """What has the names and shapes of the weights under ``key`` and is called no average: a target, the best."""
        chosen = self.at(key)
        if chosen is None:
            return []
        return [
            each
            for each in self.containers
            if each not in (chosen, chosen.average_of)
            and each.role is not Role.AVERAGE
            and not each.is_collected
            and counterparts(each.named, chosen.named) is not None
        ]

    def family(self, key: str) -> list[Container]:
        """The averages of the weights under ``key``, what these are an average of, and other names of the same tensors.

        Where the key ends with the start of tensors' names, as ``state_dict.model``, that part of each.
        """
        chosen = self.at(key)
        start_of_names = ""
        if chosen is None:  # the key goes on into the names of a container's tensors
            around = [container for container in self.containers if key.startswith(f"{container.key}.")]
            if not around:  # those of the outermost entries, to which nothing here is related
                return []
            chosen = max(around, key=lambda container: len(container.key))
            start_of_names = key.removeprefix(f"{chosen.key}.")
        raw = chosen.average_of or chosen
        memory = _memory(raw)
        others = []
        for container in self.containers:
            is_related = raw in (container, container.average_of)
            is_other_name = memory is not None and _memory(container) == memory
            if container is not chosen and (is_related or is_other_name):
                others.append(container)
        if not start_of_names:
            return others
        prefix = f"{start_of_names}."
        return [Container(f"{each.key}.{start_of_names}", _beginning_with(prefix, each.named)) for each in others]

    def _all(self) -> Iterator[Container]:
        """The containers of a file, the outer ones first; in the state of an optimizer and the like only averages.

        Keeps a bare state dict with other things in it as ``_mixed_root``, which is a choice only where there is none.
        """
        pending: collections.deque[_Part] = collections.deque([_Part("", self.content)])
        seen: set[int] = set()
        for _ in range(_MAX_PARTS):
            if not pending:
                return
            part = pending.popleft()
            entries: Mapping[Any, Any] = _entries_of(part.value) or {}
            state_dict = _whole(part.key, part.value, entries)
            if state_dict is not None:
                for container in _split(state_dict):
                    yield part.completed(container)
                if COLLECTED in entries and state_dict.is_shadow and isinstance(entries[COLLECTED], list):
                    collected = dict(enumerate(entries[COLLECTED]))
                    yield Container(f"{part.key}.{COLLECTED}".lstrip("."), collected, is_collected=True)
                if not _has_parts(state_dict, entries):
                    continue
            if id(part.value) in seen:  # a part may contain itself
                continue
            seen.add(id(part.value))
            if "param_groups" in entries and isinstance(entries.get("state"), dict):
                yield from part.columns(entries["state"])
                entries = {name: entry for name, entry in entries.items() if name not in ("state", "param_groups")}
                part = part._replace(is_in_state=True)
            first = dict(itertools.islice(entries.items(), _MAX_SAMPLED))
            # a single number, such as a step, is a tensor too, and makes no state dict
            has_tensors = any(_is_any_tensor(entry) and getattr(entry, "shape", True) for entry in first.values())
            if has_tensors and state_dict is None and not part.is_in_state:
                mixed = Container(part.key, entries)
                if part.key:
                    yield mixed
                else:
                    self._mixed_root = mixed
            pending += part.inner(first, state_dict)


class _Part(NamedTuple):
    """A part of a file that is going to be looked into: its key, and what is known from what is around it."""

    key: str
    value: Any
    rate: str = ""
    is_in_state: bool = False
    inside: Container | None = None

    def completed(self, container: Container) -> Container:
        """A container that was found here, with what is known of it."""
        container.rate = _rate_beside(_entries_of(self.value) or {}) or self.rate
        container.is_in_state = self.is_in_state
        container.inside = self.inside
        return container

    def inner(self, entries: Mapping[Any, Any], whole: Container | None) -> Iterator[_Part]:
        """The parts of this one; ``whole`` is what it is itself, if that is a state dict."""
        value = self.value
        if isinstance(value, (list, tuple)):
            entries = dict(enumerate(value[:_MAX_ELEMENTS]))
        rate = _rate_beside(entries) or self.rate
        rates = [rates for name, rates in entries.items() if _LISTS_OF_RATES.fullmatch(str(name))]
        for name, entry in entries.items():
            if not isinstance(name, (str, int)) or not isinstance(entry, (dict, list, tuple, Record)):
                continue
            is_state = isinstance(name, str) and name not in GUESSED_KEYS and _STATES.fullmatch(name) is not None
            key = f"{self.key}.{name}".lstrip(".")
            its_rate = rate_in(str(name)) or rate
            inner = _Part(key, entry, its_rate, self.is_in_state or is_state, whole or self.inside)
            if isinstance(entry, (list, tuple)) and not all(map(_is_any_tensor, entry[:_MAX_ELEMENTS])):
                same = next((each for each in rates if isinstance(each, (list, tuple)) and len(each) == len(entry)), ())
                for index, (element, number) in enumerate(itertools.zip_longest(entry[:_MAX_ELEMENTS], same)):
                    if isinstance(element, (dict, list, tuple, Record)):
                        rate_of_element = f"{number:g}" if isinstance(number, float) else its_rate
                        yield inner._replace(key=f"{key}.{index}", value=element, rate=rate_of_element)
            else:
                yield inner

    def columns(self, state: Mapping[Any, Any]) -> Iterator[Container]:
        """Averages that an optimizer keeps for each parameter (``state.0.ax`` of ASGD): a list for each such name."""
        columns: dict[str, list[Any]] = {}
        for of_parameter in itertools.islice(state.values(), _MAX_SAMPLED):
            for name, value in (_entries_of(of_parameter) or {}).items():
                is_average_of_weights = isinstance(name, str) and _OF_OPTIMIZER.fullmatch(name) is not None
                if is_average_of_weights and is_tensor(value) and value.shape:
                    columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            yield Container(
                f"{self.key}.state.*.{name}".lstrip("."), dict(enumerate(values)), Role.AVERAGE, is_in_state=True
            )


def _has_parts(whole: Container, entries: Mapping[Any, Any]) -> bool:
    """Whether the parts of what is called an average may be averages themselves, as under their rates."""
    parts = [entry for entry in entries.values() if isinstance(entry, (dict, Record))]
    return _word_of(whole.key) is Role.AVERAGE and len(parts) > 1 and not whole.is_module and not whole.is_shadow


def rate_in(name: str) -> str:
    """The rate in a name, ``0.9999`` of ``ema_0.9999``: the largest decimal below one; empty without one.

    Other decimals may count parameters.
    """
    return max(re.findall(r"(?<![0-9])0\.[0-9]+", name), key=float, default="")


def _rate_beside(entries: Mapping[Any, Any]) -> str:
    """The rate of an average that is a number among ``entries``; empty without one."""
    for name, value in entries.items():
        if type(value) is float and 0 < value < 1 and _RATES.fullmatch(str(name)):
            return f"{value:g}"
    return ""


def number_of(rate: str) -> float:
    """A rate as a number, by which averages are sorted; 0 without one."""
    return float(rate or 0)


def _several(containers: Sequence[Container], place: str = "") -> TrajectoryError:
    """Which state dicts there are, of which none can be preferred."""
    keys = ", ".join(shown(container.key) for container in containers[:_MAX_LISTED])
    return TrajectoryError(f"holds several state dicts{place} ({keys}): choose one ({CHOOSE}).")


def is_average(key: str) -> bool:
    """Whether a key is that of a running average: ``ema``, ``ema_model``, ``unet_ema``, ``state_dict_ema``."""
    return any(_AVERAGE.fullmatch(part) for part in key.split("."))


def _word_of(key: str) -> Role | None:
    """What the words of a key say that it holds; ``None`` if they say nothing."""
    parts = key.split(".")
    if is_average(key) or any(_OTHER_AVERAGE.fullmatch(part) for part in parts) or parts[-1] == _SHADOW:
        return Role.AVERAGE
    if any(part in GUESSED_KEYS for part in parts):
        return Role.WEIGHTS
    return None


def _entries_of(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict, or of an object: its items, or its attributes; ``None`` for anything else."""
    if isinstance(value, Record):
        value = value.state if value.items is None else value.items
    if isinstance(value, Mapping):
        return value
    return None


def _is_any_tensor(value: Any) -> bool:
    """Whether it is a tensor, also one that cannot be read."""
    return is_tensor(value) or bool(other_tensor(value))


def _is_ddim_list(value: Any) -> bool:
    """Whether this is a checkpoint of DDIM's code: a list of ``_DDIM_LIST``, of which the average may lack."""
    if not isinstance(value, list) or len(value) not in (4, 5):
        return False
    optimizer = _entries_of(value[1]) or {}
    return "param_groups" in optimizer and bool(_parts(value[0]))


def _parts(value: object) -> Mapping[Any, Any] | None:
    """The named parts of a dict, of a list (by position), of an object like a dict, or of a network."""
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value)}
    if is_module(value):
        return module_weights(value)
    entries = _entries_of(value)
    if entries is None:
        return None
    # numbers, such as rates, are keys, too
    return {str(name) if isinstance(name, int) else name: part for name, part in entries.items()}


def _longest_name(key: str, parts: Mapping[Any, Any]) -> str | None:
    """The longest of the names in ``parts`` that ``key`` begins with: names may have dots, as ``ema_0.9999``."""
    words = key.split(".")[:_MAX_KEY_PARTS]
    names = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((name for name in names if name in parts), None)


def _beginning_with(prefix: str, parts: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): part
        for name, part in parts.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def _listed(parts: Mapping[Any, Any]) -> str:
    """The first names of parts, for a message."""
    names = [shown(name) for name in list(parts)[:_MAX_LISTED]]
    return ", ".join([*names, "…"] if len(parts) > _MAX_LISTED else names)


def _without_extra_states(parts: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Without what modules keep beside their weights: ``get_extra_state``, states of optimizers, and plain data."""
    return {name: value for name, value in parts.items() if _is_any_tensor(value) or not _is_beside(str(name), value)}


def _is_beside(name: str, value: Any) -> bool:
    """Whether an entry of a state dict is none of the weights: a state by its name, or containers without tensors."""
    if name.endswith("_extra_state") or _STATES.fullmatch(name) is not None:
        return True
    if not isinstance(value, (dict, list, tuple)):  # a number may be learned
        return False
    return not any(isinstance(inner, (Record, TensorRef, Tensor)) for inner in values_in(value))


def values_in(content: Any) -> Iterator[Any]:
    """All values in plain data; what is in a dict, a list or a tuple comes once, however often a file names that."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        yield value
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value


def _flattened(parts: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of nested dicts, their names joined by dots; empty if there is anything else in them, or too much."""
    tensors: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", parts)]
    while pending:
        prefix, part = pending.pop()
        entries = _entries_of(part)
        if entries is None or len(prefix) > _MAX_PREFIX or len(tensors) + len(pending) > _MAX_SAMPLED:
            return {}
        for name, value in entries.items():
            if _is_any_tensor(value):
                tensors[f"{prefix}{name}"] = value
            else:
                pending.append((f"{prefix}{name}.", value))
    return tensors


def _whole(key: str, value: Any, entries: Mapping[Any, Any]) -> Container | None:
    """A part of a file that is one state dict; ``None`` if its own parts have to be looked at.

    ``entries`` are those of ``value``, empty where it is no dict.
    """
    if is_module(value):
        weights: Mapping[Any, Any] = {}
        with contextlib.suppress(TrajectoryError):  # of a network that cannot be read, which is said when it is
            weights = module_weights(value)
        return Container(key, weights, is_module=True)
    if isinstance(value, (list, tuple)):
        if _word_of(key) is Role.AVERAGE and value and all(map(is_tensor, value[:_MAX_SAMPLED])):
            return Container(key, dict(enumerate(value)))
        return None
    averages = entries.get(_SHADOW)
    if isinstance(averages, list) and averages and is_tensor(averages[0]):
        return Container(key, dict(enumerate(averages)), is_shadow=True)
    if entries and all(map(_is_any_tensor, entries.values())):
        return Container(key, entries)
    if _word_of(key) is not None and _is_in_parts(entries):
        return Container(key, _flattened(entries))
    return None


def _is_in_parts(entries: Mapping[Any, Any]) -> bool:
    """Whether these are nested dicts of nothing but tensors, as Megatron saves a model: one state dict, no choice."""
    numbers = [name for name, value in entries.items() if _is_any_tensor(value) and not getattr(value, "shape", True)]
    if numbers and len(entries) == len(numbers) + 1:  # {"decay": …, "shadow": {…}}: the state dict is inside
        return False
    if len(entries) == 1:  # {"net": {…}}: what is inside decides, since that may be the state dict
        entries = _entries_of(next(iter(entries.values()))) or {}
    has_parts = not all(map(_is_any_tensor, entries.values()))
    has_words = any(_word_of(name) for name in entries if isinstance(name, str))
    return has_parts and not has_words and bool(_flattened(entries))


def _split(whole: Container) -> Iterator[Container]:
    """A state dict; or, of a module that averages another, the average in it and the model beside."""
    names = [name for name in whole.tensors if isinstance(name, str)]
    start = _ONLY if names and all(name.startswith(_ONLY) for name in names) else ""
    for split in _SPLITS:
        if all(any(name.startswith(start + sign) for name in names) for sign in split.signs):
            for part in (start + split.average, start + split.raw):
                tensors = _beginning_with(f"{part}.", whole.tensors)
                weights = {name: tensor for name, tensor in tensors.items() if name not in _SETTINGS}
                if weights:
                    yield Container(f"{whole.key}.{part}".lstrip("."), weights, is_prefix=True)
            return
    yield whole


def _give_roles(containers: Sequence[Container], entries: Mapping[Any, Any]) -> None:
    """Say what each container is, by the words of its key; ``entries`` are the outermost ones of the file.

    An average must have the names of other weights, and belongs to the nearest that have them.
    """
    swaps = [swap for swap in _SWAPS if swap.signs[0] in entries]
    averages_by_swap = [swap.average for swap in swaps]
    raws_by_swap = [swap.raw for swap in swaps]
    for container in containers:
        container.role = _word_of(container.key) or container.role
        if container.is_collected:
            container.role = Role.OTHER
        if container.key in averages_by_swap:
            container.role = Role.AVERAGE
        elif container.key in ("", *raws_by_swap) or container.key.endswith(ONLINE_MODEL):
            container.role = Role.WEIGHTS
    raws = [
        container
        for container in containers
        if container.role is not Role.AVERAGE and container.tensors and not container.is_in_state
    ]
    for container in containers:
        if container.role is Role.AVERAGE or container.is_collected:
            _find_its_weights(container, [raw for raw in raws if not raw.is_collected])


def _without_parts(containers: Sequence[Container]) -> list[Container]:
    """Without what is no state dict of its own: parts of an average, or a whole whose parts are the averages.

    And without what a state of the training holds that is no average of the weights.
    """
    wholes = {
        each.inside
        for each in containers
        if each.inside is not None
        and (each.average_of is not None or (each.is_rate and each.inside.average_of is None))
    }
    kept = []
    for each in containers:
        is_part = each.inside is not None and each.inside not in wholes
        is_whole = each in wholes and each.average_of is None
        is_state = each.is_in_state and each.average_of is None
        if not (is_part or is_whole or is_state):
            kept.append(each)
    return kept


def _find_its_weights(average: Container, raws: Sequence[Container]) -> None:
    """Give an average the weights that it is of, and their names; without any, it counts as something else.

    The nearest are those of its key without the word (``unet_ema`` → ``unet``), then those of the usual keys.
    """
    stem = re.sub(r"_?(ema|swa)_?", "", average.key)
    nearest = sorted(raws, key=lambda raw: (raw.key != stem, raw.role is not Role.WEIGHTS, raw.depth, raw.is_prefix))
    for raw in nearest:
        tensors = average.named
        if average.has_no_names:
            try:
                tensors = named_averages([*average.tensors.values()], raw.named)
            except TrajectoryError:  # of another model
                continue
        names = counterparts(tensors, raw.named)
        if names is not None:
            average.tensors = {names[name]: tensor for name, tensor in tensors.items()}
            average.average_of = raw
            return
    # without other weights in the file, a user can only mean these
    if any(raw.is_offered for raw in raws) and not average.is_shadow:
        average.role = Role.OTHER


def _memory(container: Container) -> tuple[int, int, int] | None:
    """Where in the file its first tensor is, by which two names of one model are known; ``None`` if that is unknown.

    Scalars, such as counters, are passed over.
    """
    for tensor in container.tensors.values():
        if isinstance(tensor, TensorRef) and tensor.shape and tensor.storage is not None:
            return tensor.storage.start, tensor.offset, tensor.storage.size
    return None
