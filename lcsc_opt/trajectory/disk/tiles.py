"""Tiles: what one product combines; and memory for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns ``[start, stop)`` of a segment: slot i holds ``origin + scales[i] * numbers[i]``.

    Attributes:
        start, stop: the columns.
        numbers: ``[groups, blocks, rows of a group, n]``, with ``blocks · n`` columns.
        scales: ``[slots, blocks]`` float32; ``None`` for ones.
        origin: ``[blocks · n]``; ``None`` for zeros.
    """

    start: int
    stop: int
    numbers: Tensor
    scales: Tensor | None = None
    origin: Tensor | None = None

    def read(
        self, first: int, last: int, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Slots ``[first, last)``: ``[last − first, columns]``, and by what each is still to be multiplied, if any.

        No copy is made where one group holds them in this dtype. Else the result is in ``scratch``, where given, until
        that is used again. A tile of several blocks is multiplied already.
        """
        _, blocks, size, _ = self.numbers.shape
        if blocks > 1:
            return self._scaled(first, last, dtype, scratch), None
        scales = None if self.scales is None else self.scales[first:last, 0]
        numbers, begin, end = self.numbers[:, 0], first // size, (last - 1) // size + 1
        if end - begin > 1:
            return self._copied(numbers[begin:end], dtype, scratch)[first - begin * size : last - begin * size], scales
        inside = numbers[begin, first - begin * size : last - begin * size]
        return (inside if inside.dtype == dtype else self._copied(inside[None], dtype, scratch)), scales

    def doubles(self, order: Tensor) -> Tensor:
        """``[K, columns]`` float64 for slots ``order`` [K], without the origin."""
        numbers = self.numbers.transpose(1, 2).flatten(0, 1).index_select(0, order).to(torch.float64)
        if self.scales is not None:
            numbers = numbers * self.scales[order, :, None].to(torch.float64)
        return numbers.flatten(1)

    def split(self, width: int) -> Iterator[Tile]:
        """The same columns of one block in tiles of this width."""
        for first in range(0, self.stop - self.start, width):
            some = slice(first, first + width)
            start, stop = self.start + first, min(self.start + first + width, self.stop)
            origin = None if self.origin is None else self.origin[some]
            yield Tile(start, stop, self.numbers[..., some], self.scales, origin)

    def _scaled(self, first: int, last: int, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
        _, blocks, size, _ = self.numbers.shape
        begin, end = first // size, (last - 1) // size + 1
        numbers = self.numbers[begin:end].transpose(1, 2)  # [groups, rows of a group, blocks, n]
        result = _room((numbers.shape[0] * size, self.stop - self.start), dtype, numbers.device, scratch)
        if self.scales is None:
            result.view(numbers.shape).copy_(numbers)
        else:
            scales = self.scales[begin * size : end * size].to(dtype).view(-1, size, blocks, 1)
            torch.mul(numbers, scales, out=result.view(numbers.shape))
        return result[first - begin * size : last - begin * size]

    @staticmethod
    def _copied(groups: Tensor, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
        """Copy in one call: threads that make many calls wait for each other."""
        result = _room((groups.shape[0] * groups.shape[1], groups.shape[2]), dtype, groups.device, scratch)
        result.view(groups.shape).copy_(groups)
        return result


class Scratch:
    """Memory of one thread that is used again and again; new memory would be slow, page by page."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized tensor, until the next call."""
        size = shape[0] * shape[1] * dtype.itemsize
        if len(self._memory) < size or self._memory.device != device:
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[:size].view(dtype).view(shape)


def _room(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, scratch: Scratch | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device) if scratch is None else scratch.take(shape, dtype, device)


def accumulator(dtype: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """What products of this dtype are summed in: float64 for float64, float32 for all others.

    float64 also on a GPU where products of float32 are set to TF32: that setting belongs to the whole process, and must
        not change while another thread samples.
    """
    tf32 = device is not None and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.float64 if tf32 or dtype == torch.float64 else torch.float32
