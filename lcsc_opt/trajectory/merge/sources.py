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
from lcsc_opt.trajectory.disk.rows import Rows, Strips, Window
from lcsc_opt.trajectory.merge.memory import PAGE, page_aligned
from lcsc_opt.trajectory.merge.reading import Piece, Reader, Reading

How = Literal["mapped", "resident", "streamed"]
WINDOW_BYTES = 64 * 2**20  # that are read at once, at most
PIECE_BYTES = 2**20  # of neighbouring bytes, unless the windows became too large
LANES = 3  # windows at once: one is combined, one is there or nearly, and the disk has work
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

    def windows(self, segments: Sequence[Segment], runs: list[tuple[int, int]]) -> Generator[Window]:
        """All columns of these segments, in order.

        A window holds what ``runs`` name, anything elsewhere, and is valid until the next one is asked for. Close the
        iterator when leaving it early.
        """
        ...


class Mapped:
    """The file as it is mapped: the system keeps what fits into memory."""

    device, threads = CPU, True

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def windows(self, segments: Sequence[Segment], runs: list[tuple[int, int]]) -> Generator[Window]:  # noqa: ARG002
        """See :class:`Source`."""
        for segment in segments:
            yield self._rows.window(segment)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some blocks of a segment, and where they go in a buffer: each byte to the place in its page that it has on disk.

    Attributes:
        segment: whose blocks they are.
        first: the number of the first block.
        cuts: the columns at which the blocks begin, and the end of the last one.
        where: the segment.
        coded: whether the reference checkpoint is read, too.
    """

    segment: Segment
    first: int
    cuts: Sequence[int]
    where: Strips
    coded: bool

    @property
    def strip_bytes(self) -> int:
        return (self.cuts[-1] - self.cuts[0]) * self.where.unit

    @property
    def step(self) -> int:
        """From one strip to the next."""
        return _pages(self.strip_bytes) + 2 * PAGE + self.where.step % PAGE

    @property
    def begin(self) -> int:
        """In the file."""
        return self.where.first + self.cuts[0] * self.where.unit

    @property
    def origin_begin(self) -> int:
        """In the file of the reference checkpoint."""
        return self.segment.start + self.cuts[0] * self.segment.dtype.itemsize

    @property
    def origin_bytes(self) -> int:
        return (self.cuts[-1] - self.cuts[0]) * self.segment.dtype.itemsize if self.coded else 0

    @property
    def origin_target(self) -> int:
        return _pages(self.where.count * self.step + PAGE) + self.origin_begin % PAGE

    @property
    def size(self) -> int:
        """Of a buffer, in whole pages."""
        return _pages(self.origin_target + self.origin_bytes)

    def pieces(self, used: Mapping[int, tuple[int, int]]) -> Iterator[Piece]:
        """What is read of the strips that are used, and of the reference checkpoint."""
        for strip, places in used.items():
            offset, target = self.begin + strip * self.where.step, self.begin % PAGE + strip * self.step
            for first, last in self.where.needed(self.cuts, *places):
                yield Piece(0, offset + first, last - first, target + first)
        if self.coded:
            yield Piece(1, self.origin_begin, self.origin_bytes, self.origin_target)

    def window(self, content: Tensor, scales: Tensor | None) -> Window:
        """What was read, as a window."""
        strips = content[self.begin % PAGE :].as_strided((self.where.count, self.strip_bytes), (self.step, 1))
        origin = content[self.origin_target : self.origin_target + self.origin_bytes] if self.coded else None
        own = None if scales is None else scales[:, self.first : self.first + len(self.cuts) - 1]
        return Window(self.segment, self.cuts[0], self.cuts[-1], strips, own, origin)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Streamed:
    """Read for each merge: while one window is combined, the next is read, in long pieces and a fixed memory.

    For a GPU the memory is pinned, and a window is copied to it while the one before is combined. One merge at a time.

    Args:
        rows: of the trajectory.
        segments: all that are ever asked for.
        paths: of the file of the rows, and of the reference checkpoint.
        device: where windows are wanted.
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
        self._parts = {segment: list(self._cut(segment)) for segment in segments}
        self._lanes: list[_Lane] = []
        self._lock = threading.Lock()

    def windows(self, segments: Sequence[Segment], runs: list[tuple[int, int]]) -> Generator[Window]:
        """See :class:`Source`."""
        parts = [part for segment in segments for part in self._parts[segment]]
        with self._lock, Reader(self._paths, around_cache=self._around_cache) as reader:
            lanes = self._all_lanes()

            def begin(number: int) -> Reading:
                lane, part = lanes[number % LANES], parts[number]
                lane.wait()
                return reader.begin(list(part.pieces(part.where.used(runs))), lane.host)

            ahead = collections.deque(begin(number) for number in range(min(LANES - 1, len(parts))))
            for number, part in enumerate(parts):
                ahead.popleft().wait()
                if number + LANES - 1 < len(parts):  # into the lane of the window before this one
                    ahead.append(begin(number + LANES - 1))
                lane = lanes[number % LANES]
                yield part.window(lane.content(), self._scales[part.segment])
                lane.used()

    def count(self, segments: Sequence[Segment]) -> int:
        """How many windows there are."""
        return sum(len(self._parts[segment]) for segment in segments)

    def room(self, segment: Segment) -> Window:
        """Memory on the device for a whole segment, with its scales and nothing else in it yet."""
        where, scales = self._rows.strips(segment), self._scales[segment]
        strips = torch.empty(where.count, segment.columns * where.unit, dtype=torch.uint8, device=self.device)
        size = segment.stop - segment.start
        origin = None if scales is None else torch.empty(size, dtype=torch.uint8, device=self.device)
        return Window(segment, 0, segment.columns, strips, scales, origin)

    def _all_lanes(self) -> list[_Lane]:
        if not self._lanes:
            size = max((part.size for parts in self._parts.values() for part in parts), default=0)
            self._lanes = [_Lane(size, self.device) for _ in range(LANES)]
        return self._lanes

    def _cut(self, segment: Segment) -> Iterator[_Part]:
        cuts, where = self._rows.cuts(segment), self._rows.strips(segment)
        width = _window_bytes(segment, where) // (where.count * where.unit)
        first = 0
        while first < len(cuts) - 1:
            last = max(bisect.bisect_right(cuts, cuts[first] + width) - 1, first + 1)
            yield _Part(segment, first, cuts[first : last + 1], where, self._scales[segment] is not None)
            first = last


