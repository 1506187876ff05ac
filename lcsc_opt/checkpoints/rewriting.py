"""A trainer's file with other weights: what it holds beside them is copied, and nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.copying import PlainCopier
from lcsc_opt.checkpoints.inventory import Container, Inventory, values_in
from lcsc_opt.checkpoints.matching import counterparts
from lcsc_opt.checkpoints.names import ARCHIVE
from lcsc_opt.checkpoints.reading import is_constant, naming
from lcsc_opt.checkpoints.torch_files import TensorRef, map_tensors, patched, read_content
from lcsc_opt.checkpoints.watched import FileState


class Document(NamedTuple):
    """The content of a file with other weights.

    Attributes:
        entries: plain data and tensors.
        replaced: the keys of what has the new weights: the chosen ones, and their averages.
        left_out: where in the file there was something else, such as an object of a trainer's class.
        content: the bytes of the file with other numbers, where it is more than plain data; takes the place of
            ``entries``.
    """

    entries: Mapping[Any, Any]
    replaced: Sequence[str] = ()
    left_out: Sequence[str] = ()
    content: bytes | None = None

    def write(self, file: BinaryIO) -> None:
        """Write it, as its trainer does."""
        if self.content is None:
            torch.save(self.entries, file)
        else:
            file.write(self.content)


def with_weights(path: Path, key: str, weights: Mapping[str, Tensor], *, earlier: Path | None = None) -> Document:
    """The content of a file of torch, or of an archive of them, with ``weights`` in place of the state dict ``key``.

    Where all of it is plain data, that is copied; else the bytes of the file are, with those of the weights replaced.
    They also replace the averages of it, or the weights that it is an average of: a loader may take either.

    Args:
        path: the file.
        key: what reads the weights that are replaced.
        weights: name → tensor.
        earlier: another checkpoint of the run; what is the same in both is no average, and stays.

    Raises:
        TrajectoryError: the file is gone, is written over meanwhile, or holds the weights of another model; or they lie
            in more than plain data, and have another dtype there.
    """
    with naming(path):
        before = FileState(path)
        value = read_content(path)
        inventory = Inventory(value)
        chosen = Container(key, inventory.state_dict(key))
        if not _replacements(chosen, weights):
            raise TrajectoryError("holds the weights of another model")
        family = [container for container in inventory.family(key) if not _stays(container, earlier, path)]
        replaced = [chosen, *(container for container in family if container.tensors)]
        tensors: dict[int, Tensor] = {}  # identity of a reference → the tensor
        for container in replaced:
            tensors |= _replacements(container, weights)
        keys = [container.key for container in replaced if container.key]
        copied = None
        if isinstance(value, dict) and not path.name.endswith(ARCHIVE):
            copied = _copied(path, value, tensors, keys)
        if copied is None or copied.left_out:
            try:
                refs = {id(ref): ref for container in replaced for ref in container.named.values()}
                content = patched(path, [(refs[identity], tensor) for identity, tensor in tensors.items()])
                copied = Document({}, keys, content=content)
            except TrajectoryError:  # other dtypes
                if copied is None:
                    raise
        before.check()
    return copied


def _copied(path: Path, value: dict[Any, Any], tensors: Mapping[int, Tensor], keys: Sequence[str]) -> Document | None:
    """Plain data out of a file, with ``tensors`` for references; ``None`` where some of these lie in other objects."""
    refs = {id(ref): ref for ref in values_in(value) if isinstance(ref, TensorRef)}
    if not tensors.keys() <= refs.keys():
        return None
    # all other tensors, as those of the optimizer; names are text
    others = {str(identity): ref for identity, ref in refs.items() if identity not in tensors}
    read = {int(name): tensor for name, tensor in map_tensors(path, others, in_memory=True).items()}
    copier = PlainCopier(read | dict(tensors))
    entries = copier.copy(value, "")
    return Document(entries, keys, copier.left_out)


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
