"""Linear combinations of the rows of a matrix, wherever its columns are: mapped, on a device, or streamed.

Rows are combined tile by tile (:mod:`~lcsc_opt.trajectory.tiles`). On the CPU one product for each tile and thread is
faster than one product of many threads, and far more so where the cores have other work, too. On an accelerator that
holds the columns a merge is one product a segment, in the dtype in which they are stored, and one copy of all tensors
that are not combined: it takes as long as reading the columns once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.study_spec import LAYERS
from lcsc_opt.coefficients.layer_groups import LayerGroups, TensorRows
from lcsc_opt.trajectory import halves
from lcsc_opt.trajectory.layout import Segment, TensorSpec, aligned
from lcsc_opt.trajectory.manifest import Manifest
from lcsc_opt.trajectory.one_piece import OnePiece
from lcsc_opt.trajectory.placement import ColumnSource, runs_of
from lcsc_opt.trajectory.tiles import (
    PROJECTION_TILE_BYTES,
    TILE_BYTES,
    Tile,
    accumulator,
    columns_of,
    merge_threads,
    tiled_blocks,
)

StateDict = dict[str, Tensor]
_VARIANCE = "running_var"  # of torch's normalizations


class Merger:
    """Combines the rows of a matrix; results are on the device of the source.

    They are float32 if the manifest says that rows were rounded, else of the rows' dtypes. On a GPU it works on a
    stream of its own, next to a sampler's, and what it returns is finished.

    Args:
        source: gives the columns that are combined.
        rows: ``[slots, row_bytes]`` uint8, mapped; tensors that are copied come from here.
        manifest: names the slots of the K checkpoints, and the tensors.
        groups: tensors that may have a row of coefficients each, all combined in one read; ``None`` for one row.

    Attributes:
        source: as above.
        slots: of the checkpoints, ``[K]``, in the order of their steps.
        segments: the columns that are combined.
    """

    def __init__(
        self,
        source: ColumnSource,
        rows: Tensor,
        manifest: Manifest,
        groups: LayerGroups | None = None,
    ) -> None:
        self.source = source
        self.slots = [saved.slot for saved in manifest.checkpoints]
        self._rows = rows
        self._tensors = manifest.tensors
        self._groups = groups
        self._varying = frozenset(manifest.varying)
        self._widened = manifest.stored is not None
        self.segments = manifest.layout.segments(self._varying)

    def merge(self, coefficients: npt.NDArray[np.float64], *, wide: bool = False) -> StateDict:
        """The combination for ``[K]`` or ``[S, K]``; see :meth:`Trajectory.merge`."""
        if coefficients.ndim == 2 and (coefficients == coefficients[:1]).all():
            coefficients = coefficients[0]  # equal rows have the bits of one row
        merged: StateDict = {}  # filled below, so that the stream finds all its tensors at the end
        with self._own_stream(merged):
            index = _one_hot_index(coefficients)
            if index is None:
                merged |= self._combine(coefficients, wide=wide or self._widened)
            else:
                merged |= self._copied([(spec, index) for spec in self._tensors])
        return merged

    def project(self, gradients: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """⟨theta_i, gradient⟩, ``[K]`` or ``[S, K]``; see :meth:`Trajectory.project`. On the caller's stream.

        It is ⟨theta_i − origin, gradient⟩ + ⟨origin, gradient⟩, where the origin is one of the rows and the last term
        is summed in float64: checkpoints are much closer to each other than to zero, and what they have in common would
        cost the digits in which they differ.
        """
        device = self.source.device
        segments = [segment for segment in self.segments if any(spec.name in gradients for spec in segment.tensors)]
        flat = {segment: self._flat_gradient(segment, gradients) for segment in segments}
        runs = self._runs(self.slots)
        origin_slot = min(self.slots)  # any slot that is read: others may hold anything
        groups = 1 if self._groups is None else len(self._groups)
        projected = torch.zeros(groups, self.source.rows, dtype=torch.float64, device=device)

        blocks = tiled_blocks(self.source, segments, self.slots, groups=self._groups, width=self._columns_read)
        with torch.autocast(device.type, enabled=False), contextlib.closing(blocks):
            for segment, tiles in blocks:
                of_origin = torch.zeros(groups, dtype=torch.float64, device=device)
                of_rows = torch.zeros_like(projected)
                for tile in tiles:
                    gradient = flat[segment][tile.start : tile.stop]
                    origin = tile.columns[origin_slot].to(gradient.dtype)
                    rows = torch.from_numpy(tile.rows).to(device)
                    copied = origin[None].to(torch.float64, copy=True)
                    of_origin.index_add_(0, rows, _by_channel(tile, copied, gradient.double())[0])
                    for run in runs:
                        # a temporary: the memory of the differences, still in the cache, serves the next tile
                        products = _by_channel(tile, tile.columns[run] - origin, gradient)
                        of_rows[:, run].index_add_(0, rows, products.double().T)
                for run in runs:
                    of_rows[:, run] += of_origin[:, None]
                projected += of_rows
        by_checkpoint: npt.NDArray[np.float64] = projected.cpu()[:, self.slots].numpy()
        return by_checkpoint[0] if self._groups is None else by_checkpoint

    def squares(self) -> dict[str, tuple[float, float]]:
        """Tensor that is combined → Σ of its squared weights, mean over checkpoints, and Σ of their squared deviations.

        The deviations are those of each checkpoint from the mean of all, summed over checkpoints.
        """
        segments = self.segments
        names = [spec.name for segment in segments for spec in segment.tensors]
        by_tensor = LayerGroups(
            tuple(names), (1,) * len(names), {name: TensorRows(row) for row, name in enumerate(names)}, LAYERS
        )
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.source.device)

        blocks = tiled_blocks(self.source, segments, self.slots, groups=by_tensor, width=self._columns_read)
        with contextlib.closing(blocks):
            for segment, tiles in blocks:
                dtype = accumulator(segment.dtype, self.source.device)
                for tile in tiles:
                    rows = tile.columns[self.slots].to(dtype)
                    mean = rows.mean(dim=0)
                    sums[tile.rows[0], 0] += mean.square().sum().double()
                    sums[tile.rows[0], 1] += (rows - mean).square_().sum().double()
        return {name: (weights, deviations) for name, (weights, deviations) in zip(names, sums.tolist(), strict=True)}

    def _columns_read(self, dtype: torch.dtype) -> int:
        """How many columns a tile has where all rows are read and nothing of them is kept."""
        column = len(self.slots) * accumulator(dtype, self.source.device).itemsize
        return columns_of(column, self.source.device, bytes_on_cpu=PROJECTION_TILE_BYTES)

    def _combine(self, coefficients: npt.NDArray[np.float64], *, wide: bool) -> StateDict:
        """The combination of ``[K]`` or ``[S, K]``: products where tensors vary, copies of all others.

        With ``wide``, products of half types stay as they were summed.
        """
        groups = None if coefficients.ndim == 1 else self._groups
        coefficients = coefficients.reshape(-1, len(self.slots))  # [S, K], S = 1 without groups
        merged = self._not_combined(coefficients, groups)
        products: StateDict = {}
        flat: dict[Segment, Tensor] = {}
        for segment in self.segments:
            dtype = torch.promote_types(segment.dtype, torch.float32) if wide else segment.dtype
            # behind the last column is room for the columns of zeros that a source may give
            flat[segment] = torch.empty(aligned(segment.width), dtype=dtype, device=self.source.device)
            for spec, first in segment.places():
                products[spec.name] = flat[segment][first : first + spec.numel].view(spec.shape)
        if not self._multiply_into(flat, coefficients, groups):
            raise _too_large(products)
        variances = [tensor for name, tensor in products.items() if name.endswith(_VARIANCE)]
        if variances:
            torch._foreach_clamp_min_(variances, 0)  # an extrapolated one may be negative, and its root is NaN
        merged |= products
        return {spec.name: merged[spec.name] for spec in self._tensors}

    def _not_combined(self, coefficients: npt.NDArray[np.float64], groups: LayerGroups | None) -> StateDict:
        """Tensors that are not combined, each from the checkpoint with the largest coefficient of its group.

        Args:
            coefficients: ``[S, K]``; S is 1 without groups.
            groups: which row each tensor has; the tensors that never change are in none.
        """
        combined = {spec.name for segment in self.segments for spec in segment.tensors}
        largest = coefficients.argmax(axis=1)
        rows_of: Mapping[str, TensorRows] = {} if groups is None else groups.rows_of
        copied = [spec for spec in self._tensors if spec.name not in combined]
        return self._copied([(spec, int(largest[rows_of.get(spec.name, TensorRows(0)).first])) for spec in copied])

    def _multiply_into(
        self, flat: Mapping[Segment, Tensor], coefficients: npt.NDArray[np.float64], groups: LayerGroups | None
    ) -> bool:
        """Write the products of ``[S, K]`` coefficients with all columns that are combined into ``flat``.

        It has ``[n]`` for each segment, with room behind its last column for the zeros that a source may give.
        ``groups`` is ``None`` where S is 1.

        Returns:
            Whether they are finite: each tile is looked at while it is in the cache. On an accelerator nobody looks,
            which would wait for it: there such a model fails by its loss.
        """
        device = self.source.device
        slots = self._slots_to_read(coefficients)
        runs = self._runs(slots)
        rows_read = sum(run.stop - run.start for run in runs)
        by_slot = torch.zeros(len(coefficients), self.source.rows, dtype=torch.float64, device="cpu")
        by_slot[:, self.slots] = torch.from_numpy(np.ascontiguousarray(coefficients))
        products = {segment.dtype: _product(by_slot, segment.dtype, device) for segment in self.segments}
        threads = merge_threads() if device == CPU else 1
        are_finite: list[Tensor] = []  # of each tile
        width = functools.partial(_columns_merged, rows_read, device)
        blocks = tiled_blocks(self.source, self.segments, slots, groups=groups, width=width)
        with (
            ThreadPoolExecutor(threads, "lcsc-merge", initializer=_without_further_threads) as pool,
            torch.autocast(device.type, enabled=False),
            contextlib.closing(blocks),
        ):
            for segment, tiles in blocks:
                shared = iter(tiles)  # threads share a list's iterator safely: each takes the next tile
                product = functools.partial(products[segment.dtype], runs, shared, flat[segment], are_finite)
                if threads == 1:  # on a GPU, the stream is that of this thread
                    product()
                else:
                    for future in [pool.submit(product) for _ in range(threads)]:
                        future.result()
        return not are_finite or bool(torch.stack(are_finite).all())

    def _slots_to_read(self, coefficients: npt.NDArray[np.float64]) -> list[int]:
        """The slots that have a coefficient other than zero, if at most half of them do.

        Else all slots of checkpoints: neighbouring rows are multiplied at once, and single ones one after the other.
        """
        nonzero = (coefficients != 0).any(axis=0)
        used = [slot for slot, is_used in zip(self.slots, nonzero, strict=True) if is_used]
        if 2 * len(used) <= len(self.slots):
            return used
        return self.slots

    def _runs(self, slots: Sequence[int]) -> list[slice]:
        """The rows of a block that are multiplied for these slots, as slices; one product is faster than several."""
        if self.source.multiplies_all:
            return [slice(0, self.source.rows)]
        return runs_of(slots)

    def _flat_gradient(self, segment: Segment, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient in the order of the segment's columns, ``[n]``; zero for tensors without one.

        It is as long as the columns that a source gives, which may have columns of zeros behind the segment's. One
        kernel joins its parts: to copy each tensor into its place would launch one for each.
        """
        device = self.source.device
        dtype = accumulator(segment.dtype, device)
        behind = aligned(segment.width) - segment.width
        lacking = [spec.numel for spec in segment.tensors if spec.name not in gradients]
        zeros = torch.zeros(max([behind, *lacking]), dtype=dtype, device=device)  # each part of zeros is a part of it
        parts: list[Tensor] = []
        for spec in segment.tensors:
            gradient = gradients.get(spec.name)
            if gradient is None:
                parts.append(zeros[: spec.numel])
            else:
                parts.append(gradient.detach().reshape(-1).to(device, dtype))
        return torch.cat([*parts, zeros[:behind]])

    def _copied(self, chosen: Iterable[tuple[TensorSpec, int]]) -> StateDict:
        """Copies of tensors, bit for bit: each with the index of the checkpoint that it is taken from.

        A device gets them in one piece, and what is the same in all checkpoints only at the first merge.
        """
        if self.source.device == CPU:
            return {spec.name: self._copied_from(self.slots[index], spec) for spec, index in chosen}
        varying = {
            spec.name: self._copied_from(self.slots[index], spec)
            for spec, index in chosen
            if spec.name in self._varying
        }
        return self._constants.copies() | OnePiece(varying, self.source.device).tensors()

    def _copied_from(self, slot: int, spec: TensorSpec) -> Tensor:
        """A copy on the CPU, in float32 if it was rounded when it was stored."""
        return spec.copy_from(spec.of_row(self._rows[slot]), widened=self._widened)

    @functools.cached_property
    def _constants(self) -> OnePiece:
        """Tensors that are the same in all checkpoints, on a device: they need not be copied there for each merge."""
        slot = self.slots[0]
        constants = [spec for spec in self._tensors if spec.name not in self._varying]
        return OnePiece({spec.name: self._copied_from(slot, spec) for spec in constants}, self.source.device)

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


