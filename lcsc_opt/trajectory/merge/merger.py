"""The checkpoints of a trajectory merged, wherever their numbers are found."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.trajectory.disk.layout import Segment, TensorSpec
from lcsc_opt.trajectory.disk.rows import Columns, Rows
from lcsc_opt.trajectory.disk.tiles import Tile, accumulator
from lcsc_opt.trajectory.merge import arithmetic, projection
from lcsc_opt.trajectory.merge.memory import ReusedMemory
from lcsc_opt.trajectory.merge.sources import Source

StateDict = dict[str, Tensor]
DEVICE_TILE_BYTES = 256 * 2**20  # of all rows together, where a device combines them


class Merger:
    """Combines the rows of a trajectory; results are on the device of the source.

    On a GPU it works on a stream of its own, beside a sampler's, and what it returns is finished.

    Args:
        rows: of all slots.
        source: where their numbers are found.
        tensors: of a checkpoint.
        segments: those that vary and are combined.
        slots: of the K checkpoints, in the order of their steps.
        varying: the names of tensors that are not the same in all of them.
    """

    def __init__(
        self,
        rows: Rows,
        source: Source,
        tensors: tuple[TensorSpec, ...],
        segments: tuple[Segment, ...],
        slots: Sequence[int],
        varying: frozenset[str],
    ) -> None:
        self._rows, self.source, self._tensors, self._segments = rows, source, tensors, segments
        self._slots = list(slots)
        self._stream = None if source.device.type != "cuda" else torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        self._constants: StateDict = {}
        self._memory = ReusedMemory()
        if not source.threads:  # elsewhere they would travel each time
            self._constants = self._copy(0, tuple(spec for spec in tensors if spec.name not in varying))

    def merge(self, rows: npt.NDArray[np.float64]) -> list[StateDict]:
        """The combinations for ``[B, K]``; see :meth:`Trajectory.merge`."""
        merged: list[StateDict] = [{} for _ in rows]
        combined: list[int] = []
        with self._beside(merged):
            for candidate, row in enumerate(rows):
                alone = arithmetic.only_one(row)
                if alone is None:
                    combined.append(candidate)
                else:
                    merged[candidate] = self._copy(alone, self._tensors)
            if combined:
                for candidate, result in zip(combined, self._combine(rows[combined]), strict=True):
                    merged[candidate] = result
        return merged

    def project(self, gradients: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """⟨theta_i, gradient⟩, ``[K]``; see :meth:`Trajectory.project`. On the caller's stream."""
        device, slots = self.source.device, arithmetic.slot_ranges(self._slots)
        total = torch.zeros(max(self._slots) + 1, dtype=torch.float64, device=device)
        flat = {segment: projection.flatten(gradients, segment, device) for segment in self._segments}
        wanted = [segment for segment in self._segments if flat[segment] is not None]
        with self._precisely(), contextlib.closing(self.source.columns(wanted, slots)) as read:
            for columns in read:
                gradient = flat[columns.segment]
                assert gradient is not None
                tiles = self._tiles(columns, len(self._slots), projection.TILE_BYTES)
                total += projection.project_tiles(tiles, gradient, slots)
        return total.cpu()[self._slots].numpy()

    def float64_tiles(self) -> Generator[Tensor]:
        """All varying columns, ``[K, n]`` float64 in the order of the steps, a tile at a time, less what all share."""
        order = torch.tensor(self._slots, device=self.source.device)
        slots = arithmetic.slot_ranges(self._slots)
        with contextlib.closing(self.source.columns(self._segments, slots)) as read:
            for columns in read:
                for tile in self._tiles(columns, 2 * len(self._slots)):  # of float64
                    yield tile.doubles(order)

    def _combine(self, rows: npt.NDArray[np.float64]) -> list[StateDict]:
        merged = [self._copied(int(row.argmax())) for row in rows]
        device, slots = self.source.device, arithmetic.choose_slots(rows, self._slots)
        by_slot = torch.zeros(len(rows), max(self._slots) + 1, dtype=torch.float64, device="cpu")
        by_slot[:, self._slots] = torch.from_numpy(rows)
        by_slot = by_slot.to(device)
        flat = {segment: [self._room(segment, result) for result in merged] for segment in self._segments}
        held = sum(last - first for first, last in slots) + len(rows)
        workers = arithmetic.Workers(arithmetic.threads() if self.source.threads else 1)
        with self._precisely(), workers, contextlib.closing(self.source.columns(self._segments, slots)) as read:
            for columns in read:
                dtype = accumulator(columns.segment.dtype, device)
                tiles = self._tiles(columns, held)
                arithmetic.merge_tiles(tiles, by_slot, slots, dtype, flat[columns.segment], workers)
        return [{spec.name: result[spec.name] for spec in self._tensors} for result in merged]

    def _tiles(self, columns: Columns, rows: int, at_most: int | None = None) -> Iterator[Tile]:
        threads = self.source.threads
        itemsize = accumulator(columns.segment.dtype, self.source.device).itemsize
        width = arithmetic.columns_at_once(rows, itemsize, at_most if threads else DEVICE_TILE_BYTES)
        return self._rows.tiles(columns, width, together=not threads)

    def _room(self, segment: Segment, result: StateDict) -> Tensor:
        """Put uninitialized tensors of the segment into a state dict; all of them, ``[columns]``."""
        if self.source.threads:
            flat, tensors = self._memory.take(segment)
            result.update(tensors)
            return flat
        flat = torch.empty(segment.width, dtype=segment.dtype, device=self.source.device)
        for spec, column in segment.places():
            result[spec.name] = flat[column : column + spec.numel].view(spec.shape)
        return flat

    @contextlib.contextmanager
    def _beside(self, results: list[StateDict]) -> Iterator[None]:
        """On a GPU, a stream of its own; ``results`` are finished then, and freed when the caller's stream is."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.source.device)
        with torch.cuda.stream(self._stream):
            yield
        for tensor in (tensor for result in results for tensor in result.values()):
            tensor.record_stream(caller)
        finished = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        finished.record(self._stream)
        finished.synchronize()

    @contextlib.contextmanager
    def _precisely(self) -> Iterator[None]:
        with torch.autocast(self.source.device.type, enabled=False), arithmetic.full_precision():
            yield

    def _copied(self, index: int) -> StateDict:
        """What a merge does not combine: constants, and integers of checkpoint ``index``."""
        combined = {spec.name for segment in self._segments for spec in segment.tensors}
        others = (spec for spec in self._tensors if spec.name not in combined)
        return self._copy(index, tuple(others))

    def _copy(self, index: int, specs: tuple[TensorSpec, ...]) -> StateDict:
        return {
            spec.name: self._constants[spec.name].clone()
            if spec.name in self._constants
            else self._rows.tensor(self._slots[index], spec).to(self.source.device)
            for spec in specs
        }
