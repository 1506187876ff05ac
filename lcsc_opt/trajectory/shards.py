"""Which bytes of a row each process of a sharded training writes.

A tensor that is sharded by FSDP2 or tensor parallelism is a DTensor: each process has some of its indices. Values that
several processes have are written by the first of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.layout import Layout, TensorSpec

_Runs = tuple[range, ...]
"""Indices along a dimension, as they follow each other in a local tensor."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a tensor that a process writes.

    Attributes:
        shape: of the whole tensor.
        runs: for each dimension, the indices that the local tensor has.
    """

    shape: tuple[int, ...]
    runs: tuple[_Runs, ...]

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Part:
        """All of a tensor."""
        return cls(tuple(shape), tuple((range(size),) for size in shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the local tensor."""
        return tuple(sum(map(len, runs)) for runs in self.runs)

    def spans(self, itemsize: int) -> Iterator[tuple[int, int]]:
        """The bytes ``[start, stop)`` of the whole tensor in which the local one lies, in the order of its bytes."""
        if math.prod(self.local_shape) == 0:
            return
        cut = [dim for dim, runs in enumerate(self.runs) if runs != (range(self.shape[dim]),)]
        if not cut:
            yield 0, math.prod(self.shape) * itemsize
            return
        last = cut[-1]  # behind it, the local tensor has all that lies together
        inner_bytes = math.prod(self.shape[last + 1 :]) * itemsize
        outer = [itertools.chain.from_iterable(runs) for runs in self.runs[:last]]
        for indices in itertools.product(*outer):
            row = 0
            for index, size in zip(indices, self.shape, strict=False):
                row = row * size + index
            first = row * self.shape[last]
            for run in self.runs[last]:
                yield (first + run.start) * inner_bytes, (first + run.stop) * inner_bytes


@dataclasses.dataclass(frozen=True)
class ShardedLayout(Layout):
    """The layout of the local tensors of a process, with what they are parts of.

    Attributes:
        row_layout: the layout of a row.
        parts: name → the part of that tensor.
    """

    row_layout: Layout
    parts: Mapping[str, Part]

    def write(self, descriptor: int, offset: int, spec: TensorSpec, content: Tensor) -> int:
        """Write the local tensor ``spec``, ``[n]`` uint8, into the row that begins at ``offset``.

        Returns:
            The sum of its bytes.

        Raises:
            OSError: the disk refuses.
        """
        view = content.numpy().data
        for start, stop, position in self._places(spec):
            _write_at(descriptor, view[position : position + stop - start], offset + start)
        return sum_of_bytes(content)

    def write_padding(self, descriptor: int, offset: int) -> None:
        """Write the zeros between the tensors of a row, and behind the last one; as :meth:`write`."""
        for spec, start, stop in self.row_layout.spans():
            if spec is None:
                _write_at(descriptor, memoryview(bytes(stop - start)), offset + start)

    def is_written(self, spec: TensorSpec, content: Tensor, row_content: Tensor) -> bool:
        """Whether the bytes of a tensor in a row, ``[n]`` uint8, are those of the local tensor where that lies."""
        place = self._offsets[spec.name]
        return all(
            torch.equal(content[position : position + stop - start], row_content[start - place : stop - place])
            for start, stop, position in self._places(spec)
        )

    def _places(self, spec: TensorSpec) -> Iterator[tuple[int, int, int]]:
        """Bytes ``[start, stop)`` of a row, and where they begin in the local tensor."""
        place = self._offsets[spec.name]
        position = 0
        for start, stop in self.parts[spec.name].spans(spec.torch_dtype.itemsize):
            yield place + start, place + stop, position
            position += stop - start

    @functools.cached_property
    def _offsets(self) -> dict[str, int]:
        return {spec.name: spec.offset for spec in self.row_layout.tensors}


def sharded(
    row_layout: Layout, tensors: Mapping[str, Tensor], *, is_first: bool
) -> tuple[ShardedLayout, dict[str, Tensor]]:
    """What this process writes of a checkpoint whose row has the layout ``row_layout``.

    Args:
        row_layout: the layout of a row.
        tensors: name → DTensor, or a plain tensor, which the first process writes.
        is_first: whether this process is the first one.

    Returns:
        The layout of its part, and the local tensors; those that another process writes are empty.

    Raises:
        TrajectoryError: a tensor is sharded in a way that is not known, or holds partial sums.
    """
    parts: dict[str, Part] = {}
    local_tensors: dict[str, Tensor] = {}
    described: list[tuple[str, tuple[int, ...], str]] = []
    for spec in row_layout.tensors:
        part, local = _local(spec.name, tensors[spec.name], is_first)
        parts[spec.name] = part
        local_tensors[spec.name] = local
        described.append((spec.name, tuple(local.shape), spec.dtype))
    arranged = Layout.arranged(described)
    return ShardedLayout(arranged.tensors, arranged.row_bytes, row_layout, parts), local_tensors


