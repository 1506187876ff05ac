"""A user's own extractor, under a name that changes with its weights and its code."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.code import local_code
from lcsc_opt.metrics.extractors.base import ClassifyingExtractor, FeatureExtractor

DEEPEST = 16  # lists, dicts and objects inside each other that are looked into
NO_OBJECTS = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(str, bytes, int, float, types.NoneType),
)
PLAIN = frozenset(vars(nn.Module()))  # what every module has


class OwnExtractor:
    """A user's extractor under a name of its own: references from other weights or code do not fit it.

    Weights are those in its attributes: tensors, arrays and modules, also in lists, dicts and other objects. What only
    a closure or a global variable holds is not seen, and neither are buffers that a module does not save.

    Args:
        made: what the factory returned.
        sources: name → file of the factory's module.

    Attributes:
        name: that of ``made``, with a hash of its weights and its code.
        dimension: the number of features, D.
    """

    def __init__(self, made: FeatureExtractor, sources: Mapping[str, Path]) -> None:
        self.made = made
        self.name = f"{made.name}-{_digest(made, sources)[:16]}"
        self.dimension = made.dimension

    @property
    def images_with_graph(self) -> int:
        """How many images may have a graph at once."""
        return int(getattr(self.made, "images_with_graph", 2**31))

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] → ``[B, D]``."""
        return self.made(images)


class OwnClassifyingExtractor(OwnExtractor):
    """A user's extractor with logits, too."""

    made: ClassifyingExtractor

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` → features ``[B, D]`` and logits ``[B, classes]``."""
        return self.made.features_and_logits(images)


def own_extractor(made: FeatureExtractor, sources: Mapping[str, Path]) -> FeatureExtractor:
    """Wrap what a user's factory returned."""
    kind = OwnClassifyingExtractor if isinstance(made, ClassifyingExtractor) else OwnExtractor
    return kind(made, sources)


def _digest(made: Any, sources: Mapping[str, Path]) -> str:
    digest = hashlib.sha256(repr(local_code(sources)).encode())
    for name, values in _numbers(made, set(), 0):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _numbers(holder: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """Name → array, of all tensors and arrays in an object. Only the weights of a module come more than once."""
    if isinstance(holder, nn.Module):
        yield from _arrays(holder.state_dict().items())
    if id(holder) in seen or depth > DEEPEST:
        return
    seen.add(id(holder))
    for name, part in _parts(holder):
        if isinstance(part, (Tensor, np.ndarray)):
            yield from _arrays([(name, part)])
        elif not isinstance(part, NO_OBJECTS):
            yield from ((f"{name}.{inner}", values) for inner, values in _numbers(part, seen, depth + 1))


def _parts(holder: Any) -> Iterable[tuple[str, Any]]:
    """Name → part, of a list, a dict or an object; of a module what its state dict may leave out.

    Other objects in a module are not looked into: those of ``torch.jit`` and ``torch.fx`` hold its weights once more.
    """
    if isinstance(holder, nn.Module):
        plain = ((f"{path}.{name}", part) for path, each in holder.named_modules() for name, part in _plain(each))
        return sorted(plain, key=_name)
    if isinstance(holder, (list, tuple)):
        return ((str(position), part) for position, part in enumerate(holder))
    if isinstance(holder, dict):
        named = enumerate(holder.items())  # a name that is no text may print its address
        return sorted(((name if isinstance(name, str) else str(i), part) for i, (name, part) in named), key=_name)
    slots = (name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ()))
    held = {name: getattr(holder, name, None) for name in slots if name != "__dict__"} | getattr(holder, "__dict__", {})
    return sorted(held.items(), key=_name)


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    own = ((name, part) for name, part in vars(module).items() if name not in PLAIN)
    return ((name, part) for name, part in own if isinstance(part, (Tensor, np.ndarray, list, tuple, dict)))


def _arrays(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(named, key=_name):
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            flat = value.detach().cpu().contiguous().flatten()
            yield f"{name} {value.dtype} {list(value.shape)}", flat.view(torch.uint8).numpy()
        elif isinstance(value, np.ndarray):
            yield name, value


def _name(entry: tuple[str, Any]) -> str:
    return entry[0]
