"""Where each tensor of a checkpoint lies inside one row of the packed store."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.weights import difference, shapes_of

ALIGNMENT = 64  # bytes; a cache line, and enough for every vector load
MOST_SCALARS = 2**48  # of one tensor
MERGED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COPIED = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "int64": torch.int64,
    "uint64": torch.uint64,
    "complex32": torch.complex32,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
DTYPES = MERGED | COPIED
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNMERGEABLE = tuple(name for name in COPIED if name.startswith(("complex", "float8")))


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of every checkpoint: its shape, its dtype by name, and its first byte inside a row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def merged(self) -> bool:
        """Whether it takes part in a linear combination; other tensors are copied whole."""
        return self.dtype in MERGED

    @property
    def numel(self) -> int:
        """How many scalars it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in a row."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """The specs in the order of their bytes, and the length of a row, a multiple of 64 bytes."""

    tensors: tuple[TensorSpec, ...]
    row_bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {spec.name: spec.shape for spec in self.tensors}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring tensors of one dtype, without a gap between them: ``[start, stop)`` bytes of a row."""

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
        """How many columns it has."""
        return (self.stop - self.start) // self.dtype.itemsize

    def places(self) -> Iterator[tuple[TensorSpec, int]]:
        """Its tensors, each with its first column."""
        for spec in self.tensors:
            yield spec, (spec.offset - self.start) // self.dtype.itemsize


def plan(tensors: Mapping[str, Tensor]) -> Layout:
    """Lay out the rows for checkpoints like this one.

    Raises:
        TrajectoryError: no tensor at all, or one whose kind or dtype cannot be stored.
    """
    if not tensors:
        raise TrajectoryError("The checkpoint holds no tensor: pass the state dict of the model.")
    described = [(name, tuple(tensor.shape), _dtype_name(name, tensor)) for name, tensor in tensors.items()]
    return arrange(described)


def arrange(described: Iterable[tuple[str, tuple[int, ...], str]]) -> Layout:
    """Place tensors ``(name, shape, dtype)`` in a row: one dtype after the other, each aligned, sorted by name
    inside.
    """
    specs: list[TensorSpec] = []
    end = 0
    ordered = sorted(described, key=lambda item: (_rank(item[2]), item[0]))
    for _, neighbours in itertools.groupby(ordered, key=lambda item: _rank(item[2])):
        end = aligned(end)
        for name, shape, dtype in neighbours:
            specs.append(TensorSpec(name, shape, dtype, end))
            end = specs[-1].end
    return Layout(tuple(specs), max(aligned(end), ALIGNMENT))


def segments(layout: Layout, varying: frozenset[str]) -> tuple[Segment, ...]:
    """The fewest segments with all tensors that a merge combines: those of a merged dtype that are not constant."""
    alike = itertools.groupby(layout.tensors, key=lambda spec: (spec.dtype, spec.name in varying))
    groups = [tuple(specs) for (dtype, varies), specs in alike if varies and dtype in MERGED]
    return tuple(Segment(specs) for specs in groups if specs[-1].end > specs[0].offset)


class WholeRow(Mapping[str, Tensor]):
    """A checkpoint as a row: tensor name → its bytes, ``[nbytes]`` uint8.

    Args:
        layout: of the row.
        content: ``[row_bytes]`` uint8 on the CPU; bytes between the tensors may be anything.
    """

    def __init__(self, layout: Layout, content: Tensor) -> None:
        self.content = content
        self._specs = {spec.name: spec for spec in layout.tensors}

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        return self.content[spec.offset : spec.end]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def neighbours_of_row(
    layout: Layout, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[TensorSpec, ...], memoryview]]:
    """:func:`tensors_of_row`, but neighbouring tensors of one dtype in a :class:`WholeRow` come together."""
    if not isinstance(tensors, WholeRow):
        yield from (((spec,) if spec is not None else (), content) for spec, content in tensors_of_row(layout, tensors))
        return
    row, end = memoryview(tensors.content.numpy().data), 0
    for _, neighbours in itertools.groupby(layout.tensors, key=lambda spec: spec.dtype):
        specs = tuple(neighbours)
        if specs[0].offset > end:
            yield (), memoryview(bytes(specs[0].offset - end))
        end = specs[-1].end
        yield specs, row[specs[0].offset : end]
    if layout.row_bytes > end:
        yield (), memoryview(bytes(layout.row_bytes - end))


def tensors_of_row(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[TensorSpec | None, memoryview]]:
    """The bytes of one row in order, each tensor with its spec; padding comes with ``None``.

    One tensor at a time is brought to the CPU and made contiguous.
    """
    end = 0
    for spec in layout.tensors:
        if spec.offset > end:
            yield None, memoryview(bytes(spec.offset - end))
        yield spec, memoryview(as_bytes(tensors[spec.name]).numpy().data)
        end = spec.end
    if layout.row_bytes > end:
        yield None, memoryview(bytes(layout.row_bytes - end))


def row_sha256(layout: Layout, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a checkpoint as an exact row holds it."""
    digest = hashlib.sha256()
    for _, content in tensors_of_row(layout, tensors):
        digest.update(content)
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """``tensor`` as ``[n]`` uint8 on the CPU; shares its memory where that is possible."""
    return flat_bytes(tensor.detach().to("cpu"))


def flat_bytes(tensor: Tensor) -> Tensor:
    """``tensor`` as ``[n]`` uint8 on its device; shares its memory where that is possible."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def all_finite(values: Tensor) -> bool:
    """Whether no number of this non-empty floating-point tensor is NaN or infinite; takes no memory.

    NaN and infinity show in the extremes, which are found thirty times faster than ``isfinite`` of each number.
    """
    least, largest = torch.aminmax(values)
    return bool(torch.isfinite(least) and torch.isfinite(largest))


def from_bytes(row: Tensor, spec: TensorSpec) -> Tensor:
    """A new tensor with the bytes that ``spec`` has in ``row``, ``[row_bytes]`` uint8."""
    tensor = empty(spec)
    tensor.reshape(-1).view(torch.uint8).copy_(row[spec.offset : spec.end])
    return tensor


def empty(spec: TensorSpec) -> Tensor:
    """An uninitialized CPU tensor of this shape and dtype."""
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device="cpu")


def check_same(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Compare a later checkpoint with the first one, by name.

    Raises:
        TrajectoryError: naming the first tensors that are missing, unexpected, or of another shape or dtype.
    """
    if (differs := difference(shapes_of(tensors), layout.shapes)) is not None:
        raise TrajectoryError(f"The checkpoint does not fit the first one: it {differs}. {_SAME_MODEL}")
    for spec in layout.tensors:
        dtype = _dtype_name(spec.name, tensors[spec.name])
        if dtype != spec.dtype:
            raise TrajectoryError(
                f"Tensor {spec.name!r} is {dtype}; in the first checkpoint it is {spec.dtype}. {_SAME_MODEL}"
            )


_SAME_MODEL = "A trajectory holds checkpoints of one model: leave others out (first_step, last_step, a glob or a list)."


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TrajectoryError(f"Tensor {name!r} is sparse, quantized or without data: save it as a plain one.")
    if tensor.dtype not in NAMES:
        raise TrajectoryError(f"Tensor {name!r} is {tensor.dtype}, which cannot be stored: save it as float32.")
    return NAMES[tensor.dtype]


def _rank(dtype: str) -> int:
    return list(MERGED).index(dtype) if dtype in MERGED else len(MERGED)


def aligned(offset: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