def check_not_sharded(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor of which this process has a part only.

    Raises:
        TrajectoryError: there is one.
    """
    for name, tensor in tensors.items():
        if _is_distributed(tensor):
            raise TrajectoryError(
                f"Tensor {name!r} is a {type(tensor).__name__}, a part of which is in each process: make the writer "
                "with sharded=True in every process."
            )


def sum_of_bytes(content: Tensor) -> int:
    """The sum of ``[n]`` uint8: whether the bytes that one process reads are those that others wrote."""
    return int(content.sum(dtype=torch.int64))


def _local(name: str, tensor: Tensor, is_first: bool) -> tuple[Part, Tensor]:
    """The part of a tensor that this process writes, and its values."""
    if not _is_distributed(tensor):
        if is_first:
            return Part.all_of(tensor.shape), tensor
        return _no_part(tensor)
    distributed: Any = tensor.detach()
    if not hasattr(distributed, "placements"):
        raise TrajectoryError(
            f"Tensor {name!r} is a {type(tensor).__name__}, of FSDP1: shard the model with fully_shard (FSDP2)."
        )
    coordinate = distributed.device_mesh.get_coordinate()
    placements = distributed.placements
    for placement in placements:
        _check_placement(name, placement)
    local = distributed.to_local()
    if coordinate is None or _is_copy(placements, coordinate):
        return _no_part(local)
    part = part_of(tuple(tensor.shape), placements, tuple(distributed.device_mesh.shape), coordinate)
    if part.local_shape != tuple(local.shape):
        raise TrajectoryError(
            f"Tensor {name!r} is sharded in a way that is not known ({placements}): give the weights of a model that "
            "fully_shard or parallelize_module has sharded."
        )
    return part, local


def part_of(
    shape: tuple[int, ...], placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> Part:
    """The part of a tensor at a place of a mesh of processes.

    Each placement ``Shard(dim)`` divides what the ones before it left, as ``torch.chunk`` does. FSDP2 on top of tensor
    parallelism shards a dimension that is sharded already (``_StridedShard``): of each of those shards, a part.
    """
    runs: list[_Runs] = [(range(size),) for size in shape]
    for placement, count, position in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = placement.dim
        divided: list[range] = []
        split_factor = getattr(placement, "split_factor", 1)
        for number in range(split_factor):
            shard = _chunk(runs[dim], split_factor, number)
            divided += _chunk(shard, count, position)
        runs[dim] = _joined(divided)
    return Part(shape, tuple(runs))


def _no_part(tensor: Tensor) -> tuple[Part, Tensor]:
    return Part((0,), ((),)), tensor.detach().new_empty(0)


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements") or type(tensor).__name__ == "ShardedTensor"


def _is_copy(placements: Sequence[Any], coordinate: Sequence[int]) -> bool:
    """Whether an earlier process of the mesh has the same values."""
    places = zip(placements, coordinate, strict=True)
    return any(placement.is_replicate() and position > 0 for placement, position in places)


def _check_placement(name: str, placement: Any) -> None:
    if placement.is_partial():
        raise TrajectoryError(
            f"Tensor {name!r} holds partial sums ({placement}), not weights: redistribute it before it is saved."
        )
    if not placement.is_replicate() and not hasattr(placement, "dim"):
        raise TrajectoryError(f"Tensor {name!r} is placed in a way that is not known ({placement}).")


def _chunk(runs: Sequence[range], count: int, position: int) -> list[range]:
    """The indices of the chunk at ``position`` of ``count``, as ``torch.chunk`` divides them."""
    total = sum(map(len, runs))
    size = -(-total // count)
    start = size * position
    stop = start + size
    chunk: list[range] = []
    for run in runs:
        piece = run[max(start, 0) : max(stop, 0)]
        if piece:
            chunk.append(piece)
        start -= len(run)
        stop -= len(run)
    return chunk


def _joined(runs: Sequence[range]) -> _Runs:
    """The same indices in the fewest runs."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _write_at(descriptor: int, remaining: memoryview, position: int) -> None:
    while remaining:
        written = os.pwrite(descriptor, remaining, position)
        remaining = remaining[written:]
        position += written
