"""Where each tensor of a checkpoint lies inside a row of the matrix, and its bytes there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.weights import check_weights, derived_buffers, difference

ALIGNMENT = 64  # bytes; a cache line, and enough for every vector load
EXACT = "exact"
MERGED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ROUNDED = ("float16", "bfloat16")  # what rows may be rounded to
_INTEGERS = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
UNMERGEABLE = (  # stored as they are, if they are the same in all checkpoints
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
DTYPES: dict[str, torch.dtype] = MERGED | {name: getattr(torch, name) for name in (*_INTEGERS, *UNMERGEABLE)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAME_MODEL = "A trajectory holds checkpoints of one model: leave others out (first_step, last_step, a glob or a list)."


def stored_dtype(dtype: str) -> str | None:
    """What rows are rounded to, ``float16`` or ``bfloat16``; ``None`` for ``exact``.

    Raises:
        TrajectoryError: there is no such way to store rows.
    """
    if dtype not in (EXACT, *ROUNDED):
        raise TrajectoryError(f"dtype: expected {EXACT}, {', '.join(ROUNDED)}, got {dtype!r}.")
    if dtype == EXACT:
        return None
    return dtype


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of every checkpoint: its shape, its dtype by name, and where it lies in a row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # of its first byte in a row

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def merged(self) -> bool:
        """Whether its dtype is one of linear combinations; other tensors are copied."""
        return self.dtype in MERGED

    @property
    def numel(self) -> int:
        """How many scalars it holds."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.numel * self.torch_dtype.itemsize

    def of_row(self, row: Tensor) -> Tensor:
        """Its bytes in a row ``[row_bytes]`` uint8, ``[n]``; not copied."""
        return row[self.offset : self.end]

    def copy_from(self, content: Tensor, *, widened: bool) -> Tensor:
        """A new tensor with the bytes ``content``, ``[n]`` uint8.

        Args:
            content: in the dtype of the row.
            widened: whether rows were rounded: then tensors that are merged come in float32 or better.
        """
        tensor = torch.empty(self.shape, dtype=self.torch_dtype, device="cpu")
        tensor.reshape(-1).view(torch.uint8).copy_(content)
        if widened and self.merged:
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return tensor


