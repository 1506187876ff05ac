"""Rows of 8-bit numbers: deviations from a mean that all rows share, with one scale for 256 neighbouring values.

Coefficients sum to one, so the mean factors out of a merge: sum of a_k theta_k = mean + sum of a_k (theta_k - mean).
A value is rounded to mean + scale * code: the mean is float32, the code a whole number from -127 to 127, the scale
float32 for each block of each row. Each tensor begins with a block of its own, filled up with zeros: a large tensor
does not cost a small one its digits, and layer groups end where blocks end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lcsc_opt.trajectory.layout import (
    ALIGNMENT,
    BLOCK,
    INT8,
    Layout,
    RowPart,
    Segment,
    TensorSpec,
    aligned,
    segments_of,
)
from lcsc_opt.trajectory.tiles import Tile

_LARGEST_CODE = 127
_FLOAT_BYTES = 4
_ENCODED_AT_ONCE = 2**18  # values; few enough to stay in a cache


@dataclasses.dataclass(frozen=True)
class Int8Layout:
    """Where the bytes of a row are: first all codes, then their scales, then the tensors that are not merged.

    Attributes:
        codes: name → the codes of a tensor, ``[n]`` int8, n a multiple of :data:`BLOCK`; in the order of their bytes.
        copied: name → a tensor that is stored as it is.
        row_bytes: the bytes of a row.
    """

    codes: Mapping[str, TensorSpec]
    copied: Mapping[str, TensorSpec]
    row_bytes: int

    @classmethod
    def of(cls, layout: Layout) -> Int8Layout:
        """The bytes of rows whose tensors have this layout once they are read."""
        codes: dict[str, TensorSpec] = {}
        copied: dict[str, TensorSpec] = {}
        end = 0
        for spec in layout.tensors:
            if spec.merged:
                padded = -(-spec.numel // BLOCK) * BLOCK
                codes[spec.name] = TensorSpec(spec.name, (padded,), INT8, end)
                end += padded
        end += end // BLOCK * _FLOAT_BYTES
        for spec in layout.tensors:
            if not spec.merged:
                copied[spec.name] = dataclasses.replace(spec, offset=end)
                end = copied[spec.name].end
        return cls(codes, copied, max(aligned(end), ALIGNMENT))

    @functools.cached_property
    def columns(self) -> int:
        """How many codes a row has: also their bytes, and where the scales begin."""
        return sum(spec.numel for spec in self.codes.values())

    @property
    def mean_bytes(self) -> int:
        """The bytes of the mean: float32, in the order of the codes."""
        return max(self.columns * _FLOAT_BYTES, ALIGNMENT)

    def mean_of(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The bytes of a mean, ``[n]`` uint8: its ``tensors`` in float32, each filled up with zeros."""
        for name, codes in self.codes.items():
            values = torch.zeros(codes.numel, device="cpu")
            flat = tensors[name].reshape(-1)
            values[: len(flat)] = flat
            yield values.view(torch.uint8)
        yield torch.zeros(self.mean_bytes - self.columns * _FLOAT_BYTES, dtype=torch.uint8, device="cpu")

    def scales(self, rows: Tensor) -> Tensor:
        """The scales ``[slots, columns / BLOCK]`` float32 in rows ``[slots, row_bytes]`` uint8; not copied."""
        stop = self.columns + self.columns // BLOCK * _FLOAT_BYTES
        return rows[:, self.columns : stop].view(torch.float32)

    def segments(self, varying: frozenset[str]) -> tuple[Segment, ...]:
        """The fewest segments of codes with all tensors that a merge combines."""
        return segments_of(self.codes.values(), varying)


