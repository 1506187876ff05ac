"""Folders of ``torch.distributed.checkpoint``, as FSDP, Accelerate, torchtitan and Megatron-LM save them.

``.metadata`` is a pickle, which is read without running anything in it. It says which tensors there are, and in which
bytes of which ``.distcp`` file each of their parts is: a file of ``torch.save`` of its own, or a tensor of safetensors.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.content import shown
from lcsc_opt.checkpoints.pickles import MALFORMED
from lcsc_opt.checkpoints.torch_files import TensorRef, map_tensors, read_content

METADATA = ".metadata"
_OPTIMIZER = "optim"  # what the names of its states begin with
_LARGEST = 2**48  # bytes of a tensor
_MOST_OPCODES = 5_000_000  # a model of 300 tensors and Adam on 64 processes has 4,000,000


@dataclasses.dataclass(slots=True, eq=False)
class ShardedRef(TensorRef):
    """A tensor in parts: ``(offsets, sizes, storage)`` each, where ``storage`` says which bytes of which file."""

    folder: Path
    name: str
    parts: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]

    def read(self) -> Tensor:
        """The whole tensor, mapped from the file if it is in one part.

        Raises:
            TrajectoryError: a part is missing, malformed, or of another shape.
        """
        if sum(math.prod(sizes) for _, sizes, _ in self.parts) != math.prod(self.shape):
            raise TrajectoryError(f"lacks parts of {shown(self.name)}: some process did not save; leave it out.")
        whole = None
        for offsets, sizes, storage in self.parts:
            part = self._part(storage)
            if part.shape != sizes or part.dtype != self.dtype:
                raise TrajectoryError(MALFORMED)
            if sizes == self.shape:
                return part
            whole = torch.zeros(self.shape, dtype=self.dtype, device="cpu") if whole is None else whole
            place = tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
            whole[place].copy_(part)
        return torch.zeros(self.shape, dtype=self.dtype, device="cpu") if whole is None else whole

    def _part(self, storage: dict[str, Any]) -> Tensor:
        name, start, size = storage["relative_path"], storage["offset"], storage["length"]
        if Path(name).name != name or name in ("", ".", "..") or not 0 <= start <= start + size < _LARGEST:
            raise TrajectoryError(MALFORMED)
        if storage.get("transform_descriptors"):
            raise TrajectoryError("was saved compressed or encrypted: save it without extensions.")
        file = self.folder / name
        if not file.is_file():
            raise TrajectoryError(f"names {shown(name)}, which is not there: save or copy it again, or leave it out.")
        with file.open("rb") as opened:
            opened.seek(start)
            is_zip = opened.read(2) == b"PK"
        if not is_zip:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                found: Tensor = tensors.get_tensor(self.name)
                return found
        content = read_content(file, start=start, stop=start + size)
        if not isinstance(content, TensorRef):
            raise TrajectoryError(MALFORMED)
        return map_tensors(file, {"": content})[""]


def read_distributed(metadata: Path) -> dict[str, Any]:
    """What ``FOLDER/.metadata`` describes, nested as it was saved, with a :class:`ShardedRef` for each tensor.

    States of optimizers, and what is no tensor, are left out.

    Raises:
        TrajectoryError: it is not such a file, or made to harm; so do other errors of Python's.
    """
    known = read_content(metadata, max_opcodes=_MOST_OPCODES).state
    stored = known["storage_data"].items()
    stored = {_identity(index.state["fqn"], index.state.get("offset")): at.state for index, at in stored}
    paths, found = known.get("planner_data") or {}, dict[str, Any]()
    left = sum(file.stat().st_size for file in metadata.parent.glob("*") if file.is_file())
    for name, described in known["state_dict_metadata"].items():
        if not described.name.endswith(".TensorStorageMetadata") or name.startswith(_OPTIMIZER):
            continue
        dtype = getattr(torch, described.state["properties"].state[0].name.removeprefix("torch."))
        shape, parts = described.state["size"], []
        for chunk in (chunk.state for chunk in described.state["chunks"]):
            if (at := stored.get(_identity(name, chunk["offsets"]))) is None:
                raise TrajectoryError(f"does not say where {shown(name)} is: save it again, or leave it out.")
            parts.append((chunk["offsets"], chunk["sizes"], at))
        numbers = [*shape, *(number for offsets, sizes, _ in parts for number in (*offsets, *sizes))]
        if not all(type(number) is int and 0 <= number < _LARGEST for number in numbers):
            raise TrajectoryError(MALFORMED)
        left -= math.prod(shape) * dtype.itemsize
        if left < 0:
            raise TrajectoryError("has larger tensors than its files: save or copy it again, or leave it out.")
        ref = ShardedRef(None, dtype, 0, shape, (), metadata.parent, name, parts)  # type: ignore[arg-type]
        *where, last = paths.get(name) or (name,)
        place = found
        for part in where:
            place = place.setdefault(str(part), {})
        place[str(last)] = ref
    return found


def _identity(name: str, offset: tuple[int, ...] | None) -> str:
    """Of a part: strings are hashed with a secret, so that no file can make them collide."""
    return f"{name} {[0] if offset is None else list(offset)}"
