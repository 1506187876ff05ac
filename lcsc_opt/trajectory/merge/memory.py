"""Memory of the machine: how much of it there is for this process, in whole pages, and used again."""

from __future__ import annotations

import contextlib
import mmap
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.trajectory.disk.layout import Segment, empty

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
PAGE = 4096  # bytes; at least what disks take and give at once
LARGE_PAGE = 2**21  # bytes
KEPT_BYTES = 2**30  # of small models that several candidates were merged into


def page_aligned(size: int, *, pinned: bool) -> Tensor:
    """Uninitialized memory that a disk can write to, ``[size]`` uint8 on the CPU.

    In large pages where the system has them: a disk that writes to small ones gets a list of them with each request,
    which took three times as long on one machine.
    """
    if pinned or sys.platform != "linux":
        whole = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    else:
        memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % (len(whole) - size)
    return whole[first : first + size]


class ReusedMemory:
    """Memory on the CPU for merged models, used again when nobody holds their tensors any more.

    The first touch of new memory costs as much as reading ten times its bytes. One model is kept, more of small ones.
    """

    def __init__(self) -> None:
        self._free: dict[Segment, list[Tensor]] = {}

    def take(self, segment: Segment) -> tuple[Tensor, dict[str, Tensor]]:
        """Uninitialized memory for a segment, ``[columns]``, and its tensors in it, each with a storage of its own."""
        try:
            flat = self._free.setdefault(segment, []).pop()
        except IndexError:
            flat = torch.empty(segment.width, dtype=segment.dtype, device="cpu")
        memory = flat.view(torch.uint8).numpy()
        weakref.finalize(memory, self._give_back, segment, flat).atexit = False  # the tensors keep it alive
        return flat, {
            spec.name: torch.frombuffer(
                memory, dtype=segment.dtype, count=spec.numel, offset=spec.offset - segment.start
            ).view(spec.shape)
            if spec.numel
            else empty(spec)
            for spec in segment.tensors
        }

    def _give_back(self, segment: Segment, flat: Tensor) -> None:
        free = self._free[segment]
        kept = sum(other.nbytes for others in list(self._free.values()) for other in others)
        if not free or kept + flat.nbytes <= KEPT_BYTES:
            free.append(flat)


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that this process may still fill; pages of files that the system keeps, and can drop, count as free.

    The least of what the machine has and of what each memory limit (cgroup, version 1 or 2) above the process leaves.
    ``None`` where the system does not say, as on Windows.
    """
    machine = _fields(proc / "meminfo").get("MemAvailable:")
    if machine is None:
        return None
    return min([1024 * machine, *_left_in_groups(proc, cgroups)])


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            yield from _left(cgroups, path, limit="memory.max", used=("anon", "shmem"))
        elif "memory" in controllers.split(","):
            names = ("total_rss", "total_shmem")
            yield from _left(cgroups / "memory", path, limit="memory.limit_in_bytes", used=names)


def _left(root: Path, path: str, *, limit: str, used: tuple[str, ...]) -> Iterator[int]:
    """What each group from the process's own up to the root leaves; in a container the root is its own."""
    group = root / path.lstrip("/")
    while True:
        text = _text(group / limit).strip()
        if text.isdecimal():
            there = _fields(group / "memory.stat")
            yield max(int(text) - sum(there.get(name, 0) for name in used), 0)
        if group == root or root not in group.parents:
            return
        group = group.parent


def _fields(path: Path) -> Mapping[str, int]:
    """``name value`` lines."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
