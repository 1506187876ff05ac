"""Linear combinations of mapped rows, streamed tile by tile.

Measured on two cores with other work (K = 50 to 200, 3 GB of float32 in memory): one candidate takes about 1.5 reads of
the store, each of 16 at once a quarter of that. Differences in 16 or 8 bits are widened tile by tile, which takes about
as long as reading four times the bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lcsc_opt.errors import CoefficientsError
from lcsc_opt.trajectory.layout import Segment

BLOCK_BYTES = 32 * 2**20  # of all rows and threads together; larger ones were not faster
TILES_AT_ONCE = 8  # that a thread takes
MOST_THREADS = 8  # some are enough for all the bandwidth of the memory
FEWEST_COLUMNS = 256
MANY_CANDIDATES = 4  # from here on the transposed product wins
FULL_TILE = 16  # the product takes as long for 4 candidates, so fewer get rows of zeros
SUM_TOLERANCE = 1e-9

Put = Callable[[int, int, Tensor], None]
"""Takes the columns ``[a, b)`` of a segment and their merged values ``[B, b − a]``."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns ``[start, stop)`` of a segment: slot i holds ``origin + scales[i] * numbers[i]``.

    Attributes:
        start, stop: the columns.
        numbers: ``[panels, slots of a panel, n]``, mapped.
        scales: ``[slots]`` float32; ``None`` for ones.
        origin: ``[n]``; ``None`` for zeros.
    """

    start: int
    stop: int
    numbers: Tensor
    scales: Tensor | None = None
    origin: Tensor | None = None

    def read(self, first: int, last: int, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        """The numbers of slots ``[first, last)``, ``[last − first, n]``.

        Without a copy where one panel holds them in this dtype; else in ``scratch`` where it is given, until that is
        used again.
        """
        size = self.numbers.shape[1]
        if first // size == (last - 1) // size and self.numbers.dtype == dtype:
            return self.numbers[first // size, first % size : first % size + last - first]
        begin, end = first // size, (last - 1) // size + 1
        if end - begin == 1:
            return self._copied(self.numbers[begin, None, first - begin * size : last - begin * size], dtype, scratch)
        return self._copied(self.numbers[begin:end], dtype, scratch)[first - begin * size : last - begin * size]

    @staticmethod
    def _copied(panels: Tensor, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
        """In one call: threads that make many of them wait for each other."""
        rows = panels.shape[0] * panels.shape[1], panels.shape[2]
        result = torch.empty(rows, dtype=dtype, device="cpu") if scratch is None else scratch.take(rows, dtype)
        result.view(panels.shape).copy_(panels)
        return result


class Scratch:
    """Memory of one thread that is used again and again: the system takes freed memory back, page by page."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, until the next call."""
        size = shape[0] * shape[1] * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size].view(dtype).view(shape)


def check_coefficients(coefficients: npt.ArrayLike | Tensor, checkpoints: int, *, axes: int) -> npt.NDArray[np.float64]:
    """Coefficients as ``[B, K]`` float64, from ``[K]`` (one axis) or ``[B, K]`` (two axes).

    Raises:
        CoefficientsError: another shape, a value that is not finite, or a sum that is off by more than 1e-9.
    """
    values = _as_array(coefficients)
    if values.ndim != axes or values.shape[-1] != checkpoints:
        expected = f"[{checkpoints}]" if axes == 1 else f"[B, {checkpoints}]"
        raise CoefficientsError(
            f"Coefficients have shape {list(values.shape)}; expected {expected}, one for each checkpoint."
        )
    if not np.isfinite(values).all():
        raise CoefficientsError("Coefficients have to be finite; some are NaN or infinite.")
    worst = np.abs(values.sum(axis=-1) - 1.0).max(initial=0.0)
    if worst > SUM_TOLERANCE:
        raise CoefficientsError(f"Coefficients have to sum to one; the sum is off by {worst:.3g}.")
    return values.reshape(-1, checkpoints)


def _as_array(coefficients: npt.ArrayLike | Tensor) -> npt.NDArray[np.float64]:
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.detach().to("cpu").numpy()
    try:
        return np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CoefficientsError(f"Coefficients are not numbers: {error}.") from None


def only_one(row: npt.NDArray[np.float64]) -> int | None:
    """The checkpoint that ``row`` [K] picks alone, with coefficient 1; ``None`` for a real combination."""
    nonzero = np.flatnonzero(row)
    return int(nonzero[0]) if len(nonzero) == 1 and row[nonzero[0]] == 1.0 else None