def _one_hot_index(coefficients: npt.NDArray[np.float64]) -> int | None:
    """Where ``[K]`` coefficients are one, if they are zero everywhere else; ``None`` otherwise, and for ``[S, K]``."""
    if coefficients.ndim > 1:
        return None
    nonzero = np.flatnonzero(coefficients)
    if len(nonzero) == 1 and coefficients[nonzero[0]] == 1.0:
        return int(nonzero[0])
    return None


def _by_channel(tile: Tile, columns: Tensor, gradient: Tensor) -> Tensor:
    """The products of ``columns`` ``[r, n]``, which are overwritten, with a gradient ``[n]``: ``[r, channels]``."""
    if len(tile.rows) == 1:
        return (columns @ gradient)[:, None]
    return tile.by_channel(columns.mul_(gradient)).sum(dim=(1, 3))


def _product(coefficients: Tensor, dtype: torch.dtype, device: torch.device) -> Callable[..., None]:
    """What multiplies coefficients ``[S, slots]`` float64 with tiles of a dtype.

    Returns:
        :func:`_multiply` or :func:`_multiply_halves` without its first argument; each thread calls it for some tiles.
    """
    weights = coefficients.to(accumulator(dtype, device))
    if accelerator.sums_halves(device, dtype):
        return functools.partial(_multiply_halves, halves.divided(coefficients, dtype).to(device), weights)
    return functools.partial(_multiply, weights.to(device))


