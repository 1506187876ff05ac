"""Linear combinations of the rows of a matrix, wherever its columns are: mapped, on a device, or streamed.

Rows are combined tile by tile: columns that are few enough for a processor's cache, in all rows. One product for each
tile and thread is faster than one product of many threads, and far more so where the cores have other work, too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.trajectory.layout import Segment, TensorSpec
from lcsc_opt.trajectory.manifest import Manifest
from lcsc_opt.trajectory.placement import FEWEST_COLUMNS, Placed

StateDict = dict[str, Tensor]
_Ranges = list[tuple[int, int]]
"""Slots as ranges ``[first, last)``."""

_Tile = tuple[int, int, int]
"""Columns ``[start, stop)``, and the row of coefficients that they are merged with."""

TILE_BYTES = 32 * 2**20  # of all rows and threads together; larger ones were not faster
_DEVICE_TILE_BYTES = 256 * 2**20
PROJECTION_TILE_BYTES = 4 * 2**20  # larger ones leave the cache between the two steps of a projection
_MOST_THREADS = 8  # some are enough for all the bandwidth of the memory


class Merger:
    """Combines the rows ``[slots, row_bytes]`` uint8 of a matrix; results are on the device of the source.

    They are float32 if the manifest says that rows were rounded, else of the rows' dtypes. On a GPU it works on a
    stream of its own, next to a sampler's, and what it returns is finished. With layer ``groups`` it also combines with
    a row of coefficients for each, in the same read: no tile has columns of two groups.
    """

    def __init__(self, source: Placed, rows: Tensor, manifest: Manifest, groups: LayerGroups | None = None) -> None:
        self.source, self._rows, self._tensors, self._groups = source, rows, manifest.tensors, groups
        self.slots = [saved.slot for saved in manifest.checkpoints]  # [K], in the order of their steps
        self._varying, self._widened = frozenset(manifest.varying), manifest.stored is not None
        self.segments = manifest.layout.segments(self._varying)  # what is combined

    def merge(self, coefficients: npt.NDArray[np.float64]) -> StateDict:
        """The combination for ``[K]`` or ``[S, K]``; see :meth:`Trajectory.merge`."""
        if coefficients.ndim == 2 and (coefficients == coefficients[:1]).all():
            coefficients = coefficients[0]
        merged: StateDict = {}
        with self._own_stream(merged):
            nonzero = np.flatnonzero(coefficients)
            if coefficients.ndim == 1 and len(nonzero) == 1 and coefficients[nonzero[0]] == 1.0:
                merged |= self._copy(int(nonzero[0]), self._tensors)
            else:
                merged |= self._combine(coefficients)
        return merged

    def project(self, gradients: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """⟨theta_i, gradient⟩, ``[K]`` or ``[S, K]``; see :meth:`Trajectory.project`. On the caller's stream.

        The differences of the rows from one of them are projected, and that one in float64: checkpoints are much closer
        to each other than to zero, and what they have in common would cost the digits in which they differ.
        """
        device, ranges = self.source.device, _ranges_of(self.slots)
        flat: dict[Segment, Tensor] = {}  # [n] in the order of the columns; zero for tensors without a gradient
        for segment in self.segments:
            dtype = _accumulator(segment.dtype, device)
            parts = [
                gradients[spec.name].detach().to(device, dtype).reshape(-1)
                if spec.name in gradients
                else torch.zeros(spec.numel, dtype=dtype, device=device)
                for spec in segment.tensors
            ]
            flat[segment] = torch.cat(parts)
        wanted = [segment for segment in self.segments if any(spec.name in gradients for spec in segment.tensors)]
        count = 1 if self._groups is None else len(self._groups)
        projected = torch.zeros(count, max(self.slots) + 1, dtype=torch.float64, device=device)
        with (
            torch.autocast(device.type, enabled=False),
            contextlib.closing(self.source.columns(wanted, self.slots)) as read,
        ):
            for segment, first, columns in read:
                gradient, dtype = flat[segment][first : first + columns.shape[1]], flat[segment].dtype
                common = torch.zeros(count, dtype=torch.float64, device=device)
                total = torch.zeros_like(projected)
                runs = self._runs(segment, first, columns.shape[1], self._groups)
                for start, stop, row in self._tiles(runs, len(self.slots), dtype, PROJECTION_TILE_BYTES):
                    own = gradient[start:stop]
                    origin = columns[ranges[0][0], start:stop].to(dtype)
                    common[row] += origin.double() @ own.double()
                    for a, b in ranges:
                        total[row, a:b] += ((columns[a:b, start:stop].to(dtype) - origin) @ own).double()
                for a, b in ranges:
                    total[:, a:b] += common[:, None]
                projected += total
        found: npt.NDArray[np.float64] = projected.cpu()[:, list(self.slots)].numpy()
        return found[0] if self._groups is None else found

    def float64_tiles(self) -> Generator[tuple[int, Tensor]]:
        """All columns that vary, ``[K, n]`` float64 in the order of the steps, a tile at a time, each with its row."""
        order = torch.tensor(self.slots, device=self.source.device)
        for segment, first, columns in self.source.columns(self.segments, self.slots):
            dtype = _accumulator(segment.dtype, self.source.device)
            runs = self._runs(segment, first, columns.shape[1], self._groups)
            for start, stop, row in self._tiles(runs, 2 * len(self.slots), dtype):  # of float64
                yield row, columns[:, start:stop].index_select(0, order).double()

    def _combine(self, coefficients: npt.NDArray[np.float64]) -> StateDict:
        together = {spec.name for segment in self.segments for spec in segment.tensors}
        others = [spec for spec in self._tensors if spec.name not in together]
        groups = None if coefficients.ndim == 1 else self._groups
        coefficients = coefficients.reshape(-1, len(self.slots))  # [S, K], S = 1 without groups
        merged: StateDict = {}
        for row, index in enumerate(coefficients.argmax(axis=1)):  # copied from the largest of their group
            own = (spec for spec in others if groups is None or groups.row_of.get(spec.name, 0) == row)
            merged |= self._copy(int(index), own)
        device, slots = self.source.device, self.slots
        used = [slot for slot, some in zip(slots, (coefficients != 0).any(axis=0), strict=True) if some]
        slots = used if 2 * len(used) <= len(slots) else slots  # one block of rows is read faster than many
        ranges = _ranges_of(slots)
        by_slot = torch.zeros(len(coefficients), max(self.slots) + 1, dtype=torch.float64, device="cpu")
        by_slot[:, list(self.slots)] = torch.from_numpy(np.ascontiguousarray(coefficients))
        by_slot = by_slot.to(device, non_blocking=True)
        held = sum(last - first for first, last in ranges) + 1
        flat: dict[Segment, Tensor] = {}  # [columns]
        for segment in self.segments:
            stored = torch.float32 if self._widened else segment.dtype
            flat[segment] = torch.empty(segment.width, dtype=stored, device=device)
            for spec, first in segment.places():
                merged[spec.name] = flat[segment][first : first + spec.numel].view(spec.shape)
        threads = _threads() if device == CPU else 1
        pool = ThreadPoolExecutor(threads, "lcsc-merge", initializer=_without_further_threads)
        with (
            pool,
            torch.autocast(device.type, enabled=False),
            contextlib.closing(self.source.columns(self.segments, slots)) as read,
        ):
            for segment, first, columns in read:
                dtype, width = _accumulator(segment.dtype, device), columns.shape[1]
                runs = self._runs(segment, first, width, groups)
                tiles = iter(list(self._tiles(runs, held, dtype)))  # threads share a list's iterator safely
                part = flat[segment][first : first + width]
                product = functools.partial(_multiply, by_slot.to(dtype), columns, ranges, tiles, part)
                if threads == 1:  # on a GPU this thread's stream is the one
                    product()
                else:
                    for future in [pool.submit(product) for _ in range(threads)]:
                        future.result()
        return {spec.name: merged[spec.name] for spec in self._tensors}

    @staticmethod
    def _runs(segment: Segment, first: int, columns: int, groups: LayerGroups | None) -> list[_Tile]:
        """Those ``columns`` of a segment from ``first``, divided where the group changes; counted from ``first``."""
        if groups is None:
            return [(0, columns, 0)]
        runs: list[_Tile] = []
        for spec, begin in segment.places():
            start, stop = max(begin - first, 0), min(begin + spec.numel - first, columns)
            if start < stop:
                row = groups.row_of[spec.name]
                if runs and runs[-1][2] == row:
                    start = runs.pop()[0]
                runs.append((start, stop, row))
        return runs

    def _tiles(
        self, runs: Sequence[_Tile], rows: int, dtype: torch.dtype, at_most: int | None = None
    ) -> Iterator[_Tile]:
        """Runs in tiles such that ``rows`` rows of ``dtype`` take ``at_most`` bytes, or a thread's share."""
        share = (at_most or TILE_BYTES // _threads()) if self.source.device == CPU else _DEVICE_TILE_BYTES
        width = max(share // (rows * dtype.itemsize), FEWEST_COLUMNS)
        return (
            (start, min(start + width, last), row) for first, last, row in runs for start in range(first, last, width)
        )

    def _copy(self, index: int, specs: Iterable[TensorSpec]) -> StateDict:
        """Tensors of checkpoint ``index``, bit for bit."""
        row, there = self._rows[self.slots[index]], self._constants
        return {
            spec.name: there[spec.name].clone()
            if spec.name in there
            else spec.copy_from(row, widened=self._widened).to(self.source.device)
            for spec in specs
        }

    @functools.cached_property
    def _constants(self) -> StateDict:
        """Tensors that are the same in all checkpoints, on a GPU: they need not travel each time."""
        if self.source.device == CPU:
            return {}
        row, same = self._rows[self.slots[0]], [spec for spec in self._tensors if spec.name not in self._varying]
        return {spec.name: spec.copy_from(row, widened=self._widened).to(self.source.device) for spec in same}

    @functools.cached_property
    def _stream(self) -> torch.Stream:
        return torch.Stream(self.source.device)

    @contextlib.contextmanager
    def _own_stream(self, result: StateDict) -> Iterator[None]:
        """On a GPU, a stream of its own; the ``result`` is finished then, and freed when the caller's stream is."""
        if self.source.device == CPU:
            yield
            return
        caller = torch.accelerator.current_stream(self.source.device)
        with accelerator.on(self._stream):
            yield
            finished = accelerator.recorded(self.source.device)
        for tensor in result.values():
            tensor.record_stream(caller)
        accelerator.wait_for(finished)


def _multiply(coefficients: Tensor, columns: Tensor, ranges: _Ranges, tiles: Iterator[_Tile], merged: Tensor) -> None:
    """Write the product of ``[S, slots]`` and ``[slots, n]``, in the dtype of the first, into ``merged`` ``[n]``.

    Only the slots in ``ranges`` are read.
    """
    dtype = coefficients.dtype
    scratch = torch.empty(0, dtype=dtype, device=columns.device)  # new memory for each tile would be slow, page by page
    for start, stop, row in tiles:
        out = merged[None, start:stop]
        total = None
        for first, last in ranges:
            rows = columns[first:last, start:stop]
            if rows.dtype != dtype:
                if scratch.numel() < rows.numel():  # to widen rows
                    scratch = torch.empty(rows.numel(), dtype=dtype, device=columns.device)
                rows = scratch[: rows.numel()].view(rows.shape).copy_(rows)
            own = coefficients[row, None, first:last]
            if total is None:
                total = torch.mm(own, rows, out=out if out.dtype == dtype else None)
            else:
                total.addmm_(own, rows)
        if total is not None and out.dtype != dtype:
            out.copy_(total)


def _accumulator(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of this dtype are summed in: float64 for float64, float32 for all others.

    float64 also where the process allows products of float32 in fewer bits: that setting must not change while another
    thread samples.
    """
    return torch.float64 if dtype == torch.float64 or accelerator.rounds_float32(device) else torch.float32


def _threads() -> int:
    """How many a merge takes: as many as torch would."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def _without_further_threads() -> None:
    """Products in this thread must not start threads of their own: they would wait for each other by spinning."""
    torch.get_num_threads()  # gives a new thread as many as others have
    _openmp().limit(limits=1, user_api="openmp")  # for this thread only


_openmp = functools.cache(ThreadpoolController)  # made once: looking for the libraries takes milliseconds


def _ranges_of(slots: Sequence[int]) -> _Ranges:
    numbered = itertools.groupby(enumerate(sorted(slots)), key=lambda item: item[1] - item[0])
    groups = [[slot for _, slot in group] for _, group in numbered]
    return [(group[0], group[-1] + 1) for group in groups]
