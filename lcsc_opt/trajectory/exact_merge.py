"""Merging with the same result, bit for bit, on every machine.

A search uses :meth:`Trajectory.merge`, which is fast, but its sums depend on the BLAS, its threads and its vector
width. Exported models are merged here instead, one checkpoint after the other in the order of the steps: each element
is multiplied in float64, rounded, added in float64, rounded. Both are single IEEE operations on one element, so neither
threads nor the kind of machine can change a bit. At the end the sum is rounded once to the wanted dtype, to nearest,
ties to even.

Memory: one checkpoint, and a float64 sum of each of its elements.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Coefficients
from lcsc_opt.checkpoints import read_checkpoint
from lcsc_opt.checkpoints.lora import LoraAlphas, read_alphas
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.trajectory.disk.layout import Layout, TensorSpec, check_same, empty, plan, row_sha256
from lcsc_opt.trajectory.disk.manifest import trajectory_sha256
from lcsc_opt.trajectory.lora import trajectory_alphas
from lcsc_opt.trajectory.merge.merger import StateDict
from lcsc_opt.trajectory.store import Trajectory

ELEMENTS = 2**18  # processed at once; few enough to stay in a cache


@dataclasses.dataclass(frozen=True, eq=False)
class Combination:
    """The checkpoints and coefficients of a merge: enough to make it again elsewhere.

    Attributes:
        steps: ``[K]`` training steps, increasing.
        coefficients: ``[K]`` float64, sum to one.
        checkpoint_sha256: ``[K]``, of each checkpoint's row as a packed trajectory holds it.
        trajectory_sha256: of the K checkpoints with names, shapes and dtypes; :attr:`Trajectory.sha256`.
        constant: names of the tensors that are the same in all checkpoints; they are copied.
    """

    steps: tuple[int, ...]
    coefficients: Coefficients
    checkpoint_sha256: tuple[str, ...]
    trajectory_sha256: str
    constant: frozenset[str]

    @classmethod
    def of(cls, trajectory: Trajectory, coefficients: npt.ArrayLike) -> Combination:
        """The combination of a trajectory's checkpoints with ``[K]`` coefficients.

        Raises:
            StudySpecError: not ``[K]``, not finite, or another sum than one.
        """
        checked = check_coefficients(coefficients, len(trajectory))
        constant = frozenset(trajectory.names) - trajectory.varying
        return cls(trajectory.steps, checked, trajectory.checkpoint_sha256, trajectory.sha256, constant)


class Checkpoints(Protocol):
    """A source of checkpoints, by training step."""

    @property
    def steps(self) -> Sequence[int]:
        """The steps that there are."""
        ...

    def read(self, step: int) -> Mapping[str, Tensor]:
        """The tensors of one checkpoint; never write to them."""
        ...

    def name(self, step: int) -> str:
        """The name of a checkpoint in error messages."""
        ...


class PackedCheckpoints:
    """The checkpoints of a packed trajectory."""

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory

    @property
    def steps(self) -> tuple[int, ...]:
        """All of its steps."""
        return self._trajectory.steps

    def read(self, step: int) -> Mapping[str, Tensor]:
        """A copy of one row."""
        return self._trajectory.checkpoint(self.steps.index(step))

    def name(self, step: int) -> str:
        """Path and step."""
        return f"{self._trajectory.path}: step {step}"

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them."""
        return trajectory_alphas(self._trajectory)


