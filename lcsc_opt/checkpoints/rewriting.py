"""A trainer's file with other weights: what it holds beside them is copied as plain data, and nothing in it is run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.inventory import Container, Inventory
from lcsc_opt.checkpoints.matching import counterparts
from lcsc_opt.checkpoints.pickles import shown
from lcsc_opt.checkpoints.reading import is_constant
from lcsc_opt.checkpoints.torch_files import TensorRef, kind, map_tensors, read_content

_MAX_DEPTH = 64
_PLAIN = (str, int, float, bool, type(None))
_NOT_PLAIN = object()


class Document(NamedTuple):
    """The content of a file with other weights.

    Attributes:
        entries: plain data and tensors; those that are not weights are mapped from the file.
        replaced: the keys of what has the new weights: the chosen ones, and their averages.
        left_out: where in the file there was something else, such as an object of a trainer's class.
    """

    entries: dict[Any, Any]
    replaced: list[str]
    left_out: list[str]


def with_weights(path: Path, key: str, weights: Mapping[str, Tensor], *, earlier: Path | None = None) -> Document:
    """A torch file's content, with ``weights`` in place of the state dict ``key``.

    They also replace the averages of it, or the weights that it is an average of: a loader may take either.

    Args:
        path: the file.
        key: what reads the weights that are replaced.
        weights: name → tensor.
        earlier: another checkpoint of the run; what is the same in both is no average, and stays.

    Raises:
        TrajectoryError: the file is gone, holds the weights of another model, or a network that was pickled whole.
    """
    if not path.is_file():
        raise TrajectoryError(f"{path} is gone")
    value = read_content(path)
    if not isinstance(value, dict):
        raise TrajectoryError(f"{path} holds {kind(value)}, which only its trainer's code can write")
    inventory = Inventory(value)
    family = inventory.family(key) or [Container(key, {})]
    chosen = next(container for container in family if container.key == key)
    chosen.tensors = inventory.state_dict(key)  # as it was read
    if not _replacements(chosen, weights):
        raise TrajectoryError(f"{path} holds the weights of another model")
    replaced = [container for container in family if container is chosen or not _stays(container, earlier, path)]
    tensors: dict[int, Tensor] = {}  # identity of a reference → the tensor
    for container in replaced:
        tensors |= _replacements(container, weights)
    refs = {id(ref): ref for part in _containers(value) for ref in part if isinstance(ref, TensorRef)}
    if any(id(ref) not in refs for ref in chosen.named.values()):
        raise TrajectoryError(f"{path} holds its network as a pickled object, which only its trainer's code can write")
    others = {str(name): ref for name, ref in refs.items() if name not in tensors}
    tensors.update({int(name): tensor for name, tensor in map_tensors(path, others).items()})
    copier = _Copier(tensors)
    entries = copier.copy(value, "")
    return Document(entries, [container.key for container in replaced if container.key], copier.left_out)


def _stays(container: Container, earlier: Path | None, path: Path) -> bool:
    """Whether the weights in a container are the same in an earlier checkpoint, so no average of those that train."""
    return earlier is not None and is_constant(container.key, earlier, path)


def _replacements(container: Container, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The identity of each reference in a container → its new tensor; empty for the weights of another model.

    Either may lack tensors of the other: an average its buffers, and merged weights the other parts of the file.
    """
    tensors = container.named
    names = counterparts(tensors, weights)
    if names is None:
        merged_part = counterparts(weights, tensors) or {}
        names = {other: name for name, other in merged_part.items()}
    return {id(tensors[name]): weights[other] for name, other in names.items()}


def _containers(content: Any) -> Iterator[Collection[Any]]:
    """The values of every dict, list and tuple in plain data, each once."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            values = part.values() if isinstance(part, dict) else part
            yield values
            pending += values


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
