"""Uniform means of checkpoints, added one by one: the rows of a trajectory of interval means."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.layout import Layout, TensorSpec

_STATISTICS = ("running_mean", "running_var")  # of batch norm: averages already
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of one
_GROUP_BYTES = 2**28  # added at once: one launch on a GPU, and so much memory where a copy is widened


class Interval(NamedTuple):
    """The checkpoints that a row is the uniform mean of."""

    first_step: int
    last_step: int
    checkpoints: int


class RunningMean:
    """The mean of checkpoints of one layout, in float32 or float64, with one addition for each of them.

    mean ← mean + (checkpoint − mean) / count, so tensors that never change keep their values. Integers, booleans and
    the statistics of batch norm are those of the last checkpoint.

    Args:
        layout: of the checkpoints.
        dtype: of the sums; that of float64 tensors is always float64.
        device: where the sums are; ``None`` is the device of each tensor of the first checkpoint.

    Attributes:
        count: how many checkpoints it is the mean of; 0 before the first one.
        tensors: name → mean, or the last value of what is not averaged.
        copied_before: name → the last value but one of what is not averaged.
    """

    def __init__(self, layout: Layout, *, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.count = 0
        self.tensors: dict[str, Tensor] = {}
        self.copied_before: dict[str, Tensor] = {}
        self._averaged = tuple(spec for spec in layout.tensors if spec.merged and not _is_statistic(spec.name))
        self._copied = tuple(spec for spec in layout.tensors if not spec.merged or _is_statistic(spec.name))
        self._dtype = dtype
        self._device = device
        self._is_placed = False

    @torch.inference_mode(mode=False)  # tensors made in inference mode could not be changed outside of it
    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the next checkpoint."""
        if not self._is_placed:
            self._place(tensors)
        self.count += 1
        for spec in self._copied:
            copied = self.tensors[spec.name]
            self.copied_before[spec.name].copy_(copied)
            copied.copy_(tensors[spec.name].detach())
        names = [spec.name for spec in self._averaged]
        if self.count == 1:
            for name in names:
                self.tensors[name].copy_(tensors[name].detach())
            return
        for group in _groups(names, self.tensors):
            sums = [self.tensors[name] for name in group]
            added = [_like(tensors[name].detach(), self.tensors[name]) for name in group]
            torch._foreach_lerp_(sums, added, 1 / self.count)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def without(self, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of all but the checkpoint that was added last, of two or more: name → tensor."""
        tensors = self.tensors | self.copied_before
        for spec in self._averaged:
            mean = self.tensors[spec.name].double()
            tensors[spec.name] = mean + (mean - last[spec.name].to(mean)) / (self.count - 1)
        return tensors

    def bit_sums(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The sum of the bits of each averaged tensor of a checkpoint, as whole numbers.

        They are the same on every device, and of other weights all of them hardly ever are.
        """
        sums: list[Tensor] = []
        for spec in self._averaged:
            tensor = tensors[spec.name].detach().resolve_neg()
            sum_dtype = torch.int32  # overflow wraps around; twice as fast as int64
            if tensor.dtype == torch.float64:
                sum_dtype = torch.int64
            sums.append(tensor.view(_INTEGERS[tensor.itemsize]).sum(dtype=sum_dtype))
        return sums

    def clear(self) -> None:
        """Begin the next mean, in the same memory."""
        self.count = 0

    def load(self, tensors: Mapping[str, Tensor], copied_before: Mapping[str, Tensor], count: int) -> None:
        """Continue a mean that was saved."""
        self.count = count
        self.tensors = dict(tensors)
        self.copied_before = dict(copied_before)

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the memory of the sums, with what was loaded in it."""
        loaded = self.tensors
        loaded_before = self.copied_before
        self.tensors = {}
        self.copied_before = {}
        averaged = {spec.name for spec in self._averaged}
        for name in (*averaged, *(spec.name for spec in self._copied)):
            tensor = tensors[name]
            dtype = tensor.dtype
            if name in averaged and dtype != torch.float64:
                dtype = self._dtype
            self.tensors[name] = torch.empty(tensor.shape, dtype=dtype, device=self._device or tensor.device)
            if name in loaded:
                self.tensors[name].copy_(loaded[name])
        for spec in self._copied:
            before = torch.empty_like(self.tensors[spec.name])
            self.copied_before[spec.name] = before.copy_(loaded_before.get(spec.name, self.tensors[spec.name]))
        self._is_placed = True


def split_rows(steps: Sequence[int], means: int) -> list[tuple[int, ...]]:
    """The steps of each row: ``means`` intervals of equally many checkpoints, or one more, and the last checkpoint.

    Raises:
        TrajectoryError: there are fewer checkpoints than rows.
    """
    if means < 1:
        raise TrajectoryError(f"--means: expected a whole number of at least 1, got {means}.")
    count = len(steps) - 1
    if count < means:
        raise TrajectoryError(
            f"{means} means and the last checkpoint need {means + 1} checkpoints, and {len(steps)} are selected: ask "
            "for fewer means, or select more checkpoints."
        )
    bounds = [count * row // means for row in range(means + 1)]
    rows = [tuple(steps[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return [*rows, (steps[-1],)]


def interval_of(steps: Sequence[int]) -> Interval:
    """The interval of a row with these steps."""
    return Interval(steps[0], steps[-1], len(steps))


def described(intervals: Sequence[Interval]) -> str:
    """In words, as in ``16 means of 125 checkpoints each, and the last checkpoint``, or ``1 mean of 2 checkpoints``."""
    means = list(intervals)
    ending = ""
    last_count = means[-1].checkpoints
    if last_count == 1 and len(means) > 1:
        means.pop()
        ending = ", and the last checkpoint"
    counts = [mean.checkpoints for mean in means]
    shown = "1 checkpoint"
    if max(counts) > min(counts):
        shown = f"{min(counts)} to {max(counts)} checkpoints"
    elif max(counts) > 1:
        shown = f"{max(counts)} checkpoints"
    if len(means) == 1:
        return f"1 mean of {shown}{ending}"
    return f"{len(means)} means of {shown} each{ending}"


class MeanOfRows(Mapping[str, Tensor]):
    """Two rows of a layout → the mean of their checkpoints, one tensor at a time.

    Args:
        layout: of the rows.
        rows: the bytes of a tensor in each of the two, the earlier one first.
        counts: how many checkpoints each row is the mean of.
    """

    def __init__(self, layout: Layout, rows: Sequence[Callable[[TensorSpec], Tensor]], counts: Sequence[int]) -> None:
        self._specs = {spec.name: spec for spec in layout.tensors}
        self._rows = rows
        self._share = counts[1] / sum(counts)  # of the later one

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        later = spec.copy_from(self._rows[1](spec), widened=False)
        if not spec.merged or _is_statistic(name):
            return later
        wide = torch.float32
        if spec.dtype in ("float32", "float64"):
            wide = torch.float64
        earlier = spec.copy_from(self._rows[0](spec), widened=False).to(wide)
        return earlier.lerp_(later.to(wide), self._share).to(spec.torch_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _groups(names: Sequence[str], tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors of one dtype and device, not too many bytes at once; a larger tensor is alone."""
    groups: list[list[str]] = []
    free_bytes = 0
    previous = None
    for name in sorted(names, key=lambda name: (str(tensors[name].dtype), str(tensors[name].device))):
        tensor = tensors[name]
        kind = (tensor.dtype, tensor.device)
        if kind != previous or tensor.nbytes > free_bytes:
            groups.append([])
            free_bytes = _GROUP_BYTES
            previous = kind
        groups[-1].append(name)
        free_bytes -= tensor.nbytes
    return groups


def _like(tensor: Tensor, mean: Tensor) -> Tensor:
    return tensor.to(device=mean.device, dtype=mean.dtype)


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _STATISTICS