def _columns_merged(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many columns of ``rows`` rows are merged at once, by the memory that each takes beside the stored rows."""
    summed = accumulator(dtype, device)
    if accelerator.sums_halves(device, dtype):
        column = halves.terms(dtype) * torch.float32.itemsize  # a sum for each term
    elif device != CPU and dtype == summed:
        column = summed.itemsize  # rows are read where they are
    else:
        column = (rows + 1) * summed.itemsize  # widened rows, and their sum
    return columns_of(column, device, bytes_on_cpu=TILE_BYTES // merge_threads())


def _multiply_halves(
    terms: Tensor, weights: Tensor, runs: Sequence[slice], tiles: Iterator[Tile], merged: Tensor, _: list[Tensor]
) -> None:
    """As :func:`_multiply`, by T terms of each coefficient, ``[T, S, slots]``; of channels by ``weights`` on the CPU.

    Only accelerators do this, where nobody looks whether numbers are finite.
    """
    for tile in tiles:
        out = merged[tile.start : tile.stop]
        if len(tile.rows) == 1:
            halves.multiply(terms, runs, tile, out)
        else:
            _combine_channels(weights, runs, tile, out)


def _multiply(
    weights: Tensor, runs: Sequence[slice], tiles: Iterator[Tile], merged: Tensor, are_finite: list[Tensor]
) -> None:
    """Write the products of ``weights`` ``[S, slots]`` with tiles into ``merged`` ``[n]``.

    They are computed in the dtype of the weights. Only the slots in ``runs`` are read. Whether the numbers of each tile
    are finite is added to ``are_finite``.
    """
    dtype = weights.dtype
    # memory in which rows are widened: new memory for each tile would be slow, page by page
    scratch = torch.empty(0, dtype=dtype, device=merged.device)
    for tile in tiles:
        out = merged[None, tile.start : tile.stop]
        if len(tile.rows) > 1:
            _combine_channels(weights, runs, tile, out[0])
            _look_whether_finite(out, are_finite)
            continue
        total: Tensor | None = None
        for run in runs:
            rows = tile.columns[run]
            if rows.dtype != dtype:
                if scratch.numel() < rows.numel():
                    scratch = torch.empty(rows.numel(), dtype=dtype, device=merged.device)
                rows = scratch[: rows.numel()].view(rows.shape).copy_(rows)
            row_weights = weights[tile.rows[0], None, run]
            if total is not None:
                total.addmm_(row_weights, rows)
            elif out.dtype == dtype:
                total = torch.mm(row_weights, rows, out=out)
            else:
                total = torch.mm(row_weights, rows)
        if total is not None and out.dtype != dtype:
            out.copy_(total)
        _look_whether_finite(out, are_finite)


def _combine_channels(weights: Tensor, runs: Sequence[slice], tile: Tile, out: Tensor) -> None:
    """Write a tile of several channels into ``out`` ``[n]``: each channel's columns by its row of ``[S, slots]``."""
    dtype = weights.dtype
    rows = torch.from_numpy(tile.rows).to(weights.device)
    of_channels = weights[rows, None].to(out.device)  # [channels, 1, slots]
    total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    sums = tile.by_channel(total)[:, :, None]  # [outer, channels, 1, inner]
    for run in runs:
        by_channel = tile.by_channel(tile.columns[run].to(dtype)).movedim(0, -2)  # [outer, channels, slots, inner]
        for columns, sum_of_columns in zip(by_channel, sums, strict=True):
            if run is runs[0]:
                torch.bmm(of_channels[..., run], columns, out=sum_of_columns)
            else:
                sum_of_columns.baddbmm_(of_channels[..., run], columns)
    if total is not out:
        out.copy_(total)


def _look_whether_finite(merged: Tensor, are_finite: list[Tensor]) -> None:
    """Add to ``are_finite`` whether these numbers are; on the CPU alone."""
    if merged.device == CPU:
        least, most = torch.aminmax(merged)  # far faster than isfinite of all
        are_finite.append(torch.isfinite(least) & torch.isfinite(most))


def _too_large(merged: Mapping[str, Tensor]) -> TrajectoryError:
    """The error of a merge that has left the range of its dtype, as float16 does at 65,504."""
    name = next(name for name, tensor in merged.items() if not bool(torch.isfinite(tensor).all()))
    return TrajectoryError(
        f"Tensor {name!r} of the merged model is too large for {merged[name].dtype}, the dtype of the checkpoints: "
        "take smaller coefficients, or save checkpoints as float32 or bfloat16."
    )


def _without_further_threads() -> None:
    """Products in this thread must not start threads of their own: they would wait for each other by spinning."""
    torch.get_num_threads()  # torch sets a new thread's number when it is first needed: now, and not after the limit
    _openmp().limit(limits=1, user_api="openmp")  # for this thread only


_openmp = functools.cache(ThreadpoolController)  # made once: looking for the libraries takes milliseconds
