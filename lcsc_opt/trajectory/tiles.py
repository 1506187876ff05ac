"""The columns of a matrix, tile by tile, each tile of one row of coefficients, or of the channels of one tensor.

On the CPU a tile fits into the cache. A device has none that would matter: there a tile is as large as memory allows.

Whatever reads a trajectory's numbers (merges, projections, Gram matrices) is a loop over :func:`tiled_blocks`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.coefficients.layer_groups import LayerGroups, TensorRows
from lcsc_opt.trajectory.layout import Segment
from lcsc_opt.trajectory.placement import FEWEST_COLUMNS, ColumnSource

TILE_BYTES = 32 * 2**20  # of all rows and threads together; larger ones were not faster
PROJECTION_TILE_BYTES = 4 * 2**20  # larger ones leave the cache between the two steps of a projection
_DEVICE_TILE_BYTES = 256 * 2**20
_MOST_THREADS = 8  # some are enough for all the bandwidth of the memory


class Tile(NamedTuple):
    """Neighbouring columns of one segment: ``outer`` times the same ``channels``, each of ``inner`` columns.

    Attributes:
        start: the first column, counted from the segment's first one.
        stop: the column behind the last one.
        columns: ``[slots, stop - start]``, in the dtype of the segment; slots that were not asked for hold anything.
        rows: ``[channels]``, the row of ``[S, K]`` coefficients that each channel is merged with; ``[0]`` without layer
            groups.
        outer: how often the channels are repeated; more than once where they lie along a later axis than the first.
    """

    start: int
    stop: int
    columns: Tensor
    rows: npt.NDArray[np.int64]
    outer: int = 1

    def by_channel(self, columns: Tensor) -> Tensor:
        """``[..., stop - start]`` → ``[..., outer, channels, inner]``, the same memory."""
        return columns.view(*columns.shape[:-1], self.outer, len(self.rows), -1)


class _Run(NamedTuple):
    """Columns ``[start, stop)`` of a block that make one tile where there is room for it, as :class:`Tile`."""

    start: int
    stop: int
    rows: npt.NDArray[np.int64]
    inner: int

    @property
    def period(self) -> int:
        """After how many columns the same channels come again."""
        return len(self.rows) * self.inner


def tiled_blocks(
    source: ColumnSource,
    segments: Sequence[Segment],
    slots: Sequence[int],
    *,
    groups: LayerGroups | None,
    width: Callable[[torch.dtype], int],
) -> Generator[tuple[Segment, list[Tile]]]:
    """All columns of these segments, in order: what is in memory at once, divided into tiles.

    Tiles are valid until the next block is asked for.

    Args:
        source: the source of the columns.
        segments: to read.
        slots: to read, of each column.
        groups: which rows of coefficients each tensor is merged with; ``None`` if there is one row.
        width: how many columns a tile has, at most, by their dtype.
    """
    with contextlib.closing(source.blocks(segments, slots)) as blocks:
        for segment, first, columns in blocks:
            most = width(segment.dtype)
            tiles: list[Tile] = []
            for run in _runs(segment, first, columns.shape[1], groups):
                for start, stop, rows in _cut(run, most):
                    outer = max((stop - start) // run.period, 1)
                    tiles.append(Tile(first + start, first + stop, columns[:, start:stop], rows, outer))
            yield segment, tiles


def _cut(run: _Run, most: int) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Divide a run into tiles of at most so many columns: whole repetitions, else whole channels, else parts of one.

    Yields:
        The columns ``[start, stop)`` of each tile, and its rows.
    """
    if run.period <= most or len(run.rows) == 1:
        whole = max(most // run.period, 1) * run.period if len(run.rows) > 1 else most
        for start in range(run.start, run.stop, whole):
            yield start, min(start + whole, run.stop), run.rows
        return
    together = max(most // run.inner, 1)  # channels of a tile
    for begin in range(run.start, run.stop, run.period):
        for channel in range(0, len(run.rows), together):
            rows = run.rows[channel : channel + together]
            start = begin + channel * run.inner
            yield from _cut(_Run(start, start + len(rows) * run.inner, rows, run.inner), max(most, run.inner))


def _runs(segment: Segment, first: int, count: int, groups: LayerGroups | None) -> Iterator[_Run]:
    """Divide ``count`` columns of a segment, from ``first``, where rows of coefficients change in another way.

    Neighbouring tensors are one run where they have one and the same row, or where each of their numbers has its own.
    Columns behind the segment's last tensor, which are zeros, belong to no run where there are groups.

    Yields:
        The runs, with columns counted from ``first``.
    """
    if groups is None:
        yield _Run(0, count, np.zeros(1, dtype=np.int64), count)
        return
    last: _Run | None = None  # the one that the next tensor may continue
    for spec, column in segment.places():
        start = max(column - first, 0)
        stop = min(column + spec.numel - first, count)
        if start >= stop:  # none of the tensor is in these columns
            continue
        for run in _runs_of_tensor(spec.shape, groups.rows_of[spec.name], start + first - column, stop - start):
            placed = run._replace(start=run.start + start, stop=run.stop + start)
            if last is None:
                last = placed
                continue
            joined = _joined(last, placed)
            if joined is None:
                yield last
            last = joined or placed
    if last is not None:
        yield last


def _runs_of_tensor(shape: Sequence[int], of: TensorRows, first: int, count: int) -> Iterator[_Run]:
    """The runs of ``count`` numbers of a tensor from ``first``: whole repetitions, and at both ends single channels.

    Yields:
        The runs, with columns counted from ``first``.
    """
    rows = of.of_channels()
    inner = math.prod(shape[of.axis + 1 :])
    period = len(rows) * inner
    position = 0
    while position < count:
        at = (first + position) % period
        left = count - position
        channel, inside = divmod(at, inner)
        if at == 0 and left >= period:
            length = left // period * period
            channels = rows
        elif inside == 0 and left >= inner:
            number = min(len(rows) - channel, left // inner)
            length = number * inner
            channels = rows[channel : channel + number]
        else:  # a part of a channel
            length = min(inner - inside, left)
            channels = rows[channel : channel + 1]
        width = inner if len(channels) > 1 else length
        yield _Run(position, position + length, channels, width)
        position += length


def _joined(one: _Run, other: _Run) -> _Run | None:
    """Two neighbouring runs as one; ``None`` where their rows do not allow it."""
    length = other.stop - one.start
    if len(one.rows) == len(other.rows) == 1 and one.rows[0] == other.rows[0]:
        return _Run(one.start, other.stop, one.rows, length)
    of_single_numbers = all(run.stop - run.start == len(run.rows) for run in (one, other))
    if of_single_numbers:
        return _Run(one.start, other.stop, np.concatenate([one.rows, other.rows]), 1)
    return None


def accumulator(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products are summed: float64 for float64, float32 for all others.

    float64 also where the process allows products of float32 in fewer bits. To forbid that for a merge would change
    what another thread samples meanwhile.
    """
    if dtype == torch.float64 or accelerator.rounds_float32(device):
        return torch.float64
    return torch.float32


def merge_threads() -> int:
    """How many threads merge on the CPU: as many as torch would use, up to :data:`_MOST_THREADS`."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def columns_of(column_bytes: int, device: torch.device, *, bytes_on_cpu: int) -> int:
    """How many columns a tile has if each takes ``column_bytes`` while it is computed with.

    All together they take ``bytes_on_cpu``, or :data:`_DEVICE_TILE_BYTES` on a device. With very many rows they take
    more: products of a few columns would be slow.
    """
    tile_bytes = _DEVICE_TILE_BYTES
    if device == CPU:
        tile_bytes = bytes_on_cpu
    return max(tile_bytes // column_bytes, FEWEST_COLUMNS)
