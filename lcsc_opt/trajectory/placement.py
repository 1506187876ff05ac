"""Where a merge finds the columns of a matrix: mapped, in a device's memory, or read anew each time."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.trajectory.layout import Segment

Placement = Literal["mapped", "resident", "streamed"]
_Columns = tuple[Segment, int, Tensor]
"""A segment, the first of some of its columns, and these, ``[slots, n]``."""

_SHARE_OF_DEVICE = 0.6  # of what is free there; the rest is for the network and its activations
_SHARE_OF_MEMORY = 0.8  # the rest is for merged models and everything else
READ_BYTES = 64 * 2**20  # of the columns that are streamed at once
FEWEST_COLUMNS = 256
_BUFFERS = 3  # one is combined, one is there or nearly, and the disk has work
_READERS = 4  # threads; a disk has work while one of them waits for the other


class Held:
    """Columns in memory, ``[slots, n]`` of each segment: mapped from the file, or copied to a device once."""

    def __init__(self, device: torch.device, columns: Mapping[Segment, Tensor]) -> None:
        self.device, self._columns = device, columns

    @classmethod
    def mapped(cls, rows: Tensor, segments: Sequence[Segment]) -> Held:
        """Columns of ``[slots, row_bytes]`` uint8 as they are mapped: the system keeps what fits into memory."""
        return cls(CPU, {segment: rows[:, segment.start : segment.stop].view(segment.dtype) for segment in segments})

    def columns(self, segments: Sequence[Segment], slots: Sequence[int]) -> Generator[_Columns]:  # noqa: ARG002
        """All columns of these segments in order, some at a time, valid until the next ones are asked for.

        Rows in other slots may hold anything.
        """
        for segment in segments:
            yield segment, 0, self._columns[segment]


class _Streamed:
    """Read for each merge: while some columns are combined, the next are read into memory of fixed size.

    ``shape`` is slots, and the bytes of a row. For a GPU, columns are read into pinned memory.
    """

    def __init__(self, path: Path, shape: tuple[int, int], device: torch.device) -> None:
        self._path, (self._slots, self._row_bytes), self.device = path, shape, device

    def columns(self, segments: Sequence[Segment], slots: Sequence[int]) -> Generator[_Columns]:
        """See :class:`Held`."""
        reads = [read for segment in segments for read in self.reads(segment)]
        gpu = self.device != CPU
        size = max((self._slots * (stop - start) * segment.dtype.itemsize for segment, start, stop in reads), default=0)
        hosts = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=gpu) for _ in range(_BUFFERS)]
        copied: dict[int, torch.Event] = {}

        def begin(number: int, pool: ThreadPoolExecutor) -> tuple[Tensor, list[Future[None]]]:
            (segment, start, stop), place = reads[number], number % _BUFFERS
            if place in copied:
                accelerator.wait_for(copied[place])
            width = (stop - start) * segment.dtype.itemsize
            part, first = hosts[place][: self._slots * width].view(self._slots, width), segment.start
            first += start * segment.dtype.itemsize
            shares = (slots[reader::_READERS] for reader in range(_READERS))
            return part.view(segment.dtype), [pool.submit(self._read, some, first, part) for some in shares]

        with ThreadPoolExecutor(_READERS, "lcsc-read") as pool:
            ahead = collections.deque(begin(number, pool) for number in range(min(_BUFFERS - 1, len(reads))))
            for number, (segment, start, _) in enumerate(reads):
                part, reading = ahead.popleft()
                for future in reading:
                    future.result()
                if number + _BUFFERS - 1 < len(reads):  # into the buffer of the columns before these
                    ahead.append(begin(number + _BUFFERS - 1, pool))
                if gpu:
                    part = part.to(self.device, non_blocking=True)
                    copied[number % _BUFFERS] = accelerator.recorded(self.device)
                yield segment, start, part

    def reads(self, segment: Segment) -> Iterator[tuple[Segment, int, int]]:
        """A segment as ranges of columns that are read at once."""
        width = max(READ_BYTES // (self._slots * segment.dtype.itemsize), FEWEST_COLUMNS)
        for start in range(0, segment.width, width):
            yield segment, start, min(start + width, segment.width)

    def _read(self, slots: Sequence[int], first: int, part: Tensor) -> None:
        content = part.numpy()
        try:
            with self._path.open("rb", buffering=0) as file:
                for slot in slots:
                    file.seek(slot * self._row_bytes + first)
                    left = content[slot].data
                    while left:
                        if not (count := file.readinto(left)):
                            raise TrajectoryError(f"{self._path} is truncated. Copy it or pack again.")
                        left = left[count:]
        except OSError as error:
            raise TrajectoryError(f"Cannot read {self._path}: {error.strerror}.") from error


Placed = Held | _Streamed
"""What gives a merge the columns that it combines, on its ``device``."""


def place(
    path: Path,
    rows: Tensor,
    segments: Sequence[Segment],
    slots: Sequence[int],
    device: torch.device,
    how: Placement | None,
) -> Placed:
    """Choose where columns are merged from, and say so unless it is the map.

    On a GPU from its own memory if they fit into a part of what is free; on the CPU, which also serves GPUs that cannot
    merge, from the map if they fit into a part of the machine's memory. Else they are streamed.

    ``rows`` ``[slots, row_bytes]`` uint8 are mapped from ``path``; a merge combines ``segments`` of those in ``slots``.
    ``how`` asks for one of the three; ``mapped`` is for the CPU only.

    Raises:
        TrajectoryError: the map was asked for, and the device is a GPU.
    """
    gpu = accelerator.asynchronous(device)
    device, size = device if gpu else CPU, len(rows) * sum(segment.stop - segment.start for segment in segments)
    room = _room(device)
    how = how or (("resident" if gpu else "mapped") if size <= room else "streamed")
    if how == "mapped":
        if gpu:
            raise TrajectoryError(f"{path} cannot be mapped into {device}: choose 'resident' or 'streamed'.")
        return Held.mapped(rows, segments)
    streamed, name = _Streamed(path, (rows.shape[0], rows.shape[1]), device), path.parent.name
    if how == "resident":
        with contextlib.suppress(torch.OutOfMemoryError):  # others have taken the memory meanwhile
            resident = _copied(streamed, len(rows), segments, slots, name)
            notice(f"{name}: its checkpoints ({tqdm.format_sizeof(size, 'B')}) are kept in the memory of {device}")
            return resident
    notice(f"{name}: its checkpoints ({tqdm.format_sizeof(size, 'B')}) are streamed for each merge")
    return streamed


def _copied(streamed: _Streamed, rows: int, segments: Sequence[Segment], slots: Sequence[int], name: str) -> Held:
    device = streamed.device
    columns = {segment: torch.empty(rows, segment.width, dtype=segment.dtype, device=device) for segment in segments}
    parts = sum(len(list(streamed.reads(segment))) for segment in segments)
    with progress(f"{name} to {device}", parts) as advance:
        for segment, start, part in streamed.columns(segments, slots):
            columns[segment][:, start : start + part.shape[1]].copy_(part)
            advance()
    accelerator.synchronize(device)
    return Held(device, columns)


def _room(device: torch.device) -> float:
    """Bytes that columns may take, on a GPU or of the machine's memory; infinite where the system does not say."""
    if device != CPU:
        return _SHARE_OF_DEVICE * accelerator.free_bytes(device)
    try:
        return _SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
