"""Linear combinations of mapped rows, streamed in blocks of columns.

Measured with K = 200 float32 checkpoints in memory: one candidate takes 1.6 reads of the store; 4 to 16 candidates
at once take two (two cores) to four times (one core) as long as one, in one transposed product of full width.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lcsc_opt.errors import CoefficientsError
from lcsc_opt.trajectory.layout import Segment

BLOCK_BYTES = 16 * 2**20  # of all rows together; larger ones were not faster
FEWEST_COLUMNS = 256
MANY_CANDIDATES = 4  # from here on the transposed product wins
FULL_TILE = 16  # the product takes as long for 4 candidates, so fewer get rows of zeros
SUM_TOLERANCE = 1e-9

Put = Callable[[int, int, Tensor], None]
"""Takes the columns ``[a, b)`` of a segment and their merged values ``[B, b − a]``."""


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


def view_columns(store: Tensor, segment: Segment) -> Tensor:
    """The columns of ``segment`` in all slots, ``[slots, n]`` of its dtype, without a copy."""
    return store[:, segment.start : segment.stop].view(segment.dtype)


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


def blocks(columns: int, rows: int, itemsize: int, *, at_most: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges ``[a, b)`` of columns such that a block of ``rows`` rows takes about ``at_most`` bytes."""
    width = max(at_most // (max(rows, 1) * itemsize), FEWEST_COLUMNS)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def merge_segment(region: Tensor, coefficients: Tensor, runs: list[tuple[int, int]], put: Put) -> None:
    """Merge one segment for all candidates.

    Args:
        region: ``[slots, n]``, mapped.
        coefficients: ``[B, slots]`` float64, zero for slots without a checkpoint.
        runs: the rows to read.
        put: is given the merged values block by block.
    """
    dtype = accumulator(region.dtype)
    candidates = len(coefficients)
    if candidates >= MANY_CANDIDATES:
        coefficients = functional.pad(coefficients, (0, 0, 0, max(FULL_TILE - candidates, 0)))
    parts = [(first, last, coefficients[:, first:last].to(dtype)) for first, last in runs]
    rows = sum(last - first for first, last in runs) + len(coefficients)
    for start, stop in blocks(region.shape[1], rows, dtype.itemsize):
        total: Tensor | None = None
        for first, last, part in parts:
            total = _add(total, part, region[first:last, start:stop].to(dtype))
        if total is not None:
            put(start, stop, total[:candidates])


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
