"""Checkpoints stored as differences from one of them, in few bits.

Coefficients sum to one, so Σ a_i θ_i = θ_ref + Σ a_i (θ_i − θ_ref). Differences are much smaller than the weights, so
few bits of them are many bits of the weights. They are stored in blocks of neighbouring numbers of one tensor, each
with a float32 scale: difference = scale · number. From then on, the checkpoint is what is read back: reference + scale
· number. These are two operations on each element, which round alike on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.disk.layout import Layout, TensorSpec, aligned
from lcsc_opt.trajectory.disk.tiles import accumulator

BLOCK_COLUMNS = 2**14  # that share a scale
AT_ONCE = 2**5  # blocks that are worked on while they are in a cache
BLOCK_ROWS = 2**5  # that lie together, block by block
SCALE = torch.float32
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
LARGEST = {"float16": 1.0, "bfloat16": 1.0, "int8": 127.0}  # number of a block
FOUND_SIZE = 5.0  # Σ|a| of combinations that searches find


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor is in a stored row: its first byte, and the index of its first scale."""

    spec: TensorSpec
    offset: int
    first_block: int

    @property
    def blocks(self) -> int:
        """How many scales it has."""
        return -(-self.spec.numel // BLOCK_COLUMNS)


class StoredLayout:
    """A stored row: the numbers of the merged tensors, their scales, and the other tensors as they are.

    In the file, ``BLOCK_ROWS`` rows form a group. A group is stored block by block: the first block of one row after
    the other, then the second block. A merge reads a group from its first byte to its last.

    Args:
        layout: of the checkpoints.
        dtype: of the numbers: ``float16``, ``bfloat16`` or ``int8``.
    """

    def __init__(self, layout: Layout, dtype: str) -> None:
        self.dtype = STORED[dtype]
        self.largest = LARGEST[dtype]
        self.places: dict[str, Place] = {}
        end = blocks = 0
        for spec in layout.tensors:
            if spec.merged:
                place = self.places[spec.name] = Place(spec, end, blocks)
                end, blocks = end + spec.numel * self.dtype.itemsize, blocks + place.blocks
        self._scales = range(aligned(end), aligned(end) + blocks * SCALE.itemsize)
        end = aligned(self._scales.stop)
        for spec in layout.tensors:
            if not spec.merged:
                self.places[spec.name] = Place(spec, end, 0)
                end = aligned(end + spec.nbytes)
        self.row_bytes = aligned(max(end, 1))

    def file_bytes(self, slots: int) -> int:
        """The length of a file with so many rows."""
        return -(-slots // BLOCK_ROWS) * BLOCK_ROWS * self.row_bytes

    def parts(self) -> Iterator[range]:
        """All parts of a row, in order: bytes that stay together in the file."""
        for place in self.places.values():
            if place.spec.merged:
                yield from (self._block(place, block) for block in range(place.blocks))
        yield self._scales
        for place in self.places.values():
            if not place.spec.merged:
                yield range(place.offset, place.offset + place.spec.nbytes)

    def position(self, slot: int, part: range) -> int:
        """Where a part of a row begins in the file."""
        group, row = divmod(slot, BLOCK_ROWS)
        return BLOCK_ROWS * (group * self.row_bytes + part.start) + row * len(part)

    def rows(self, content: Tensor, part: range) -> Tensor:
        """The same part of all rows of a file, ``[groups, BLOCK_ROWS, bytes]``, without a copy."""
        groups = content.view(-1, BLOCK_ROWS * self.row_bytes)[:, BLOCK_ROWS * part.start : BLOCK_ROWS * part.stop]
        return groups.view(len(groups), BLOCK_ROWS, len(part))

    def numbers(self, content: Tensor, name: str, block: int) -> Tensor:
        """The numbers of all rows in one block, ``[groups, BLOCK_ROWS, n]``, without a copy."""
        return self.rows(content, self._block(self.places[name], block)).view(self.dtype)

    def scales(self, content: Tensor, name: str) -> Tensor:
        """The scales of one tensor in all rows, ``[groups · BLOCK_ROWS, blocks]`` float32."""
        place = self.places[name]
        scales = self.rows(content, self._scales).view(SCALE)[..., place.first_block :][..., : place.blocks]
        return scales.flatten(0, 1)

    def put(self, row: Tensor, spec: TensorSpec, content: Tensor, reference: Tensor) -> Tensor:
        """Store one tensor in a row, and read it back.

        Args:
            row: ``[row_bytes]`` uint8, written to.
            spec: of the tensor.
            content: its bytes, ``[nbytes]`` uint8.
            reference: its bytes in the reference checkpoint.

        Returns:
            Its bytes as they will be read back: a new tensor, or ``content`` itself where it is stored as it is.

        Raises:
            TrajectoryError: a difference is too large for float32.
        """
        if not spec.merged:
            offset = self.places[spec.name].offset
            row[offset : offset + spec.nbytes] = content
            return content
        numbers, scales = self._coded(row, self.places[spec.name])
        values, origin = content.view(spec.torch_dtype), reference.view(spec.torch_dtype)
        for columns, blocks in _some_blocks(spec.numel):
            coded, own = encode(values[columns], origin[columns], self.dtype, self.largest)
            if not bool(torch.isfinite(own).all()):
                raise TrajectoryError(
                    f"Tensor {spec.name!r} differs too much from the reference checkpoint: pack with --dtype exact."
                )
            numbers[columns], scales[blocks] = coded, own
        return decode(numbers, scales, origin).view(torch.uint8)

    def read(self, content: Tensor, slot: int, spec: TensorSpec, reference: Tensor) -> Tensor:
        """A new tensor with what :meth:`put` stored, ``[n]`` in its own dtype.

        Args:
            content: of the file, ``[bytes]`` uint8.
            slot: of the row.
            spec: of the tensor.
            reference: ``[nbytes]`` uint8, its bytes in the reference checkpoint.
        """
        place, (group, row) = self.places[spec.name], divmod(slot, BLOCK_ROWS)
        if not spec.merged:
            part = range(place.offset, place.offset + spec.nbytes)
            return self.rows(content, part)[group, row].clone().view(spec.torch_dtype)
        blocks = [self.numbers(content, spec.name, block)[group, row] for block in range(place.blocks)]
        numbers = torch.cat(blocks) if blocks else torch.empty(0, dtype=self.dtype)
        return decode(numbers, self.scales(content, spec.name)[slot], reference.view(spec.torch_dtype))

    def _block(self, place: Place, block: int) -> range:
        size = self.dtype.itemsize
        stop = min((block + 1) * BLOCK_COLUMNS, place.spec.numel)
        return range(place.offset + block * BLOCK_COLUMNS * size, place.offset + stop * size)

    def _coded(self, row: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        numbers = row[place.offset : place.offset + place.spec.numel * self.dtype.itemsize].view(self.dtype)
        scales = row[self._scales.start : self._scales.stop].view(SCALE)[
            place.first_block : place.first_block + place.blocks
        ]
        return numbers, scales


def encode(values: Tensor, origin: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Numbers ``[n]`` of ``dtype`` and scales ``[blocks]`` float32 such that origin + scale · number is near values."""
    wide = accumulator(values.dtype)
    difference = values.to(wide) - origin.to(wide)
    blocks = -(-len(difference) // BLOCK_COLUMNS)
    padded = torch.nn.functional.pad(difference, (0, blocks * BLOCK_COLUMNS - len(difference))).view(
        blocks, BLOCK_COLUMNS
    )
    scales = (padded.abs().amax(dim=1) / largest).to(SCALE)
    divided = padded / torch.where(scales > 0, scales, 1.0).to(wide)[:, None]
    if not dtype.is_floating_point:
        divided = divided.round()
    return divided.clamp(-largest, largest).to(dtype).view(-1)[: len(values)], scales


def decode(numbers: Tensor, scales: Tensor, origin: Tensor) -> Tensor:
    """Origin + scale · number, ``[n]``, new, rounded after each operation; where nothing is added, −0 stays −0."""
    result = torch.empty_like(origin)
    wide = accumulator(origin.dtype)
    for columns, blocks in _some_blocks(len(numbers)):
        coded = numbers[columns].to(wide)
        product = coded * scales[blocks].to(wide).repeat_interleave(BLOCK_COLUMNS)[: len(coded)]
        base = origin[columns].to(wide)
        result[columns] = torch.where(product == 0, base, base + product)
    return result


def _some_blocks(numbers: int) -> Iterator[tuple[slice, slice]]:
    """Some columns, and their blocks, at a time."""
    for first in range(0, -(-numbers // BLOCK_COLUMNS), AT_ONCE):
        yield slice(first * BLOCK_COLUMNS, (first + AT_ONCE) * BLOCK_COLUMNS), slice(first, first + AT_ONCE)


class ErrorSample:
    """The error that rounding causes in merged weights, measured on some columns and for typical coefficients.

    The errors of checkpoints add up with the coefficients, so the errors of single checkpoints would not tell.

    Args:
        layout: of the checkpoints.
        checkpoints: how many of the last ones are kept; ``None`` keeps all.
        columns: about how many numbers of each checkpoint are kept.
    """

    def __init__(self, layout: Layout, *, checkpoints: int | None = None, columns: int = 4096) -> None:
        self._every = max(sum(spec.numel for spec in layout.tensors if spec.merged) // columns, 1)
        self._row: list[Tensor] = []  # [tensors], original and read, each [2, n] float64
        self._rows: collections.deque[Tensor] = collections.deque(maxlen=checkpoints)  # [K]

    def add(self, spec: TensorSpec, original: memoryview, read: memoryview) -> None:
        """Add a tensor of the next checkpoint: its bytes as given and as read back."""
        if spec.merged and spec.numel:
            pair = [torch.frombuffer(content, dtype=spec.torch_dtype)[:: self._every] for content in (original, read)]
            self._row.append(torch.stack(pair).double())

    def end_checkpoint(self) -> None:
        """Say that all tensors of the checkpoint were added."""
        if self._row:
            self._rows.append(torch.cat(self._row, dim=1))
        self._row = []

    def relative_error(self, combinations: int = 32) -> float | None:
        """The relative error of merged weights, root mean square over random combinations; ``None`` below two
        checkpoints.
        """
        if len(self._rows) < 2:
            return None
        stacked = torch.stack(list(self._rows)).numpy()  # [K, 2, n]
        merged = np.einsum("bk,kin->bin", random_combinations(combinations, len(self._rows)), stacked)
        wrong = np.square(merged[:, 1] - merged[:, 0]).sum()
        there = np.square(merged[:, 0]).sum()
        return float(np.sqrt(wrong / there)) if there else 0.0


def random_combinations(count: int, checkpoints: int) -> npt.NDArray[np.float64]:
    """``[count, K]`` coefficients that sum to one, with Σ|a| near 5."""
    free = np.random.default_rng(0).normal(size=(count, checkpoints))
    free -= free.mean(axis=1, keepdims=True)
    free *= FOUND_SIZE / np.abs(free).sum(axis=1, keepdims=True)
    return free + 1.0 / checkpoints
