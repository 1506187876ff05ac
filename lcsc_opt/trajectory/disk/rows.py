"""The rows of ``weights.bin``: checkpoints as they are, or as differences from a reference checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import mmap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.disk import differences
from lcsc_opt.trajectory.disk.differences import StoredLayout
from lcsc_opt.trajectory.disk.layout import Layout, Segment, TensorSpec, empty, from_bytes, row_sha256
from lcsc_opt.trajectory.disk.tiles import Tile

SlotRanges = list[tuple[int, int]]
"""Slots as ranges ``[first, last)``."""

LEAST_GAP = 2**17  # bytes; a disk reads fewer as fast as it skips them


@dataclasses.dataclass(frozen=True)
class SegmentPlace:
    """Where a segment lies in ``weights.bin``: in each group of rows one column follows the other.

    Attributes:
        first: its first byte in the first group.
        step: bytes from one group to the next.
        count: how many groups there are.
        rows: how many rows a group has.
        unit: bytes of a column in a group.
    """

    first: int
    step: int
    count: int
    rows: int
    unit: int

    def used(self, slots: SlotRanges) -> dict[int, tuple[int, int]]:
        """The groups that hold these slots, each with the range ``[first, last)`` of its rows that do."""
        used: dict[int, tuple[int, int]] = {}
        for group, row in (divmod(slot, self.rows) for some in sorted(slots) for slot in range(*some)):
            used[group] = used.get(group, (row, 0))[0], row + 1
        return used

    def needed(self, edges: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
        """The byte ranges ``[begin, end)`` of a group that hold its rows ``[first, last)``; small gaps are read, too.

        Args:
            edges: neighbouring edges of the segment; bytes are counted from the first one.
            first: the first row, within the group.
            last: the row behind the last one.
        """
        needed: list[tuple[int, int]] = []
        for start, stop in itertools.pairwise(edges):
            block, size = (start - edges[0]) * self.unit, (stop - start) * self.unit // self.rows
            begin, end = block + first * size, block + last * size
            if needed and begin - needed[-1][1] < LEAST_GAP:
                begin = needed.pop()[0]
            needed.append((begin, end))
        return needed


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns ``[start, stop)`` of a segment in all slots: mapped, read, or on a device.

    Attributes:
        segment: whose columns they are.
        start, stop: two of its edges.
        groups: ``[groups of rows, (stop − start) · unit]`` uint8.
        scales: ``[slots, blocks]`` float32; ``None`` where rows are exact.
        origin: the reference checkpoint's bytes; ``None`` where rows are exact.
    """

    segment: Segment
    start: int
    stop: int
    groups: Tensor
    scales: Tensor | None
    origin: Tensor | None

    def put(self, part: Columns) -> None:
        """Copy some of the columns, with their origin, to their places."""
        width = self.stop - self.start
        pairs = [(self.groups, part.groups)]
        if self.origin is not None and part.origin is not None:
            pairs.append((self.origin, part.origin))
        for whole, some in pairs:
            unit = whole.shape[-1] // width
            whole[..., (part.start - self.start) * unit : (part.stop - self.start) * unit].copy_(some)


