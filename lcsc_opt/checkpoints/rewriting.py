"""A trainer's file with other weights: what it holds beside them is copied as plain data, and nothing in it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.content import Content
from lcsc_opt.checkpoints.pickles import shown
from lcsc_opt.checkpoints.reading import unwrapped
from lcsc_opt.checkpoints.torch_files import TensorRef, is_tensor, kind, map_tensors, read_content

_MAX_DEPTH = 64
_PLAIN = (str, int, float, bool, type(None))
_NOT_PLAIN = object()


class Document(NamedTuple):
    """The content of a file with other weights.

    Attributes:
        entries: plain data and tensors; those that are not weights are mapped from the file.
        left_out: where in the file there was something else, such as an object of a trainer's class.
    """

    entries: dict[Any, Any]
    left_out: list[str]


def with_weights(path: Path, key: str, weights: Mapping[str, Tensor]) -> Document:
    """A torch file's content, with ``weights`` in place of the state dict ``key``.

    They also replace all other state dicts with the same names and shapes, whatever stands before the names: of a model
    and its average in one file, a loader may take either.

    Raises:
        TrajectoryError: the file is gone, holds the weights of another model, or a network that was pickled whole.
    """
    if not path.is_file():
        raise TrajectoryError(f"{path} is gone")
    content = read_content(path)
    if not isinstance(content, dict):
        raise TrajectoryError(f"{path} holds {kind(content)}, which only its trainer's code can write")
    state = Content(content).state_dict(key)
    if all(map(is_tensor, state.values())):
        state = unwrapped(state)
    if state.keys() != weights.keys() or not all(_is_alike(state[name], weights[name]) for name in weights):
        raise TrajectoryError(f"{path} holds the weights of another model")
    tensors: dict[int, Tensor] = {}  # identity of a reference → the tensor
    refs: dict[str, TensorRef] = {}
    for part in _containers(content):
        values = part.values() if isinstance(part, dict) else part
        refs.update({str(id(value)): value for value in values if isinstance(value, TensorRef)})
        if isinstance(part, dict):
            for prefix in _prefixes(part, weights):
                tensors.update({id(part[prefix + name]): weights[name] for name in weights})
    if any(str(id(ref)) not in refs for ref in state.values()):
        raise TrajectoryError(f"{path} holds its network as a pickled object, which only its trainer's code can write")
    tensors.update({id(state[name]): weights[name] for name in weights})
    others = {name: ref for name, ref in refs.items() if int(name) not in tensors}
    tensors.update({int(name): tensor for name, tensor in map_tensors(path, others).items()})
    copier = _Copier(tensors)
    return Document(copier.copy(content, ""), copier.left_out)


def _is_alike(value: Any, tensor: Tensor) -> bool:
    return isinstance(value, TensorRef) and value.shape == tuple(tensor.shape)


def _prefixes(part: Mapping[Any, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """What stands in ``part`` before the names of state dicts that ``weights`` fit."""
    first = next(iter(weights))
    prefixes = [found.removesuffix(first) for found in part if isinstance(found, str) and found.endswith(first)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    return [prefix for prefix in prefixes if all(_is_alike(part.get(prefix + n), weights[n]) for n in weights)]


def _containers(content: Any) -> Iterator[Any]:
    """Every dict, list and tuple in plain data, each once."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            yield part
            pending += part.values() if isinstance(part, dict) else part


class _Copier:
    """Copies plain data, with ``tensors`` for references by their identity. What it cannot copy, it leaves out."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self._tensors = tensors
        self._copies: dict[int, Any] = {}
        self.left_out: list[str] = []

    def copy(self, value: Any, place: str, depth: int = 0) -> Any:
        """A copy; a dict lacks entries that are not plain data. For anything else, a mark."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, TensorRef):
            return self._tensors[id(value)]
        if not isinstance(value, (dict, list, tuple)) or depth > _MAX_DEPTH:
            return _NOT_PLAIN
        if id(value) not in self._copies:
            self._copies[id(value)] = _NOT_PLAIN  # it may contain itself
            if isinstance(value, dict):
                self._copies[id(value)] = self._copy_entries(value, place, depth)
            else:
                copies = [self.copy(element, f"{place}.{index}", depth + 1) for index, element in enumerate(value)]
                if not any(copied is _NOT_PLAIN for copied in copies):
                    self._copies[id(value)] = type(value)(copies)
        return self._copies[id(value)]

    def _copy_entries(self, entries: Mapping[Any, Any], place: str, depth: int) -> dict[Any, Any]:
        copies = {}
        for name, value in entries.items():
            inner_place = f"{place}.{shown(name)}".lstrip(".")
            copied = self.copy(value, inner_place, depth + 1)
            if copied is _NOT_PLAIN or type(name) not in (str, int):
                self.left_out.append(inner_place)
            else:
                copies[name] = copied
        return copies
