"""Folders of ``torch.distributed.checkpoint``, as FSDP, Accelerate and torchtitan save them.

``.metadata`` is a pickle, which is read without running anything in it. It says which tensors there are, and in which
bytes of which ``.distcp`` file each of their parts is: a file of ``torch.save`` of its own, or a tensor of safetensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.names import is_plain_name
from lcsc_opt.checkpoints.pickles import MALFORMED, shown
from lcsc_opt.checkpoints.torch_files import TensorRef, map_tensors, read_content
from lcsc_opt.checkpoints.watched import size_and_time

METADATA = ".metadata"
_MAX_BYTES = 2**48  # of a tensor
_MAX_OPCODES = 5_000_000  # a model of 300 tensors and Adam on 64 processes has 4,000,000


class _Part(NamedTuple):
    """A part of a tensor: where it begins, its shape, and which bytes of which file it is."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    storage: Mapping[str, Any]


@dataclasses.dataclass(slots=True, eq=False)
class ShardedRef(TensorRef):
    """A tensor whose parts are in the files of ``folder``, under the flat ``name`` that the metadata give it.

    As a :class:`TensorRef` it is found and named as a tensor of one file is. Its own ``storage`` is ``None``: each part
    has another.
    """

    folder: Path
    name: str
    parts: list[_Part]

    def read(self) -> Tensor:
        """The whole tensor, mapped from the file if it is in one part.

        Raises:
            TrajectoryError: a part is missing, malformed, or of another shape.
        """
        # parts do not overlap, so the count of their elements tells whether all are there
        if sum(math.prod(part.shape) for part in self.parts) != math.prod(self.shape):
            raise TrajectoryError(f"lacks parts of {shown(self.name)}: some process did not save; leave it out.")
        if len(self.parts) == 1 and self.parts[0].shape == self.shape:
            return self._read_part(self.parts[0])
        tensor = torch.zeros(self.shape, dtype=self.dtype, device="cpu")
        for part in self.parts:
            # an index of slices, one for each dimension
            place = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.shape, strict=True))
            tensor[place].copy_(self._read_part(part))
        return tensor

    def _read_part(self, part: _Part) -> Tensor:
        """One part, refused where the file is not what the metadata, which may be hostile, say of it."""
        name = part.storage["relative_path"]
        start = part.storage["offset"]
        size = part.storage["length"]
        if not is_plain_name(name) or not 0 <= start <= start + size < _MAX_BYTES:
            raise TrajectoryError(MALFORMED)
        file = self.folder / name
        if not file.is_file():
            raise TrajectoryError(f"names {shown(name)}, which does not exist: save or copy it again, or leave it out.")
        tensor = self._read_bytes(file, start, size)
        if tensor.shape != part.shape or tensor.dtype != self.dtype:
            raise TrajectoryError(MALFORMED)
        return tensor

    def _read_bytes(self, file: Path, start: int, size: int) -> Tensor:
        """The tensor in ``size`` bytes of ``file``: a file of ``torch.save`` inside of it, or a tensor of safetensors.

        The bytes of the latter tell no shape, so it is looked up by its name in the header of the whole file.
        """
        with file.open("rb") as opened:
            opened.seek(start)
            is_torch_zip = opened.read(2) == b"PK"
        if not is_torch_zip:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                tensor: Tensor = tensors.get_tensor(self.name)
                return tensor
        content = read_content(file, start=start, stop=start + size)
        if not isinstance(content, TensorRef):
            raise TrajectoryError(MALFORMED)
        return map_tensors(file, {"": content})[""]


def read_distributed(metadata: Path) -> dict[str, Any]:
    """What ``FOLDER/.metadata`` describes, nested as it was saved, with a :class:`ShardedRef` for each tensor.

    Optimizer states, and values that are not tensors, are left out.

    Raises:
        TrajectoryError: it is not such a file, or made to harm.
        Exception: any, since what the pickle says is used unchecked: ``reading.naming`` makes it a TrajectoryError.
    """
    folder = metadata.parent
    described = read_content(metadata, max_opcodes=_MAX_OPCODES).state
    storages = {
        _part_key(index.state["fqn"], index.state.get("offset")): storage.state
        for index, storage in described["storage_data"].items()
    }
    keys_of_name = described.get("planner_data") or {}  # flat name "model.weight" → its keys ("model", "weight")
    content: dict[str, Any] = {}
    bytes_left, _ = size_and_time(folder)  # a hostile file could have memory allocated for more than its parts hold
    for name, record in described["state_dict_metadata"].items():
        is_tensor = record.name.endswith(".TensorStorageMetadata")  # the name of its class
        if not is_tensor or name.startswith("optim"):  # as the names of the optimizer's states do
            continue
        ref = _sharded_ref(folder, name, record.state, storages)
        bytes_left -= math.prod(ref.shape) * ref.dtype.itemsize
        if bytes_left < 0:
            raise TrajectoryError("has larger tensors than its files: save or copy it again, or leave it out.")
        *outer_keys, last_key = keys_of_name.get(name) or (name,)
        place = content
        for key in outer_keys:
            place = place.setdefault(str(key), {})
        place[str(last_key)] = ref
    return content


def _sharded_ref(
    folder: Path, name: str, tensor: Mapping[str, Any], storages: Mapping[str, Mapping[str, Any]]
) -> ShardedRef:
    """A reference to a tensor, whose sizes and places are checked, since memory is allocated by them.

    Args:
        folder: that of the files.
        name: the tensor's.
        tensor: the state of torch's ``TensorStorageMetadata``.
        storages: :func:`_part_key` → the state of its ``_StorageInfo``: which bytes of which file.
    """
    dtype = getattr(torch, tensor["properties"].state[0].name.removeprefix("torch."))
    shape = tensor["size"]
    numbers = [*shape]  # all that the pickle says of sizes and places
    parts = []
    for chunk in tensor["chunks"]:
        offsets = chunk.state["offsets"]
        storage = storages.get(_part_key(name, offsets))
        if storage is None:
            raise TrajectoryError(f"does not say where {shown(name)} is: save it again, or leave it out.")
        part = _Part(offsets, chunk.state["sizes"], storage)
        numbers += [*part.offsets, *part.shape]
        parts.append(part)
    if not all(type(number) is int and 0 <= number < _MAX_BYTES for number in numbers):
        raise TrajectoryError(MALFORMED)
    no_storage: Any = None  # the parts have their own
    return ShardedRef(no_storage, dtype, 0, shape, (), folder, name, parts)


def _part_key(name: str, offsets: tuple[int, ...] | None) -> str:
    """The part of a tensor that begins at ``offsets``, as the key of a dict; what is no tensor has no offsets.

    Text, unlike a tuple, is hashed with a secret, so that no file can make its keys collide.
    """
    return f"{name} {offsets}"