def _window_bytes(segment: Segment, where: Strips) -> int:
    """All lanes are little beside a merged model, unless pieces became too short for a disk."""
    model = segment.stop - segment.start
    return max(min(WINDOW_BYTES, model // 24), min(where.count * PIECE_BYTES, model // 8))


class Resident:
    """In the memory of a device, copied there once.

    Args:
        streamed: what brings all there.
        segments: what is copied.
        runs: the slots that hold checkpoints.
        name: of the trajectory, for the progress.
    """

    threads = False

    def __init__(self, streamed: Streamed, segments: Sequence[Segment], runs: list[tuple[int, int]], name: str) -> None:
        self.device = streamed.device
        self._windows = {segment: streamed.room(segment) for segment in segments}
        with (
            contextlib.closing(streamed.windows(segments, runs)) as windows,
            progress(f"{name} to {self.device}", streamed.count(segments)) as advance,
        ):
            for window in windows:
                self._windows[window.segment].put(window)
                advance()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def windows(self, segments: Sequence[Segment], runs: list[tuple[int, int]]) -> Generator[Window]:  # noqa: ARG002
        """See :class:`Source`."""
        for segment in segments:
            yield self._windows[segment]


class _Lane:
    """Memory for one window at a time: on the CPU, and on the device where that is another."""

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
