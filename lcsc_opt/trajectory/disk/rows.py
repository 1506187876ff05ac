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

LEAST_GAP = 2**17  # bytes; a disk reads fewer as fast as it skips them


@dataclasses.dataclass(frozen=True)
class Panels:
    """Where a segment lies in ``weights.bin``: in each of its panels one column follows the other.

    Attributes:
        first: the first byte of the first panel.
        step: bytes from one panel to the next.
        count: R, how many there are.
        slots: how many slots a panel holds.
        unit: bytes of a column in a panel.
    """

    first: int
    step: int
    count: int
    slots: int
    unit: int

    def used(self, runs: list[tuple[int, int]]) -> dict[int, tuple[int, int]]:
        """The panels that hold slots of these runs, each with the places of its slots, ``[first, last)``."""
        used: dict[int, tuple[int, int]] = {}
        for panel, place in (divmod(slot, self.slots) for run in sorted(runs) for slot in range(*run)):
            used[panel] = used.get(panel, (place, 0))[0], place + 1
        return used

    def needed(self, edges: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
        """The bytes ``[begin, end)`` of a panel that its slots at ``[first, last)`` have, but for small gaps.

        Args:
            edges: neighbouring ones of the segment; bytes are counted from the first.
            first: the place of a slot in the panel.
            last: the place behind another one.
        """
        needed: list[tuple[int, int]] = []
        for start, stop in itertools.pairwise(edges):
            block, size = (start - edges[0]) * self.unit, (stop - start) * self.unit // self.slots
            begin, end = block + first * size, block + last * size
            if needed and begin - needed[-1][1] < LEAST_GAP:
                begin = needed.pop()[0]
            needed.append((begin, end))
        return needed


@dataclasses.dataclass(frozen=True)
class Window:
    """Columns ``[start, stop)`` of a segment in all slots, wherever they are: mapped, read, or on a device.

    Attributes:
        segment: whose columns they are.
        start, stop: two of its edges.
        panels: ``[R, (stop − start) · unit]`` uint8.
        scales: ``[slots, blocks]`` float32; ``None`` where rows are exact.
        origin: the reference checkpoint's bytes; ``None`` where rows are exact.
    """

    segment: Segment
    start: int
    stop: int
    panels: Tensor
    scales: Tensor | None
    origin: Tensor | None

    def put(self, part: Window) -> None:
        """Copy the panels and the origin of some of the columns to their places."""
        columns = self.stop - self.start
        pairs = [(self.panels, part.panels)]
        if self.origin is not None and part.origin is not None:
            pairs.append((self.origin, part.origin))
        for whole, some in pairs:
            unit = whole.shape[-1] // columns
            whole[..., (part.start - self.start) * unit : (part.stop - self.start) * unit].copy_(some)


class Rows(Protocol):
    """What a trajectory reads its checkpoints from, by slot."""

    def tensor(self, slot: int, spec: TensorSpec) -> Tensor:
        """One tensor of one checkpoint: new, the same bits each time and everywhere."""
        ...

    def sha256(self, slot: int) -> str:
        """Of the exact row of one checkpoint."""
        ...

    def panels(self, segment: Segment) -> Panels:
        """Where the segment lies in the file."""
        ...

    def edges(self, segment: Segment) -> list[int]:
        """The columns between which a segment may be cut into windows, with 0 and its end: ``[blocks + 1]``."""
        ...

    def scales(self, segment: Segment) -> Tensor | None:
        """``[slots, blocks]`` float32, a copy; ``None`` where rows are exact."""
        ...

    def window(self, segment: Segment) -> Window:
        """The whole segment, mapped."""
        ...

    def tiles(self, window: Window, width: int, *, together: bool = False) -> Iterator[Tile]:
        """The columns of a window in all slots, in order.

        Args:
            window: made from these rows.
            width: of a tile, in columns, about.
            together: several blocks may be one tile, which saves calls and takes a multiplication of every number.
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

    def panels(self, segment: Segment) -> Panels:
        """See :class:`Rows`; a panel is one row."""
        slots, row_bytes = self._rows.shape
        return Panels(segment.start, row_bytes, slots, 1, segment.dtype.itemsize)

    def edges(self, segment: Segment) -> list[int]:
        """See :class:`Rows`."""
        return [*range(0, segment.columns, differences.BLOCK), segment.columns]

    def scales(self, segment: Segment) -> Tensor | None:  # noqa: ARG002
        """See :class:`Rows`."""
        return None

    def window(self, segment: Segment) -> Window:
        """See :class:`Rows`."""
        return Window(segment, 0, segment.columns, self._rows[:, segment.start : segment.stop], None, None)

    def tiles(self, window: Window, width: int, *, together: bool = False) -> Iterator[Tile]:  # noqa: ARG002
        """See :class:`Rows`."""
        numbers = window.panels.view(window.segment.dtype)[None, None]
        for start, stop in ranges(window.stop - window.start, width):
            yield Tile(window.start + start, window.start + stop, numbers[..., start:stop])


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

    def panels(self, segment: Segment) -> Panels:
        """See :class:`Rows`; a panel is ``PANEL`` rows."""
        first, height = self._stored.places[segment.tensors[0].name].offset, differences.PANEL
        step = height * self._stored.row_bytes
        return Panels(height * first, step, len(self._content) // step, height, height * self._stored.dtype.itemsize)

    def edges(self, segment: Segment) -> list[int]:
        """See :class:`Rows`; windows hold whole blocks."""
        begins = [column + first for spec, column in segment.places() for first in range(0, spec.numel, _block())]
        return [*begins, segment.columns]

    def scales(self, segment: Segment) -> Tensor | None:
        """See :class:`Rows`."""
        return torch.cat([self._stored.scales(self._content, spec.name) for spec in segment.tensors], dim=1)

    def window(self, segment: Segment) -> Window:
        """See :class:`Rows`."""
        where = self.panels(segment)
        panels = self._content[where.first :].as_strided((where.count, segment.columns * where.unit), (where.step, 1))
        origin = self._reference[segment.start : segment.stop]
        return Window(segment, 0, segment.columns, panels, self.scales(segment), origin)

    def tiles(self, window: Window, width: int, *, together: bool = False) -> Iterator[Tile]:
        """See :class:`Rows`; the numbers of a block share their scales."""
        block = 0
        for spec, column in window.segment.places():
            start, stop = max(column, window.start), min(column + spec.numel, window.stop)
            if start >= stop:
                continue
            whole = (stop - start) // _block() if together else 0
            at_once = max(width // _block(), 1)
            for first, last in ranges(whole, at_once):
                yield self._tile(window, start + first * _block(), start + last * _block(), block + first, last - first)
            block += whole
            for first in range(start + whole * _block(), stop, _block()):
                blocks = self._tile(window, first, min(first + _block(), stop), block, 1)
                yield from blocks.split(width)
                block += 1

    def _tile(self, window: Window, start: int, stop: int, block: int, blocks: int) -> Tile:
        """``blocks`` blocks of one tensor, of one length."""
        assert window.scales is not None
        assert window.origin is not None
        panel = differences.PANEL
        unit = panel * self._stored.dtype.itemsize
        numbers = window.panels[:, (start - window.start) * unit : (stop - window.start) * unit]
        numbers = numbers.view(self._stored.dtype).view(-1, blocks, panel, (stop - start) // blocks)
        origin = window.origin.view(window.segment.dtype)[start - window.start : stop - window.start]
        return Tile(start, stop, numbers, window.scales[:, block : block + blocks], origin)


def _block() -> int:
    return differences.BLOCK


def ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """``[first, last)`` of at most ``size`` each."""
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
    """A private map would be refused when larger than the memory."""
    try:
        with path.open("rb") as file:
            there = file.seek(0, 2)
            if there < size:
                raise TrajectoryError(f"{path} is truncated: {there} bytes of {size}. Copy it or pack again.")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TrajectoryError(f"Cannot map {path}: {error}.") from error
