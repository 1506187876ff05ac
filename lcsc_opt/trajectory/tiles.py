"""The columns of a matrix, tile by tile, each tile of one layer group.

On the CPU a tile fits into the cache. A device has none that would matter: there a tile is as large as memory allows.

Whatever reads a trajectory's numbers (merges, projections, Gram matrices) is a loop over :func:`tiled_blocks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.trajectory.layout import Segment
from lcsc_opt.trajectory.placement import FEWEST_COLUMNS, ColumnSource

TILE_BYTES = 32 * 2**20  # of all rows and threads together; larger ones were not faster
PROJECTION_TILE_BYTES = 4 * 2**20  # larger ones leave the cache between the two steps of a projection
_DEVICE_TILE_BYTES = 256 * 2**20
_MOST_THREADS = 8  # some are enough for all the bandwidth of the memory


class Tile(NamedTuple):
    """Neighbouring columns of one segment that are merged with the same row of coefficients.

    Attributes:
        start: the first column, counted from the segment's first one.
        stop: the column behind the last one.
        columns: ``[slots, stop - start]``, in the dtype of the segment; slots that were not asked for hold anything.
        row: a row of ``[S, K]`` coefficients; 0 without layer groups.
    """

    start: int
    stop: int
    columns: Tensor
    row: int


def tiled_blocks(
    source: ColumnSource,
    segments: Sequence[Segment],
    slots: Sequence[int],
    *,
    groups: LayerGroups | None,
    width: Callable[[torch.dtype], int],
) -> Generator[tuple[Segment, list[Tile]]]:
    """All columns of these segments, in order: what is in memory at once, divided into tiles.

    Tiles are valid until the next block is asked for. No tile has columns of two layer groups.

    Args:
        source: the source of the columns.
        segments: to read.
        slots: to read, of each column.
        groups: which row of coefficients each tensor is merged with; ``None`` if there is one row.
        width: how many columns a tile has, at most, by their dtype.
    """
    with contextlib.closing(source.blocks(segments, slots)) as blocks:
        for segment, first, columns in blocks:
            most = width(segment.dtype)
            tiles: list[Tile] = []
            for begin, end, row in _runs(segment, first, columns.shape[1], groups):
                for start in range(begin, end, most):
                    stop = min(start + most, end)
                    tiles.append(Tile(first + start, first + stop, columns[:, start:stop], row))
            yield segment, tiles


def _runs(segment: Segment, first: int, count: int, groups: LayerGroups | None) -> Iterator[tuple[int, int, int]]:
    """Divide ``count`` columns of a segment, from ``first``, where the row of coefficients changes.

    Columns behind the segment's last tensor, which are zeros, belong to no run where there are groups.

    Yields:
        The columns ``[start, stop)`` of each run, counted from ``first``, and its row of coefficients.
    """
    if groups is None:
        yield 0, count, 0
        return
    run: tuple[int, int, int] | None = None  # the one that the next tensor may continue
    for spec, column in segment.places():
        start = max(column - first, 0)
        stop = min(column + spec.numel - first, count)
        if start >= stop:  # none of the tensor is in these columns
            continue
        row = groups.row_of[spec.name]
        if run is None:
            run = (start, stop, row)
        elif run[2] == row:
            run = (run[0], stop, row)
        else:
            yield run
            run = (start, stop, row)
    if run is not None:
        yield run


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
