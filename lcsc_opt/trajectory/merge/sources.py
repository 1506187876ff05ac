"""Where a merge finds the bytes of a trajectory: in the map, in a device's memory, or read anew each time."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from lcsc_opt.base.progress import progress
from lcsc_opt.trajectory.disk.layout import Segment
from lcsc_opt.trajectory.disk.rows import Columns, Rows, SegmentPlace, SlotRanges
from lcsc_opt.trajectory.merge.memory import PAGE, page_aligned
from lcsc_opt.trajectory.merge.reading import Extent, Reader, Reading

Placement = Literal["mapped", "resident", "streamed"]
READ_BYTES = 64 * 2**20  # of the columns that are read at once, at most
NEIGHBOUR_BYTES = 2**20  # that a group of rows gives to a read, unless that became too large
BUFFERS = 3  # reads at once: one is combined, one is there or nearly, and the disk has work
CPU = torch.device("cpu")


class Source(Protocol):
    """What gives a merge the numbers that it combines.

    Attributes:
        device: where they are when they are given.
        threads: whether tiles are combined in threads, small ones that fit into a cache; else one after the other,
            as large as a device wants them.
    """

    device: torch.device
    threads: bool

    def columns(self, segments: Sequence[Segment], slots: SlotRanges) -> Generator[Columns]:
        """All columns of these segments in order, some at a time.

        Rows in other slots may hold anything. What was given is valid until the next is asked for. Close the iterator
        when leaving it early.
        """
        ...


class Mapped:
    """The file as it is mapped: the system keeps what fits into memory."""

    device, threads = CPU, True

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def columns(self, segments: Sequence[Segment], slots: SlotRanges) -> Generator[Columns]:  # noqa: ARG002
        """See :class:`Source`."""
        for segment in segments:
            yield self._rows.mapped(segment)


@dataclasses.dataclass(frozen=True)
class _PlannedRead:
    """Some blocks of a segment to read, and where they go in a buffer: each byte to its place in a page on the disk.

    Attributes:
        segment: whose blocks they are.
        first: the number of the first block.
        edges: the columns at which the blocks begin, and the end of the last one.
        where: the segment.
        coded: whether the reference checkpoint is read, too.
    """

    segment: Segment
    first: int
    edges: Sequence[int]
    where: SegmentPlace
    coded: bool

    @property
    def group_bytes(self) -> int:
        return (self.edges[-1] - self.edges[0]) * self.where.unit

    @property
    def step(self) -> int:
        """From one group to the next."""
        return _pages(self.group_bytes) + 2 * PAGE + self.where.step % PAGE

    @property
    def begin(self) -> int:
        """In the file."""
        return self.where.first + self.edges[0] * self.where.unit

    @property
    def origin_begin(self) -> int:
        """In the file of the reference checkpoint."""
        return self.segment.start + self.edges[0] * self.segment.dtype.itemsize

    @property
    def origin_bytes(self) -> int:
        return (self.edges[-1] - self.edges[0]) * self.segment.dtype.itemsize if self.coded else 0

    @property
    def origin_target(self) -> int:
        return _pages(self.where.count * self.step + PAGE) + self.origin_begin % PAGE

    @property
    def size(self) -> int:
        """Of a buffer, in whole pages."""
        return _pages(self.origin_target + self.origin_bytes)

    def extents(self, used: Mapping[int, tuple[int, int]]) -> Iterator[Extent]:
        """What is read of the groups of rows that are used, and of the reference checkpoint."""
        for group, rows in used.items():
            offset, target = self.begin + group * self.where.step, self.begin % PAGE + group * self.step
            for first, last in self.where.needed(self.edges, *rows):
                yield Extent(0, offset + first, last - first, target + first)
        if self.coded:
            yield Extent(1, self.origin_begin, self.origin_bytes, self.origin_target)

    def filled(self, content: Tensor, scales: Tensor | None) -> Columns:
        """What was read."""
        groups = content[self.begin % PAGE :].as_strided((self.where.count, self.group_bytes), (self.step, 1))
        origin = content[self.origin_target : self.origin_target + self.origin_bytes] if self.coded else None
        own = None if scales is None else scales[:, self.first : self.first + len(self.edges) - 1]
        return Columns(self.segment, self.edges[0], self.edges[-1], groups, own, origin)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Streamed:
    """Read for each merge: while some columns are combined, the next are read into memory of fixed size.

    For a GPU the memory is pinned, and columns are copied to it while those before are combined. One merge at a time.

    Args:
        rows: of the trajectory.
        segments: all that are ever asked for.
        paths: of the file of the rows, and of the reference checkpoint.
        device: where columns are wanted.
        around_cache: the system shall not keep what was read, since it cannot keep all of it.
    """

    def __init__(
        self,
        rows: Rows,
        segments: Sequence[Segment],
        paths: Sequence[Path],
        device: torch.device = CPU,
        *,
        around_cache: bool = False,
    ) -> None:
        self.device, self.threads = device, device.type == "cpu"
        self._rows, self._paths, self._around_cache = rows, paths, around_cache
        self._scales = {segment: _to(rows.scales(segment), device) for segment in segments}
        self._reads = {segment: list(self._planned(segment)) for segment in segments}
        self._buffers: list[_Buffer] = []
        self._lock = threading.Lock()

    def columns(self, segments: Sequence[Segment], slots: SlotRanges) -> Generator[Columns]:
        """See :class:`Source`."""
        reads = [read for segment in segments for read in self._reads[segment]]
        with self._lock, Reader(self._paths, around_cache=self._around_cache) as reader:
            buffers = self._all_buffers()

            def begin(number: int) -> Reading:
                buffer, read = buffers[number % BUFFERS], reads[number]
                buffer.wait()
                return reader.begin(list(read.extents(read.where.used(slots))), buffer.host)

            ahead = collections.deque(begin(number) for number in range(min(BUFFERS - 1, len(reads))))
            for number, read in enumerate(reads):
                ahead.popleft().wait()
                if number + BUFFERS - 1 < len(reads):  # into the buffer of the read before this one
                    ahead.append(begin(number + BUFFERS - 1))
                buffer = buffers[number % BUFFERS]
                yield read.filled(buffer.content(), self._scales[read.segment])
                buffer.used()

    def count(self, segments: Sequence[Segment]) -> int:
        """How many times columns are read."""
        return sum(len(self._reads[segment]) for segment in segments)

    def room(self, segment: Segment) -> Columns:
        """Memory on the device for a whole segment, with its scales and nothing else in it yet."""
        where, scales = self._rows.place(segment), self._scales[segment]
        groups = torch.empty(where.count, segment.width * where.unit, dtype=torch.uint8, device=self.device)
        size = segment.stop - segment.start
        origin = None if scales is None else torch.empty(size, dtype=torch.uint8, device=self.device)
        return Columns(segment, 0, segment.width, groups, scales, origin)

    def _all_buffers(self) -> list[_Buffer]:
        if not self._buffers:
            size = max((read.size for reads in self._reads.values() for read in reads), default=0)
            self._buffers = [_Buffer(size, self.device) for _ in range(BUFFERS)]
        return self._buffers

    def _planned(self, segment: Segment) -> Iterator[_PlannedRead]:
        edges, where = self._rows.edges(segment), self._rows.place(segment)
        width = _read_bytes(segment, where) // (where.count * where.unit)
        first = 0
        while first < len(edges) - 1:
            last = max(bisect.bisect_right(edges, edges[first] + width) - 1, first + 1)
            yield _PlannedRead(segment, first, edges[first : last + 1], where, self._scales[segment] is not None)
            first = last


def _read_bytes(segment: Segment, where: SegmentPlace) -> int:
    """All buffers are little beside a merged model, unless reads became too short for a disk."""
    model = segment.stop - segment.start
    return max(min(READ_BYTES, model // 24), min(where.count * NEIGHBOUR_BYTES, model // 8))


class Resident:
    """In the memory of a device, copied there once.

    Args:
        streamed: what brings all there.
        segments: what is copied.
        slots: those that hold checkpoints.
        name: of the trajectory, for the progress.
    """

    threads = False

    def __init__(self, streamed: Streamed, segments: Sequence[Segment], slots: SlotRanges, name: str) -> None:
        self.device = streamed.device
        self._columns = {segment: streamed.room(segment) for segment in segments}
        with (
            contextlib.closing(streamed.columns(segments, slots)) as read,
            progress(f"{name} to {self.device}", streamed.count(segments)) as advance,
        ):
            for columns in read:
                self._columns[columns.segment].put(columns)
                advance()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def columns(self, segments: Sequence[Segment], slots: SlotRanges) -> Generator[Columns]:  # noqa: ARG002
        """See :class:`Source`."""
        for segment in segments:
            yield self._columns[segment]


class _Buffer:
    """Memory for one read at a time: on the CPU, and on the device where that is another."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.host = page_aligned(size, pinned=self._gpu)
        if self._gpu:
            self._there = torch.empty(size, dtype=torch.uint8, device=device)
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies.wait_stream(torch.cuda.current_stream(device))  # whoever had this memory may still use it
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until :attr:`host` may be written to."""
        if self._gpu:
            self._copied.synchronize()

    def content(self) -> Tensor:
        """What :attr:`host` holds, on the device; the current stream waits for it."""
        if not self._gpu:
            return self.host
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used)
            self._there.copy_(self.host, non_blocking=True)
            self._copied.record()
        torch.cuda.current_stream(self._there.device).wait_event(self._copied)
        return self._there

    def used(self) -> None:
        """Say that everything is queued that uses :meth:`content`."""
        if self._gpu:
            self._used.record(torch.cuda.current_stream(self._there.device))


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