def choose_runs(rows: npt.NDArray[np.float64], slots: Sequence[int]) -> list[tuple[int, int]]:
    """Which rows of the store to read, as runs ``[first, last)`` of slots.

    Rows that no candidate uses are left out when they are at least half of all; slots that hold no
    checkpoint are never read.
    """
    used = [slot for slot, some in zip(slots, (rows != 0).sum(axis=0), strict=True) if some]
    return runs_of(used if 2 * len(used) <= len(slots) else slots)


def runs_of(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Slots as runs ``[first, last)``."""
    numbered = itertools.groupby(enumerate(sorted(slots)), key=lambda item: item[1] - item[0])
    groups = [[slot for _, slot in group] for _, group in numbered]
    return [(group[0], group[-1] + 1) for group in groups]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of this dtype are summed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, also where training asked torch for faster ones."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    asked = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = asked


def blocks(columns: int, rows: int, itemsize: int, *, at_most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges ``[a, b)`` of columns such that a block of ``rows`` rows takes about ``at_most`` bytes.

    ``None`` is a thread's share of ``BLOCK_BYTES``.
    """
    width = max((at_most or BLOCK_BYTES // threads()) // (max(rows, 1) * itemsize), FEWEST_COLUMNS)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def merge_tiles(
    tiles: Iterable[Tile], coefficients: Tensor, runs: list[tuple[int, int]], dtype: torch.dtype, put: Put
) -> None:
    """Merge tiles for all candidates, in :func:`threads`.

    One product for each tile and thread is faster than one product of many threads, and far less so where the cores
    have other work, too.

    Args:
        tiles: of one segment.
        coefficients: ``[B, slots]`` float64, zero for slots without a checkpoint.
        runs: the rows to read.
        dtype: what is summed in.
        put: is given the merged values tile by tile.
    """
    candidates = len(coefficients)
    if candidates >= MANY_CANDIDATES:
        coefficients = functional.pad(coefficients, (0, 0, 0, max(FULL_TILE - candidates, 0)))

    def merge(tile: Tile, scratch: Scratch) -> None:
        put(tile.start, tile.stop, _merge_tile(tile, coefficients, runs, dtype, scratch)[:candidates])

    queue, lock = iter(tiles), threading.Lock()
    if threads() == 1:
        _each(merge, queue, lock)
        return
    with ThreadPoolExecutor(threads(), thread_name_prefix="lcsc-merge") as pool:
        for future in [pool.submit(_each, merge, queue, lock) for _ in range(threads())]:
            future.result()


def threads() -> int:
    """How many a merge takes: as many as torch would."""
    return min(torch.get_num_threads(), MOST_THREADS)


def _each(function: Callable[[Tile, Scratch], None], queue: Iterator[Tile], lock: threading.Lock) -> None:
    """Call ``function`` for what is left in the queue, which other threads take from, too."""
    scratch = Scratch()
    while True:
        with lock:
            tiles = list(itertools.islice(queue, TILES_AT_ONCE))
        if not tiles:
            return
        for tile in tiles:
            function(tile, scratch)


def _merge_tile(
    tile: Tile, coefficients: Tensor, runs: list[tuple[int, int]], dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """``[B, n]`` of ``dtype``."""
    total: Tensor | None = None
    for first, last in runs:
        part = coefficients[:, first:last]
        if tile.scales is not None:
            part = part * tile.scales[first:last].to(part.dtype)
        total = _add(total, part.to(dtype), tile.read(first, last, dtype, scratch))
    if total is None:
        raise AssertionError("coefficients that sum to one read at least one row")
    return total if tile.origin is None else total.add_(tile.origin.to(dtype))


def _add(total: Tensor | None, coefficients: Tensor, block: Tensor) -> Tensor:
    """``total + coefficients @ block``, ``[B, n]``, in one call to the BLAS."""
    if len(coefficients) < MANY_CANDIDATES:
        return coefficients @ block if total is None else total.addmm_(coefficients, block)
    if total is None:
        return torch.mm(block.t(), coefficients.t()).t()
    return total.t().addmm_(block.t(), coefficients.t()).t()


def scatter(segment: Segment, outputs: list[list[Tensor]]) -> Put:
    """Write merged columns into tensors: ``outputs[i]`` are the flat tensors ``[numel]`` of candidate i."""
    ends = list(itertools.accumulate(spec.numel for spec in segment.tensors))

    def put(start: int, stop: int, values: Tensor) -> None:
        position = start
        index = bisect.bisect_right(ends, start)
        while position < stop:
            first = ends[index] - segment.tensors[index].numel
            last = min(ends[index], stop)
            for flat, row in zip(outputs, values, strict=True):
                flat[index][position - first : last - first].copy_(row[position - start : last - start])
            position, index = last, index + 1

    return put