def quantize(values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Round values ``[n]`` float32 to codes ``[m]`` int8 and scales ``[m / BLOCK]`` float32; m is n in whole blocks.

    ``mean`` is ``[m]`` float32, zero behind the n-th value. The scale of a block without deviations is zero. A scale is
    infinite where a deviation is too large for float32.
    """
    deviations = torch.zeros_like(mean)
    deviations[: len(values)] = values
    blocks = deviations.sub_(mean).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1) / _LARGEST_CODE
    divisors = torch.where(scales > 0, scales, 1.0)
    codes = blocks.div_(divisors[:, None]).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    codes[scales == 0] = 0  # a deviation may be so small that the scale is rounded to zero
    return codes.to(torch.int8).view(-1), scales


def dequantize(codes: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
    """``mean + scale * code``, ``[m]`` float32: a product and a sum, each rounded once, the same on every machine."""
    products = codes.view(-1, BLOCK).float().mul_(scales[:, None])
    return products.view(-1).add_(mean)


class Encoder:
    """Encodes the rows of a trajectory whose ``mean`` is ``[columns]`` float32."""

    def __init__(self, layout: Int8Layout, mean: Tensor) -> None:
        self._layout = layout
        self._mean = mean

    def encode(self, spec: TensorSpec, content: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Encode a tensor that is merged, a piece at a time, from the bytes of its float32, ``[n]`` uint8.

        Yields:
            Codes, scales, and the float32 values that they stand for. Those are not finite if the given ones are not,
            or are too far from the mean.
        """
        values = content.view(torch.float32)
        start = self._layout.codes[spec.name].offset
        for first in range(0, len(values), _ENCODED_AT_ONCE):
            piece = values[first : first + _ENCODED_AT_ONCE]
            count = -(-len(piece) // BLOCK) * BLOCK
            mean = self._mean[start + first : start + first + count]
            codes, scales = quantize(piece, mean)
            yield codes, scales, dequantize(codes, scales, mean)[: len(piece)]

    def rounded(self, parts: Iterable[RowPart]) -> Iterator[RowPart]:
        """The parts of a row, with the rounded values for those that are given."""
        for spec, content in parts:
            if spec is None or not spec.merged:
                yield spec, content
            else:
                for _, _, values in self.encode(spec, content):
                    yield spec, values.view(torch.uint8)

    def behind_codes(self, scales: Sequence[Tensor], copied: Sequence[Tensor]) -> Iterator[Tensor]:
        """The bytes of a row behind its codes: all scales, the tensors that are copied, and zeros up to its end."""
        end = self._layout.columns
        for part in (*scales, *copied):
            content = part.view(torch.uint8)
            end += len(content)
            yield content
        yield torch.zeros(self._layout.row_bytes - end, dtype=torch.uint8, device="cpu")


class Int8Rows:
    """Rows ``[slots, row_bytes]`` uint8 of this kind, mapped with their ``mean`` ``[columns]`` float32."""

    def __init__(self, matrix: Tensor, mean: Tensor, layout: Int8Layout) -> None:
        self.matrix = matrix
        self.mean = mean
        self.layout = layout

    def segments(self, varying: frozenset[str]) -> tuple[Segment, ...]:
        """As :meth:`Int8Layout.segments`."""
        return self.layout.segments(varying)

    def content(self, slot: int, spec: TensorSpec) -> Tensor:
        """The bytes of a tensor, ``[n]`` uint8; those of float32, computed for each call, if it is merged."""
        if not spec.merged:
            copied = self.layout.copied[spec.name]
            return self.matrix[slot, copied.offset : copied.end]
        codes = self.layout.codes[spec.name]
        places = slice(codes.offset, codes.end)
        scales = self.layout.scales(self.matrix[slot : slot + 1])[0]
        values = dequantize(
            self.matrix[slot, places].view(torch.int8),
            scales[codes.offset // BLOCK : codes.end // BLOCK],
            self.mean[places],
        )
        return values[: spec.numel].view(torch.uint8)

    def padding(self, slot: int, start: int, end: int) -> Tensor:  # noqa: ARG002
        """Zeros for the bytes between two tensors: these rows have none."""
        return torch.zeros(end - start, dtype=torch.uint8, device="cpu")

    def on(self, device: torch.device) -> Deviations:
        """What a merge on ``device`` needs besides the codes."""
        return Deviations(self.layout.scales(self.matrix).to(device), self.mean.to(device))


class Deviations:
    """Sums over tiles of codes: ``scales`` ``[slots, columns / BLOCK]`` and ``mean`` ``[columns]``, on one device."""

    def __init__(self, scales: Tensor, mean: Tensor) -> None:
        self._scales = scales
        self._mean = mean

    def multiply(
        self,
        weights: Tensor,
        runs: Sequence[slice],
        segment: Segment,
        tiles: Iterator[Tile],
        merged: Tensor,
    ) -> None:
        """Write mean + Σ over slots of weight · scale · code into ``merged`` ``[n]`` float32, tile by tile.

        ``weights`` is ``[S, slots]``, and the sum is in its dtype. Only the slots in ``runs`` are read.
        """
        scratch = torch.empty(0, dtype=weights.dtype, device=merged.device)
        for tile in tiles:
            columns = _columns_of(segment, tile)
            total = self._mean[columns].to(weights.dtype).view(-1, 1, BLOCK)
            for run in runs:
                codes = tile.columns[run]  # [slots, n]
                if scratch.numel() < codes.numel():
                    scratch = torch.empty(codes.numel(), dtype=weights.dtype, device=merged.device)
                widened = scratch[: codes.numel()].view(codes.shape).copy_(codes)
                scaled = weights[tile.row, run, None] * self._scales_of(run, columns)  # [slots, blocks]
                total = torch.baddbmm(total, scaled.t()[:, None, :], _by_block(widened))
            merged[tile.start : tile.stop] = total.view(-1)

    def project(
        self,
        gradient: Tensor,
        runs: Iterable[slice],
        segment: Segment,
        tile: Tile,
        out: Tensor,
    ) -> None:
        """Add ⟨deviation, gradient⟩ of the slots in ``runs`` to ``out`` ``[slots]`` float64; gradient ``[n]``."""
        columns = _columns_of(segment, tile)
        by_block = gradient.view(-1, BLOCK, 1)
        for run in runs:
            codes = tile.columns[run].to(gradient.dtype)
            products = torch.bmm(_by_block(codes), by_block)[:, :, 0]  # [blocks, slots]
            out[run] += (products.double() * self._scales_of(run, columns).t()).sum(dim=0)

    def of_mean(self, gradient: Tensor, segment: Segment, tile: Tile) -> Tensor:
        """⟨mean, gradient⟩ over a tile, in float64."""
        return self._mean[_columns_of(segment, tile)].double() @ gradient.double()

    def values(self, segment: Segment, tile: Tile) -> Tensor:
        """The deviations of all slots ``[slots, n]`` float64."""
        columns = _columns_of(segment, tile)
        scales = self._scales_of(slice(None), columns).double()
        blocks = tile.columns.double().view(len(scales), -1, BLOCK)
        return (blocks * scales[:, :, None]).view(len(scales), -1)

    def _scales_of(self, run: slice, columns: slice) -> Tensor:
        return self._scales[run, columns.start // BLOCK : columns.stop // BLOCK]


def _columns_of(segment: Segment, tile: Tile) -> slice:
    """The columns of a tile, counted from the first of a row."""
    return slice(segment.start + tile.start, segment.start + tile.stop)


def _by_block(rows: Tensor) -> Tensor:
    """``[slots, n]`` → ``[blocks, slots, BLOCK]``, not copied."""
    return rows.view(len(rows), -1, BLOCK).transpose(0, 1)
