"""Which way merges of a trajectory are made: from the map, from a device's memory, or read for each merge."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import size_in_words
from lcsc_opt.base.progress import notice
from lcsc_opt.trajectory.disk.layout import Segment
from lcsc_opt.trajectory.disk.rows import Rows
from lcsc_opt.trajectory.merge import sources
from lcsc_opt.trajectory.merge.arithmetic import slot_ranges
from lcsc_opt.trajectory.merge.memory import available_bytes
from lcsc_opt.trajectory.merge.sources import Mapped, Placement, Resident, Source, Streamed

SHARE_OF_DEVICE = 0.6  # of what is free there; the rest is for the network and its activations
SHARE_OF_MEMORY = 0.8  # of what is available; the rest is for merged models and everything else


@dataclasses.dataclass(frozen=True)
class Stored:
    """A trajectory as it lies on the disk.

    Attributes:
        name: for people.
        checkpoints: K.
        nbytes: of all files.
        paths: of the file of the rows, and of the reference checkpoint where there is one.
        rows: what is in them.
        segments: what a merge combines.
        slots: those that hold the checkpoints.
    """

    name: str
    checkpoints: int
    nbytes: int
    paths: Sequence[Path]
    rows: Rows
    segments: tuple[Segment, ...]
    slots: Sequence[int]

    @property
    def read_bytes(self) -> int:
        """How many bytes of memory hold what a merge reads, with rows that are free."""
        return sum(self._segment_bytes(segment) for segment in self.segments)

    def _segment_bytes(self, segment: Segment) -> int:
        where = self.rows.place(segment)
        reference = segment.stop - segment.start if len(self.paths) > 1 else 0
        return where.count * segment.width * where.unit + reference


def place(stored: Stored, device: torch.device, how: Placement | None = None) -> Source:
    """Choose a way, say it where it is another than the map, and go it.

    Args:
        stored: the trajectory.
        device: where merged tensors are wanted; those other than the CPU and GPUs of CUDA get them from the CPU.
        how: the way; ``None`` chooses.

    Raises:
        TrajectoryError: the map was asked for, and the device is another than the CPU.
    """
    gpu = device.type == "cuda"
    device, size = device if gpu else sources.CPU, stored.read_bytes
    free = _free_on(device) if gpu else None
    available = available_bytes()
    chosen = how or choose(size, free, available)
    if chosen == "mapped":
        if gpu:
            raise TrajectoryError(f"{stored.name} cannot be mapped into {device}: choose 'resident' or 'streamed'.")
        return Mapped(stored.rows)
    from_disk = available is not None and size > SHARE_OF_MEMORY * available
    streamed = Streamed(stored.rows, stored.segments, stored.paths, device, around_cache=from_disk)
    resident = _resident(stored, streamed) if chosen == "resident" else None
    said = _said(device, free, available, resident=resident is not None, from_disk=from_disk)
    notice(f"{stored.name}: {stored.checkpoints} checkpoints ({size_in_words(stored.nbytes)}) {said}")
    return resident or streamed


def choose(size: int, device_free: int | None, available: int | None) -> Placement:
    """The way for a trajectory of ``size`` bytes.

    Args:
        size: what a merge reads.
        device_free: bytes that are free on the GPU; ``None`` for the CPU.
        available: bytes of memory that the system can keep files in; ``None`` where nobody knows.
    """
    if device_free is not None:
        return "resident" if size <= SHARE_OF_DEVICE * device_free else "streamed"
    return "mapped" if available is None or size <= SHARE_OF_MEMORY * available else "streamed"


def _resident(stored: Stored, streamed: Streamed) -> Resident | None:
    """``None`` where others have taken the memory meanwhile."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return Resident(streamed, stored.segments, slot_ranges(stored.slots), stored.name)
    torch.cuda.empty_cache()  # of what was there already
    return None


def _said(device: torch.device, free: int | None, available: int | None, *, resident: bool, from_disk: bool) -> str:
    """What happens to the checkpoints, and why."""
    if resident:
        return f"are kept in the memory of {device}"
    reasons = []
    if free is not None:
        reasons.append(f"{size_in_words(free)} are free on {device}")
    if from_disk and available is not None:
        reasons.append(f"{size_in_words(available)} of memory are available")
    what = "are read from the disk for each merge" if from_disk else "are streamed for each merge"
    return f"{what}: {' and '.join(reasons)}" if reasons else what


def _free_on(device: torch.device) -> int:
    """Also what this process has taken from the device and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
