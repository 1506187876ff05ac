"""The rows of ``weights.bin``: checkpoints as they are, or as differences from a reference checkpoint."""

from __future__ import annotations

import hashlib
import mmap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.trajectory import differences
from lcsc_opt.trajectory.differences import StoredLayout
from lcsc_opt.trajectory.layout import Layout, Segment, TensorSpec, empty, from_bytes, row_sha256
from lcsc_opt.trajectory.merging import Tile, accumulator, blocks


class Rows(Protocol):
    """What a trajectory reads its checkpoints from, by slot."""

    def tensor(self, slot: int, spec: TensorSpec) -> Tensor:
        """One tensor of one checkpoint: new, the same bits each time and everywhere."""
        ...

    def tiles(self, segment: Segment, rows: int, *, at_most: int | None = None) -> Iterator[Tile]:
        """The columns of a segment in all slots, in order.

        Args:
            segment: neighbouring tensors of one dtype.
            rows: how many are held at once, in the dtype that is summed in.
            at_most: bytes that they take, about; ``None`` for what suits merging.
        """
        ...

    def sha256(self, slot: int) -> str:
        """Of the exact row of one checkpoint."""
        ...


class ExactRows:
    """Rows that are the checkpoints' own bytes.

    Args:
        rows: ``[slots, row_bytes]`` uint8, mapped.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def tensor(self, slot: int, spec: TensorSpec) -> Tensor:
        """See :class:`Rows`."""
        return from_bytes(self._rows[slot], spec)

    def sha256(self, slot: int) -> str:
        """See :class:`Rows`."""
        return hashlib.sha256(self._rows[slot].numpy().data).hexdigest()

    def tiles(self, segment: Segment, rows: int, *, at_most: int | None = None) -> Iterator[Tile]:
        """See :class:`Rows`."""
        region = self._rows[:, segment.start : segment.stop].view(segment.dtype)
        for start, stop in blocks(region.shape[1], rows, accumulator(segment.dtype).itemsize, at_most=at_most):
            yield Tile(start, stop, region[None, :, start:stop])


class DifferenceRows:
    """Rows of differences.

    Args:
        content: of the file, ``[bytes]`` uint8, mapped.
        layout: of the checkpoints.
        stored: of the rows.
        reference: ``[row_bytes]`` uint8, mapped: the exact row of the reference checkpoint.
    """

    def __init__(self, content: Tensor, layout: Layout, stored: StoredLayout, reference: Tensor) -> None:
        self._content, self._layout, self._stored, self._reference = content, layout, stored, reference

    def tensor(self, slot: int, spec: TensorSpec) -> Tensor:
        """See :class:`Rows`."""
        result = empty(spec)
        origin = self._reference[spec.offset : spec.end]
        result.reshape(-1).copy_(self._stored.read(self._content, slot, spec, origin))
        return result

    def sha256(self, slot: int) -> str:
        """See :class:`Rows`."""
        return row_sha256(self._layout, {spec.name: self.tensor(slot, spec) for spec in self._layout.tensors})

    def tiles(self, segment: Segment, rows: int, *, at_most: int | None = None) -> Iterator[Tile]:
        """See :class:`Rows`; a tile is in one block, whose numbers share their scales."""
        itemsize = accumulator(segment.dtype).itemsize
        column = 0
        for spec in segment.tensors:
            origin = self._reference[spec.offset : spec.end].view(segment.dtype)
            scales = self._stored.scales(self._content, spec.name)
            for block in range(scales.shape[1]):
                numbers = self._stored.numbers(self._content, spec.name, block)
                first = block * differences.BLOCK
                for start, stop in blocks(numbers.shape[2], rows, itemsize, at_most=at_most):
                    place = column + first + start, column + first + stop
                    yield Tile(*place, numbers[..., start:stop], scales[:, block], origin[first + start : first + stop])
            column += spec.numel


def map_bytes(path: Path, size: int) -> Tensor:
    """The first ``size`` bytes of a file, ``[size]`` uint8, mapped read-only.

    Raises:
        TrajectoryError: it is shorter, or cannot be mapped.
    """
    mapped = _map(path, size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _map(path: Path, size: int) -> mmap.mmap:
    """A private map would be refused when larger than the memory."""
    try:
        with path.open("rb") as file:
            there = file.seek(0, 2)
            if there < size:
                raise TrajectoryError(f"{path} is truncated: {there} bytes of {size}. Copy it or pack again.")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TrajectoryError(f"Cannot map {path}: {error}.") from error
