"""Linear combinations of mapped rows, streamed tile by tile.

Measured on two cores with other work (K = 50 to 200, 3 GB of float32 in memory): one candidate takes about 1.5 reads of
the store, each of 16 at once a quarter of that. Differences in 16 or 8 bits are widened tile by tile, which takes about
as long as reading four times the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn import functional

from lcsc_opt.trajectory.disk.rows import SlotRanges
from lcsc_opt.trajectory.disk.tiles import Scratch, Tile

TILE_BYTES = 32 * 2**20  # of all rows and threads together; larger ones were not faster
TILES_AT_ONCE = 8  # that a thread takes
MOST_THREADS = 8  # some are enough for all the bandwidth of the memory
FEWEST_COLUMNS = 256
MANY_CANDIDATES = 4  # from here on the transposed product wins
FULL_TILE = 16  # the product takes as long for 4 candidates, so fewer get rows of zeros


def only_one(row: npt.NDArray[np.float64]) -> int | None:
    """The checkpoint that ``row`` [K] picks alone, with coefficient 1; ``None`` for a real combination."""
    nonzero = np.flatnonzero(row)
    return int(nonzero[0]) if len(nonzero) == 1 and row[nonzero[0]] == 1.0 else None


def choose_slots(rows: npt.NDArray[np.float64], slots: Sequence[int]) -> SlotRanges:
    """Which rows of the store to read.

    Rows that no candidate uses are left out when they are at least half of all; slots that hold no
    checkpoint are never read.
    """
    used = [slot for slot, some in zip(slots, (rows != 0).sum(axis=0), strict=True) if some]
    return slot_ranges(used if 2 * len(used) <= len(slots) else slots)


def slot_ranges(slots: Sequence[int]) -> SlotRanges:
    """Slots as ranges ``[first, last)``."""
    numbered = itertools.groupby(enumerate(sorted(slots)), key=lambda item: item[1] - item[0])
    groups = [[slot for _, slot in group] for _, group in numbered]
    return [(group[0], group[-1] + 1) for group in groups]


class _FullPrecision:
    """Products of float32 in float32 on the CPU, while any thread asks for them; then as training asked torch for."""

    def __init__(self) -> None:
        self._lock, self._users, self._asked = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if not self._users:
                self._asked, matmul.fp32_precision = matmul.fp32_precision, "ieee"
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            self._users -= 1
            if not self._users:
                matmul.fp32_precision = self._asked


_FULL_PRECISION = _FullPrecision()


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Products of float32 in float32, also where training asked torch for faster ones."""
    return _FULL_PRECISION


def columns_at_once(rows: int, itemsize: int, at_most: int | None = None) -> int:
    """How many columns of ``rows`` rows take ``at_most`` bytes; ``None`` is a thread's share of ``TILE_BYTES``."""
    return max((at_most or TILE_BYTES // threads()) // (max(rows, 1) * itemsize), FEWEST_COLUMNS)


class Workers:
    """Threads that merge tiles, each with memory of its own, while this is open.

    One product for each tile and thread is faster than one product of many threads, and far less so where the cores
    have other work, too.

    Args:
        count: of threads; one is the caller's.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count > 1:
            self._pool = ThreadPoolExecutor(self._count, "lcsc-merge", initializer=_without_further_threads)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, function: Callable[[Tile, Scratch], None], tiles: Iterable[Tile]) -> None:
        """Call ``function`` for all tiles."""
        queue, lock = iter(tiles), threading.Lock()
        if self._pool is None:
            self._each(function, queue, lock)
            return
        for future in [self._pool.submit(self._each, function, queue, lock) for _ in range(self._count)]:
            future.result()

    def _each(self, function: Callable[[Tile, Scratch], None], queue: Iterator[Tile], lock: threading.Lock) -> None:
        """Call ``function`` for what is left in the queue, which other threads take from, too."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        while True:
            with lock:
                tiles = list(itertools.islice(queue, TILES_AT_ONCE))
            if not tiles:
                return
            for tile in tiles:
                function(tile, self._own.scratch)


def _without_further_threads() -> None:
    """Products in this thread shall not take more of them: they would wait for each other by spinning."""
    torch.get_num_threads()  # gives a new thread as many as others have
    _openmp().limit(limits=1, user_api="openmp")  # for this thread only


@functools.cache
def _openmp() -> ThreadpoolController:
    """Made once: looking for the libraries takes milliseconds."""
    return ThreadpoolController()


def merge_tiles(
    tiles: Iterable[Tile],
    coefficients: Tensor,
    slots: SlotRanges,
    dtype: torch.dtype,
    merged: list[Tensor],
    workers: Workers,
) -> None:
    """Merge tiles for all candidates.

    Args:
        tiles: of one segment, on any device.
        coefficients: ``[B, slots]`` float64 on that device, zero for slots without a checkpoint.
        slots: of the rows to read.
        dtype: what is summed in.
        merged: ``[columns]`` of the segment for each candidate, on that device and of any dtype, written to.
        workers: who does it.
    """
    candidates = len(coefficients)
    straight = candidates == 1 and merged[0].dtype == dtype
    if candidates >= MANY_CANDIDATES:
        coefficients = functional.pad(coefficients, (0, 0, 0, max(FULL_TILE - candidates, 0)))

    def merge(tile: Tile, scratch: Scratch) -> None:
        room = merged[0][None, tile.start : tile.stop] if straight else None
        total = _merge_tile(tile, coefficients, slots, dtype, scratch, room)
        if room is None:
            for flat, row in zip(merged, total, strict=False):  # not those that fill up
                flat[tile.start : tile.stop].copy_(row)

    workers.each(merge, tiles)


def threads() -> int:
    """How many a merge takes: as many as torch would."""
    return min(torch.get_num_threads(), MOST_THREADS)


def _merge_tile(
    tile: Tile,
    coefficients: Tensor,
    slots: SlotRanges,
    dtype: torch.dtype,
    scratch: Scratch,
    room: Tensor | None,
) -> Tensor:
    """``[B, n]`` of ``dtype``, in ``room`` where that is given."""
    total: Tensor | None = None
    for first, last in slots:
        rows, scales = tile.read(first, last, dtype, scratch)
        own = coefficients[:, first:last]
        own = (own if scales is None else own * scales.to(own.dtype)).to(dtype)
        total = _product(own, rows, room) if total is None else _add(total, own, rows)
    if total is None:
        raise AssertionError("coefficients that sum to one read at least one row")
    return total if tile.origin is None else total.add_(tile.origin.to(dtype))


def _product(coefficients: Tensor, rows: Tensor, room: Tensor | None) -> Tensor:
    """``coefficients @ rows``, ``[B, n]``, in one call to the BLAS."""
    if len(coefficients) < MANY_CANDIDATES:
        return torch.mm(coefficients, rows) if room is None else torch.mm(coefficients, rows, out=room)
    return torch.mm(rows.t(), coefficients.t()).t()


def _add(total: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
    """``total + coefficients @ rows``, in its place."""
    if len(coefficients) < MANY_CANDIDATES:
        return total.addmm_(coefficients, rows)
    return total.t().addmm_(rows.t(), coefficients.t()).t()