class Rows(Protocol):
    """The rows of a trajectory, by slot."""

    def tensor(self, slot: int, spec: TensorSpec) -> Tensor:
        """A new tensor: one tensor of one checkpoint, with the same bits on every machine."""
        ...

    def sha256(self, slot: int) -> str:
        """The SHA-256 of the exact row of one checkpoint."""
        ...

    def place(self, segment: Segment) -> SegmentPlace:
        """Where the segment lies in the file."""
        ...

    def edges(self, segment: Segment) -> list[int]:
        """The columns at which the blocks of a segment begin, and its end: ``[blocks + 1]``. Whole blocks are read."""
        ...

    def scales(self, segment: Segment) -> Tensor | None:
        """``[slots, blocks]`` float32, a copy; ``None`` where rows are exact."""
        ...

    def mapped(self, segment: Segment) -> Columns:
        """The whole segment, mapped."""
        ...

    def tiles(self, columns: Columns, width: int, *, together: bool = False) -> Iterator[Tile]:
        """The tiles of some columns, in order.

        Args:
            columns: of these rows.
            width: about how many columns a tile has.
            together: whether a tile may hold several blocks: fewer calls, but every number is multiplied by its scale.
        """
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

    def place(self, segment: Segment) -> SegmentPlace:
        """See :class:`Rows`; a group is one row."""
        slots, row_bytes = self._rows.shape
        return SegmentPlace(segment.start, row_bytes, slots, 1, segment.dtype.itemsize)

    def edges(self, segment: Segment) -> list[int]:
        """See :class:`Rows`."""
        return [*range(0, segment.width, differences.BLOCK_COLUMNS), segment.width]

    def scales(self, segment: Segment) -> Tensor | None:  # noqa: ARG002
        """See :class:`Rows`."""
        return None

    def mapped(self, segment: Segment) -> Columns:
        """See :class:`Rows`."""
        return Columns(segment, 0, segment.width, self._rows[:, segment.start : segment.stop], None, None)

    def tiles(self, columns: Columns, width: int, *, together: bool = False) -> Iterator[Tile]:  # noqa: ARG002
        """See :class:`Rows`."""
        numbers = columns.groups.view(columns.segment.dtype)[None, None]
        for start, stop in portions(columns.stop - columns.start, width):
            yield Tile(columns.start + start, columns.start + stop, numbers[..., start:stop])


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

    def place(self, segment: Segment) -> SegmentPlace:
        """See :class:`Rows`; a group is ``BLOCK_ROWS`` rows."""
        first, height = self._stored.places[segment.tensors[0].name].offset, differences.BLOCK_ROWS
        step = height * self._stored.row_bytes
        return SegmentPlace(
            height * first, step, len(self._content) // step, height, height * self._stored.dtype.itemsize
        )

    def edges(self, segment: Segment) -> list[int]:
        """See :class:`Rows`."""
        begins = [column + first for spec, column in segment.places() for first in range(0, spec.numel, _block())]
        return [*begins, segment.width]

    def scales(self, segment: Segment) -> Tensor | None:
        """See :class:`Rows`."""
        return torch.cat([self._stored.scales(self._content, spec.name) for spec in segment.tensors], dim=1)

    def mapped(self, segment: Segment) -> Columns:
        """See :class:`Rows`."""
        where = self.place(segment)
        groups = self._content[where.first :].as_strided((where.count, segment.width * where.unit), (where.step, 1))
        origin = self._reference[segment.start : segment.stop]
        return Columns(segment, 0, segment.width, groups, self.scales(segment), origin)

    def tiles(self, columns: Columns, width: int, *, together: bool = False) -> Iterator[Tile]:
        """See :class:`Rows`; the numbers of a block share their scales."""
        block = 0
        for spec, column in columns.segment.places():
            start, stop = max(column, columns.start), min(column + spec.numel, columns.stop)
            if start >= stop:
                continue
            whole = (stop - start) // _block() if together else 0
            at_once = max(width // _block(), 1)
            for first, last in portions(whole, at_once):
                yield self._tile(
                    columns, start + first * _block(), start + last * _block(), block + first, last - first
                )
            block += whole
            for first in range(start + whole * _block(), stop, _block()):
                blocks = self._tile(columns, first, min(first + _block(), stop), block, 1)
                yield from blocks.split(width)
                block += 1

    def _tile(self, columns: Columns, start: int, stop: int, block: int, blocks: int) -> Tile:
        """A tile of ``blocks`` blocks of one tensor, all of one length."""
        assert columns.scales is not None
        assert columns.origin is not None
        rows = differences.BLOCK_ROWS
        unit = rows * self._stored.dtype.itemsize
        numbers = columns.groups[:, (start - columns.start) * unit : (stop - columns.start) * unit]
        numbers = numbers.view(self._stored.dtype).view(-1, blocks, rows, (stop - start) // blocks)
        origin = columns.origin.view(columns.segment.dtype)[start - columns.start : stop - columns.start]
        return Tile(start, stop, numbers, columns.scales[:, block : block + blocks], origin)


def _block() -> int:
    return differences.BLOCK_COLUMNS


def portions(count: int, size: int) -> Iterator[tuple[int, int]]:
    """``count`` numbers as ranges ``[first, last)`` of at most ``size`` each."""
    for first in range(0, count, size):
        yield first, min(first + size, count)


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
    """Map a file shared: a private map larger than the memory would be refused."""
    try:
        with path.open("rb") as file:
            there = file.seek(0, 2)
            if there < size:
                raise TrajectoryError(f"{path} is truncated: {there} bytes of {size}. Copy it or pack again.")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TrajectoryError(f"Cannot map {path}: {error}.") from error