Copy = Callable[[Tensor, Tensor], object]
"""Copies its second argument into the first, as ``Tensor.copy_`` does."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring tensors of one dtype, without a gap between them: bytes ``[start, stop)`` of all rows."""

    tensors: tuple[TensorSpec, ...]

    @property
    def start(self) -> int:
        """Its first byte inside a row."""
        return self.tensors[0].offset

    @property
    def stop(self) -> int:
        """The first byte behind it."""
        return self.tensors[-1].end

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all its tensors."""
        return self.tensors[0].torch_dtype

    @property
    def width(self) -> int:
        """How many columns of its dtype it has."""
        return (self.stop - self.start) // self.dtype.itemsize

    def places(self) -> Iterator[tuple[TensorSpec, int]]:
        """Its tensors, each with its first column, counted from the segment's."""
        for spec in self.tensors:
            yield spec, (spec.offset - self.start) // self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """The specs in the order of their bytes, and the length of a row, a multiple of 64 bytes."""

    tensors: tuple[TensorSpec, ...]
    row_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], stored: str | None = None) -> Layout:
        """The layout of rows for checkpoints like this one.

        Args:
            tensors: the tensors of one checkpoint.
            stored: what floating-point tensors are rounded to; ``None`` keeps the dtype of each.

        Raises:
            TrajectoryError: no tensor at all, one whose kind or dtype cannot be stored, or one that is no weight.
        """
        if not tensors:
            raise TrajectoryError("The checkpoint holds no tensor: pass the state dict of the model.")
        check_weights(tensors)
        return cls.arranged(
            (name, tuple(tensor.shape), _dtype_name(name, tensor, stored)) for name, tensor in tensors.items()
        )

    @classmethod
    def arranged(cls, described: Iterable[tuple[str, tuple[int, ...], str]]) -> Layout:
        """Place tensors ``(name, shape, dtype)`` in a row, sorted by name within regions that are aligned.

        Each dtype that is merged has its own region; all other tensors share the last one.
        """
        regions: dict[str, int] = {dtype: number for number, dtype in enumerate(MERGED)}

        def region(tensor: tuple[str, tuple[int, ...], str]) -> int:
            _, _, dtype = tensor
            return regions.get(dtype, len(regions))

        specs: list[TensorSpec] = []
        end = 0
        ordered = sorted(described, key=lambda tensor: (region(tensor), tensor[0]))
        for _, tensors in itertools.groupby(ordered, key=region):
            end = aligned(end)
            for name, shape, dtype in tensors:
                spec = TensorSpec(name, shape, dtype, end)
                specs.append(spec)
                end = spec.end
        return cls(tuple(specs), max(aligned(end), ALIGNMENT))  # no row is empty: an empty file cannot be mapped

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {spec.name: spec.shape for spec in self.tensors}

    def segments(self, varying: frozenset[str]) -> tuple[Segment, ...]:
        """The fewest segments with all tensors that a merge combines: a product of few long rows is fast.

        These tensors have a merged dtype, and are neither constant nor computed from other weights.

        Args:
            varying: the names of tensors that are not the same in all checkpoints.
        """
        segments: list[Segment] = []
        combined = varying - derived_buffers(self.shapes)
        neighbours = itertools.groupby(
            self.tensors, key=lambda spec: (spec.dtype, spec.merged and spec.name in combined)
        )
        for (_, is_combined), specs in neighbours:
            segment = Segment(tuple(specs))
            is_empty = segment.start == segment.stop
            if is_combined and not is_empty:
                segments.append(segment)
        return tuple(segments)

    def check(self, tensors: Mapping[str, Tensor], stored: str | None = None) -> None:
        """Compare a later checkpoint with the first one, by name.

        Raises:
            TrajectoryError: naming the first tensors that are missing, unexpected, or of another shape or dtype.
        """
        differs = difference(tensors, self.shapes)
        if differs is not None:
            raise TrajectoryError(f"The checkpoint does not fit the first one: it {differs}. {_SAME_MODEL}")
        for spec in self.tensors:
            dtype = _dtype_name(spec.name, tensors[spec.name], stored)
            if dtype != spec.dtype:
                raise TrajectoryError(
                    f"Tensor {spec.name!r} is {dtype}; in the first checkpoint it is {spec.dtype}. {_SAME_MODEL}"
                )

    def row_of(
        self, tensors: Mapping[str, Tensor], *, memory: Tensor | None = None, copy: Copy = Tensor.copy_
    ) -> Tensor:
        """A checkpoint as a row of the matrix, ``[row_bytes]`` uint8 on the CPU, rounded to the dtypes of the row.

        Args:
            tensors: by name, of this layout; on any device, contiguous or not.
            memory: an earlier row of this layout, which is written over; one of another length is not used.
            copy: copies each tensor into its place, with the dtype of the place. It may return before that is done;
                then the caller waits.
        """
        row = memory
        # zeros, since the bytes between regions are hashed, too
        if row is None or len(row) != self.row_bytes:
            row = torch.zeros(self.row_bytes, dtype=torch.uint8, device="cpu")
        for spec in self.tensors:
            tensor = tensors[spec.name].detach()
            place = spec.of_row(row)
            if spec.merged:
                place = place.view(spec.torch_dtype).view(spec.shape)
            else:  # its bytes; torch may leave conjugation and signs to whoever reads them, so that is done first
                tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            copy(place, tensor)
        return row

    def sha256(self, rows: Iterable[tuple[int, str]]) -> str:
        """The identity of K checkpoints: names, shapes, dtypes, and step and SHA-256 of each row."""
        described = [(spec.name, spec.shape, spec.dtype) for spec in self.tensors]
        return hashlib.sha256(json.dumps([described, list(rows)]).encode()).hexdigest()


def _dtype_name(name: str, tensor: Tensor, stored: str | None) -> str:
    """The dtype in which a tensor is stored; ``stored`` is what floating-point tensors are rounded to.

    Raises:
        TrajectoryError: its bytes are not all there, or its dtype cannot be stored.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TrajectoryError(f"Tensor {name!r} is sparse, quantized or without data: save it as a plain one.")
    if hasattr(tensor, "placements") or type(tensor).__name__ == "ShardedTensor":
        raise TrajectoryError(
            f"Tensor {name!r} is a {type(tensor).__name__}, and each process has a part of it: gather the weights, or "
            "save them with torch.distributed.checkpoint and pack its folders."
        )
    if tensor.dtype not in _NAMES:
        raise TrajectoryError(f"Tensor {name!r} is {tensor.dtype}, which cannot be stored: save it as float32.")
    dtype = _NAMES[tensor.dtype]
    if stored is None or dtype not in MERGED:
        return dtype
    return stored


def aligned(offset: int, unit: int = ALIGNMENT) -> int:
    """The first multiple of ``unit`` that is not less than ``offset``."""
    return (offset + unit - 1) // unit * unit
