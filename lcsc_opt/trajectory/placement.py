"""Where a merge finds the columns of a matrix: mapped, in a device's memory, or read again each time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import shown_size
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.trajectory.layout import Segment, aligned

Placement = Literal["mapped", "resident", "streamed"]

_SHARE_OF_DEVICE = 0.6  # of the device's free memory; the rest is for the network and its activations
_SHARE_OF_MEMORY = 0.8  # the rest is for merged models and everything else
READ_BYTES = 64 * 2**20  # of the columns that are streamed at once
FEWEST_COLUMNS = 256  # of a read and of a tile, however many rows there are
_BUFFERS = 3  # one is being merged, one is ready, one is being read
_READERS = 4  # threads, so that the disk always has a request
_ROWS = 8  # in a device's memory rows are a multiple of this, as its fast products want; the last ones are zero


class Block(NamedTuple):
    """Neighbouring columns of a segment that are in memory: ``start`` is the first, ``columns`` ``[slots, n]``."""

    segment: Segment
    start: int
    columns: Tensor


class ColumnSource(Protocol):
    """What gives a merge the columns that it combines."""

    device: torch.device
    """Where the columns are, and the results."""

    rows: int
    """How many rows each block has."""

    multiplies_all: bool
    """Whether rows that no checkpoint has are zero, so that one product of all rows serves every merge."""

    def blocks(self, segments: Sequence[Segment], slots: Sequence[int]) -> Generator[Block]:
        """All columns of these segments in order; each block is valid until the next one is asked for.

        Slots that are not asked for may hold anything, unless :attr:`multiplies_all`. The last block of a segment may
        have columns of zeros behind the segment's.
        """


@dataclasses.dataclass(eq=False)
class ColumnsInMemory:
    """A :class:`ColumnSource` with ``[slots, n]`` of each segment: mapped from the file, or copied to a device once."""

    device: torch.device
    _columns: Mapping[Segment, Tensor]
    rows: int
    multiplies_all: bool

    @classmethod
    def mapped(cls, rows: Tensor, segments: Sequence[Segment]) -> ColumnsInMemory:
        """Columns of ``[slots, row_bytes]`` uint8 as they are mapped: the system keeps what fits into memory."""
        columns = {segment: rows[:, segment.start : segment.stop].view(segment.dtype) for segment in segments}
        return cls(CPU, columns, len(rows), multiplies_all=False)

    def blocks(self, segments: Sequence[Segment], slots: Sequence[int]) -> Generator[Block]:  # noqa: ARG002
        """Each segment whole, in all slots."""
        for segment in segments:
            yield Block(segment, 0, self._columns[segment])


class _Read(NamedTuple):
    """Columns ``[start, stop)`` of a segment, which are read at once."""

    segment: Segment
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """How many bytes each row has of these columns."""
        return (self.stop - self.start) * self.segment.dtype.itemsize


class _StreamedColumns:
    """A :class:`ColumnSource` that reads the file for each merge, into memory of fixed size.

    While some columns are combined, the next ones are read. For a GPU they are read into pinned memory.
    """

    multiplies_all = False

    def __init__(self, path: Path, slots: int, row_bytes: int, device: torch.device) -> None:
        self.device = device
        self.rows = slots
        self._path = path
        self._row_bytes = row_bytes

    def blocks(self, segments: Sequence[Segment], slots: Sequence[int]) -> Generator[Block]:
        """A range of columns at a time, as many as :data:`READ_BYTES` hold."""
        reads = self.reads(segments)
        gpu = self.device != CPU
        size = self.rows * max((read.row_bytes for read in reads), default=0)
        buffers = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=gpu) for _ in range(_BUFFERS)]
        copied: dict[int, torch.Event] = {}  # buffer → when its last content has arrived on the GPU

        def begin(number: int, pool: ThreadPoolExecutor) -> tuple[Tensor, list[Future[None]]]:
            """Let all readers fill a buffer with read ``number``; gives its columns, and what to wait for."""
            read = reads[number]
            index = number % _BUFFERS
            if index in copied:
                accelerator.wait_for(copied[index])
            content = buffers[index][: self.rows * read.row_bytes].view(self.rows, read.row_bytes)
            offset = read.segment.start + read.start * read.segment.dtype.itemsize
            shares = [slots[reader::_READERS] for reader in range(_READERS)]
            reading = [pool.submit(self._read, share, offset, content) for share in shares]
            return content.view(read.segment.dtype), reading

        with ThreadPoolExecutor(_READERS, "lcsc-read") as pool:
            ahead = collections.deque(begin(number, pool) for number in range(min(_BUFFERS - 1, len(reads))))
            for number, read in enumerate(reads):
                columns, reading = ahead.popleft()
                for future in reading:
                    future.result()
                following = number + _BUFFERS - 1  # into the buffer of the columns before these, which are merged
                if following < len(reads):
                    ahead.append(begin(following, pool))
                if gpu:
                    columns = columns.to(self.device, non_blocking=True)
                    copied[number % _BUFFERS] = accelerator.recorded(self.device)
                yield Block(read.segment, read.start, columns)

    def reads(self, segments: Sequence[Segment]) -> list[_Read]:
        """The ranges of columns that are read at once, in order: :data:`READ_BYTES` of all rows together."""
        reads: list[_Read] = []
        for segment in segments:
            width = max(READ_BYTES // (self.rows * segment.dtype.itemsize), FEWEST_COLUMNS)
            starts = range(0, segment.width, width)
            reads += [_Read(segment, start, min(start + width, segment.width)) for start in starts]
        return reads

    def _read(self, slots: Sequence[int], offset: int, content: Tensor) -> None:
        """Fill the rows ``slots`` of ``content`` ``[slots, n]`` uint8 from byte ``offset`` of each row of the file."""
        rows = content.numpy()
        try:
            with self._path.open("rb", buffering=0) as file:  # one for each reader: they seek
                for slot in slots:
                    file.seek(slot * self._row_bytes + offset)
                    remaining = rows[slot].data
                    while remaining:
                        count = file.readinto(remaining)
                        if not count:
                            raise TrajectoryError(
                                f"{self._path} is truncated. Copy it, or remove its folder and pack again."
                            )
                        remaining = remaining[count:]
        except OSError as error:
            raise TrajectoryError(f"Cannot read {self._path}: {error.strerror}.") from error


def place(
    path: Path,
    rows: Tensor,
    segments: Sequence[Segment],
    slots: Sequence[int],
    device: torch.device,
    how: Placement | None,
) -> ColumnSource:
    """Choose where columns are merged from, and say so unless it is the map.

    On a GPU from its own memory if they fit into a part of what is free; on the CPU, which also serves GPUs that cannot
    merge, from the map if they fit into a part of the machine's memory. Else they are streamed.

    ``rows`` ``[slots, row_bytes]`` uint8 are mapped from ``path``; a merge combines ``segments`` of those in ``slots``.
    ``how`` asks for one of the three; ``mapped`` is for the CPU only.

    Raises:
        TrajectoryError: the map was asked for, and the device is a GPU.
    """
    gpu = accelerator.asynchronous(device)
    if not gpu:
        device = CPU  # also in place of an accelerator that cannot merge
    row_count = aligned(len(rows), _ROWS) if gpu else len(rows)
    size = row_count * sum(segment.stop - segment.start for segment in segments)
    if how is None:
        how = _fastest(device, size)
    if how == "mapped":
        if gpu:
            raise TrajectoryError(f"{path} cannot be mapped into {device}: choose 'resident' or 'streamed'.")
        return ColumnsInMemory.mapped(rows, segments)
    name = path.parent.name
    checkpoints = f"{name}: its checkpoints ({shown_size(size)})"
    streamed = _StreamedColumns(path, rows.shape[0], rows.shape[1], device)
    if how == "resident":
        with contextlib.suppress(torch.OutOfMemoryError):  # another program has used the memory in the meantime
            resident = _copied(streamed, segments, slots, name)
            notice(f"{checkpoints} are kept in the memory of {device}")
            return resident
    notice(f"{checkpoints} are streamed for each merge")
    return streamed


def _fastest(device: torch.device, size: int) -> Placement:
    """The fastest way for ``size`` bytes of columns that there is room for."""
    room = _SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device != CPU:
        room = _SHARE_OF_DEVICE * accelerator.free_bytes(device)
    if size > room:
        return "streamed"
    return "mapped" if device == CPU else "resident"


def _copied(
    streamed: _StreamedColumns, segments: Sequence[Segment], slots: Sequence[int], name: str
) -> ColumnsInMemory:
    """The columns in the memory of the device, read once; ``name`` is the trajectory's, for the progress.

    Rows of other slots, and the rows and columns that are added for fast products, are zero.
    """
    device = streamed.device
    rows = aligned(streamed.rows, _ROWS)
    columns: dict[Segment, Tensor] = {}
    for segment in segments:
        columns[segment] = torch.zeros(rows, aligned(segment.width), dtype=segment.dtype, device=device)
    with progress(f"{name} to {device}", len(streamed.reads(segments))) as advance:
        for segment, start, block in streamed.blocks(segments, slots):
            there = columns[segment][:, start : start + block.shape[1]]
            for run in runs_of(slots):  # the others may hold anything
                there[run].copy_(block[run])
            advance()
    accelerator.synchronize(device)
    return ColumnsInMemory(device, columns, rows, multiplies_all=True)


def runs_of(slots: Sequence[int]) -> list[slice]:
    """Slots as the fewest slices, in order."""
    numbered = enumerate(sorted(slots))
    runs: list[slice] = []
    # in a run, slots grow as their numbers do
    for _, group in itertools.groupby(numbered, key=lambda item: item[1] - item[0]):
        run = [slot for _, slot in group]
        runs.append(slice(run[0], run[-1] + 1))
    return runs