class CheckpointFiles:
    """Checkpoints as they were saved, one file or folder each.

    Args:
        paths: step → path.
        key: which state dict of each, as in :func:`read_checkpoint`.
    """

    def __init__(self, paths: Mapping[int, Path], *, key: str | None = None) -> None:
        self._paths, self._key = dict(paths), key

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the files."""
        return tuple(self._paths)

    def read(self, step: int) -> Mapping[str, Tensor]:
        """The file's tensors, mapped from the file if the format allows it."""
        return read_checkpoint(self._paths[step], key=self._key).tensors

    def name(self, step: int) -> str:
        """The path."""
        return str(self._paths[step])

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them, from the configuration beside the last file."""
        return read_alphas(self._paths[max(self._paths)], key=self._key) or LoraAlphas()


def merge_exactly(
    checkpoints: Checkpoints, combination: Combination, *, dtype: str | None = None, elements: int = ELEMENTS
) -> StateDict:
    """Merge checkpoints with the same bits as on every other machine; each checkpoint is verified.

    A single coefficient of exactly 1 gives that checkpoint. Constant tensors are copied; integers and bools come from
    the checkpoint with the largest coefficient, the first of those that tie. Checkpoints whose coefficient is zero
    are not read.

    Args:
        checkpoints: the source; it may hold more than needed.
        combination: what to merge.
        dtype: of the floating-point tensors of the result (``float32``, ``float16``, ``bfloat16``, ``float64``);
            ``None`` keeps the dtype of each.
        elements: how many are processed at once; the result does not depend on it.

    Raises:
        TrajectoryError: a checkpoint is missing or has other weights than the combination's, or a weight is too large
            for ``dtype``.
    """
    _check_there(checkpoints, combination)
    total: _Total | None = None
    with _exact_small_numbers(), ThreadPoolExecutor(max_workers=1) as hashing:
        needed = [int(index) for index in np.flatnonzero(combination.coefficients)]
        with progress("merge", len(needed)) as advance:
            for index in needed:
                step = combination.steps[index]
                tensors = checkpoints.read(step)
                total = total or _Total(plan(tensors), combination, elements)
                _check_like(checkpoints.name(step), total.layout, tensors)
                sha256 = hashing.submit(row_sha256, total.layout, tensors)
                total.add(index, tensors)
                _check_same_bytes(checkpoints.name(step), step, sha256.result(), combination.checkpoint_sha256[index])
                advance(note=f"step {step}")
                del tensors  # free the memory before the next one is read
        assert total is not None  # coefficients sum to one, so at least one is not zero
        _check_same_model(total.layout, combination)
        return total.rounded(dtype)


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> StateDict:
    """Round floating-point tensors to ``dtype``, as :func:`merge_exactly` does. Others stay; for ``None`` all stay.

    Raises:
        TrajectoryError: a weight is too large for ``dtype``.
    """
    layout = plan(tensors)
    return {spec.name: _as_dtype(spec, tensors[spec.name].detach(), dtype, ELEMENTS) for spec in layout.tensors}


class _Total:
    """Float64 sums of the tensors that are combined, and the tensors that are copied."""

    def __init__(self, layout: Layout, combination: Combination, elements: int) -> None:
        self.layout = layout
        self._coefficients, self._elements = combination.coefficients, elements
        self._largest = int(combination.coefficients.argmax())
        summed = [spec for spec in layout.tensors if spec.merged and spec.name not in combination.constant]
        self._sums: dict[str, npt.NDArray[np.float64] | None] = {spec.name: None for spec in summed}
        self._copies: dict[str, Tensor] = {}

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Add checkpoint ``index``, multiplied with its coefficient."""
        coefficient = float(self._coefficients[index])
        for name in self._sums:
            flat = tensors[name].detach().reshape(-1)
            self._sums[name] = _added(self._sums[name], coefficient, flat, self._elements)
        if index == self._largest:
            self._copies = {spec.name: tensors[spec.name].detach().clone() for spec in self._copied()}

    def rounded(self, dtype: str | None) -> StateDict:
        """The result. Each sum is freed as soon as it is rounded."""
        result: StateDict = {}
        for spec in self.layout.tensors:
            values = self._sums.pop(spec.name, None)
            if values is None:
                result[spec.name] = _as_dtype(spec, self._copies.pop(spec.name), dtype, self._elements)
            else:
                result[spec.name] = _rounded(spec, values, dtype or spec.dtype, self._elements)
        return result

    def _copied(self) -> list[TensorSpec]:
        return [spec for spec in self.layout.tensors if spec.name not in self._sums]


def _added(
    total: npt.NDArray[np.float64] | None, coefficient: float, flat: Tensor, elements: int
) -> npt.NDArray[np.float64]:
    """``total + coefficient * flat``, in place, ``[n]``. The first product is not added to zero, so −0 stays −0."""
    first = total is None
    total = np.empty(flat.numel()) if total is None else total
    for start in range(0, len(total), elements):
        # rounded once here and once in the addition: two operations, never one fused
        product = _widened(flat[start : start + elements]) * coefficient
        if first:
            total[start : start + elements] = product
        else:
            total[start : start + elements] += product
    return total


