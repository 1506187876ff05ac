"""A trainer's file with other weights: what it holds beside them is copied as plain data, and nothing in it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.copying import PlainCopier
from lcsc_opt.checkpoints.inventory import Container, Inventory
from lcsc_opt.checkpoints.matching import counterparts
from lcsc_opt.checkpoints.reading import is_constant, naming
from lcsc_opt.checkpoints.torch_files import TensorRef, kind, map_tensors, read_content
from lcsc_opt.checkpoints.watched import FileState


class Document(NamedTuple):
    """The content of a file with other weights.

    Attributes:
        entries: plain data and tensors.
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
        TrajectoryError: the file is gone, is written over meanwhile, or holds the weights of another model or a network
            that was pickled whole.
    """
    with naming(path):
        before = FileState(path)
        value = read_content(path)
        if not isinstance(value, dict):
            raise TrajectoryError(f"holds {kind(value)}, which only its trainer's code can write")
        inventory = Inventory(value)
        chosen = Container(key, inventory.state_dict(key))
        if not _replacements(chosen, weights):
            raise TrajectoryError("holds the weights of another model")
        family = [container for container in inventory.family(key) if not _stays(container, earlier, path)]
        replaced = [chosen, *(container for container in family if container.tensors)]
        tensors: dict[int, Tensor] = {}  # identity of a reference → the tensor
        for container in replaced:
            tensors |= _replacements(container, weights)
        refs = {id(ref): ref for ref in _values(value) if isinstance(ref, TensorRef)}
        if any(id(ref) not in refs for ref in chosen.named.values()):
            raise TrajectoryError("holds its network as a pickled object, which only its trainer's code can write")
        # all other tensors, as those of the optimizer; names are text
        others = {str(identity): ref for identity, ref in refs.items() if identity not in tensors}
        for name, tensor in map_tensors(path, others, in_memory=True).items():
            tensors[int(name)] = tensor
        before.check()
    copier = PlainCopier(tensors)
    entries = copier.copy(value, "")
    return Document(entries, [container.key for container in replaced if container.key], copier.left_out)


def _stays(container: Container, earlier: Path | None, path: Path) -> bool:
    """Whether a container stays as it is: its weights are the same in ``earlier``, so they follow none that train.

    Without an earlier checkpoint, nobody knows, and it does not.
    """
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


def _values(content: Any) -> Iterator[Any]:
    """All values in plain data; what is in a dict, a list or a tuple comes once, however often a file names that."""
    pending = [content]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        yield value
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