def _as_dtype(spec: TensorSpec, tensor: Tensor, dtype: str | None, elements: int) -> Tensor:
    """The tensor in ``dtype``; the tensor itself if nothing must be rounded."""
    if not spec.merged or dtype in (None, spec.dtype):
        return tensor.contiguous()
    return _rounded(spec, _widened(tensor.reshape(-1)), str(dtype), elements)


def _widened(flat: Tensor) -> npt.NDArray[np.float64]:
    """``[n]`` float64. Computed by numpy in this thread: threads of torch may take small numbers for zero."""
    if flat.dtype == torch.bfloat16:
        upper = flat.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).astype(np.float64)
    return flat.numpy().astype(np.float64, copy=False)


def _rounded(spec: TensorSpec, values: npt.NDArray[np.float64], dtype: str, elements: int) -> Tensor:
    """``[n]`` float64, rounded once, in the shape of ``spec``."""
    tensor = empty(dataclasses.replace(spec, dtype=dtype))
    flat = tensor.reshape(-1)
    for start in range(0, len(values), elements):
        flat[start : start + elements] = round_to(values[start : start + elements], dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise TrajectoryError(
            f"Tensor {spec.name!r} has values too large for {dtype}: pass --dtype float32, or bfloat16."
        )
    return tensor


def round_to(values: npt.NDArray[np.float64], dtype: str) -> Tensor:
    """``[n]`` float64 → ``[n]`` of ``dtype``, to the nearest, ties to even; infinite where too large.

    torch would round twice on the way to the 16-bit types, through float32.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(_bfloat16_bits(values).view(np.int16)).view(torch.bfloat16)
    kind: Any = {"float64": np.float64, "float32": np.float32, "float16": np.float16}[dtype]
    with np.errstate(over="ignore", under="ignore"):
        return torch.from_numpy(values.astype(kind))


def _bfloat16_bits(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """``[n]`` as the bits of bfloat16. Rounding to odd float32 first makes the second rounding correct."""
    with np.errstate(over="ignore", under="ignore"):
        nearest = values.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    inexact = nearest.astype(np.float64) != values
    bits = (nearest.view(np.uint32) - away) | inexact  # towards zero, then odd
    rounded: npt.NDArray[np.uint64] = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


@contextlib.contextmanager
def _exact_small_numbers() -> Iterator[None]:
    """While this is open, this thread keeps subnormal numbers, even if it was set to flush them to zero."""
    flushed = float(np.float64(5e-324) + np.zeros(1)[0]) == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


def _check_there(checkpoints: Checkpoints, combination: Combination) -> None:
    needed = [combination.steps[index] for index in np.flatnonzero(combination.coefficients)]
    missing = sorted(set(needed) - set(checkpoints.steps))
    if missing:
        raise TrajectoryError(
            f"{len(missing)} of the {len(needed)} checkpoints that are combined are missing: "
            f"{_some(missing)}. Name them, too; the steps that are there: {_some(sorted(checkpoints.steps))}."
        )


def _some(steps: Collection[int], most: int = 8) -> str:
    shown = ", ".join(str(step) for step in list(steps)[:most])
    return f"{shown or 'none'}, … {max(steps)}" if len(steps) > most else shown or "none"


def _check_like(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    try:
        check_same(layout, tensors)
    except TrajectoryError as error:
        raise TrajectoryError(f"{name}: {error}") from error


def _check_same_bytes(name: str, step: int, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise TrajectoryError(
            f"{name}: not the checkpoint that was combined at step {step}: its weights have the SHA-256 "
            f"{sha256[:12]}…, the recipe's {expected[:12]}…. Name the same file, or pass the right --key."
        )


def _check_same_model(layout: Layout, combination: Combination) -> None:
    rows = zip(combination.steps, combination.checkpoint_sha256, strict=True)
    if trajectory_sha256(layout.tensors, rows) != combination.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )
