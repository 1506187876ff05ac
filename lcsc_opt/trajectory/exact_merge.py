"""Merging with the same result, bit for bit, on every machine.

A search uses :meth:`Trajectory.merge`, which is fast, but its sums depend on the BLAS, its threads and its vector
width. Exported models are merged here instead, one checkpoint after the other in the order of the steps: each element
is multiplied in float64, rounded, added in float64, rounded. Both are single IEEE operations on one element, so neither
threads nor the kind of machine can change a bit. At the end the sum is rounded once to the wanted dtype, to nearest,
ties to even.

Memory: one checkpoint, and a float64 sum of each of its elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

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
from lcsc_opt.trajectory.layout import DTYPES, MERGED, check_same, plan, row_sha256
from lcsc_opt.trajectory.lora import trajectory_alphas
from lcsc_opt.trajectory.manifest import trajectory_sha256
from lcsc_opt.trajectory.merge import StateDict
from lcsc_opt.trajectory.trajectory import Trajectory

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


class CheckpointFiles:
    """Checkpoints as they were saved, one file or folder each.

    Args:
        paths: step → path.
        key: which state dict of each, as in :func:`read_checkpoint`.
    """

    def __init__(self, paths: Mapping[int, Path], *, key: str | None = None) -> None:
        self._paths, self._key = dict(paths), key
        self.stored: str | None = None  # what rows are rounded to

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the files."""
        return tuple(self._paths)

    def read(self, step: int) -> Mapping[str, Tensor]:
        """The file's tensors, mapped from the file if the format allows it; never write to them."""
        return read_checkpoint(self._paths[step], key=self._key).tensors

    def name(self, step: int) -> str:
        """The path."""
        return str(self._paths[step])

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them, from the configuration next to the last file."""
        return read_alphas(self._paths[max(self._paths)], key=self._key) or LoraAlphas()


class PackedCheckpoints(CheckpointFiles):
    """The checkpoints of a packed trajectory."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__(dict.fromkeys(trajectory.steps, trajectory.path))
        self._trajectory, self.stored = trajectory, trajectory.stored

    def read(self, step: int) -> Mapping[str, Tensor]:
        """A copy of one row."""
        return self._trajectory.checkpoint(self.steps.index(step))

    def name(self, step: int) -> str:
        """Path and step."""
        return f"{self._trajectory.path}: step {step}"

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them."""
        return trajectory_alphas(self._trajectory)


def merge_exactly(checkpoints: CheckpointFiles, combination: Combination, *, dtype: str | None = None) -> StateDict:
    """Merge checkpoints with the same bits as on every other machine; each checkpoint is verified.

    A single coefficient of exactly 1 gives that checkpoint. Constant tensors are copied; integers and bools come from
    the checkpoint with the largest coefficient, the first of those that tie. Checkpoints whose coefficient is zero
    are not read.

    Args:
        checkpoints: the source; it may hold more than needed.
        combination: what to merge.
        dtype: of the floating-point tensors of the result (``float32``, ``float16``, ``bfloat16``, ``float64``);
            ``None`` keeps the dtype of each.

    Raises:
        TrajectoryError: a checkpoint is missing or has other weights than the combination's, or a weight is too large
            for ``dtype``.
    """
    coefficients = combination.coefficients
    needed = {combination.steps[index]: int(index) for index in np.flatnonzero(coefficients)}
    if missing := sorted(needed.keys() - set(checkpoints.steps)):
        raise TrajectoryError(
            f"{len(missing)} of the {len(needed)} checkpoints that are combined are missing: "
            f"{_some(missing)}. Name them, too; the steps that are there: {_some(sorted(checkpoints.steps))}."
        )
    torch.set_flush_denormal(False)  # a library built with -ffast-math sets it for its thread
    layout, sums, copies = None, dict[str, npt.NDArray[np.float64]](), StateDict()
    with progress("merge", len(needed)) as advance:
        for step, index in needed.items():
            tensors, name = checkpoints.read(step), checkpoints.name(step)
            layout = layout or plan(tensors, checkpoints.stored)
            try:
                check_same(layout, tensors, checkpoints.stored)
            except TrajectoryError as error:
                raise TrajectoryError(f"{name}: {error}") from error
            sha256, expected = row_sha256(layout, tensors), combination.checkpoint_sha256[index]
            if sha256 != expected:
                raise TrajectoryError(
                    f"{name}: not the checkpoint that was combined at step {step}: its weights have the SHA-256 "
                    f"{sha256[:12]}…, the recipe's {expected[:12]}…. Name the same file, or pass the right --key."
                )
            for spec in layout.tensors:
                if spec.merged and spec.name not in combination.constant:
                    _add(sums, spec.name, float(coefficients[index]), tensors[spec.name])
                elif index == coefficients.argmax():
                    copies[spec.name] = tensors[spec.name].detach().clone()
            advance(note=f"step {step}")
            del tensors  # free the memory before the next one is read
    assert layout is not None  # coefficients sum to one, so at least one is not zero
    rows = zip(combination.steps, combination.checkpoint_sha256, strict=True)
    if trajectory_sha256(layout.tensors, rows) != combination.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )
    result = cast(copies, dtype)
    for spec in layout.tensors:
        if spec.name in sums:  # each is freed as soon as it is rounded
            own = spec.dtype if checkpoints.stored is None else "float32"
            result[spec.name] = _rounded(spec.name, sums.pop(spec.name), dtype or own).view(spec.shape)
    return {spec.name: result[spec.name] for spec in layout.tensors}


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> StateDict:
    """Round floating-point tensors to ``dtype``, as :func:`merge_exactly` does. Others stay; for ``None`` all stay.

    Raises:
        TrajectoryError: a weight is too large for ``dtype``.
    """
    return {
        name: tensor.detach().contiguous()
        if dtype is None or tensor.dtype not in MERGED.values() or tensor.dtype == DTYPES[dtype]
        else _rounded(name, _widened(tensor.detach().reshape(-1)), dtype).view(tensor.shape)
        for name, tensor in tensors.items()
    }


def round_to(values: npt.NDArray[np.float64], dtype: str) -> Tensor:
    """``[n]`` float64 → ``[n]`` of ``dtype``, to the nearest, ties to even; infinite where too large.

    torch would round twice on the way to the 16-bit types, through float32.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "bfloat16":
            return torch.from_numpy(values.astype(dtype))
        nearest = values.astype(np.float32)
    # rounding to odd float32 first makes the second rounding correct
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    inexact = nearest.astype(np.float64) != values
    bits = (nearest.view(np.uint32) - away) | inexact  # towards zero, then odd
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def _add(sums: dict[str, npt.NDArray[np.float64]], name: str, coefficient: float, tensor: Tensor) -> None:
    """Add ``coefficient * tensor`` in place. The first product is not added to zero, so −0 stays −0."""
    flat = tensor.detach().reshape(-1)
    total = sums.get(name)
    into = np.empty(flat.numel()) if total is None else total
    for start in range(0, len(into), ELEMENTS):
        # rounded once here and once in the addition: two operations, never one fused
        product = _widened(flat[start : start + ELEMENTS]) * coefficient
        into[start : start + ELEMENTS] = product if total is None else into[start : start + ELEMENTS] + product
    sums[name] = into


def _widened(flat: Tensor) -> npt.NDArray[np.float64]:
    """``[n]`` float64. Computed by numpy in this thread: threads of torch may take small numbers for zero."""
    if flat.dtype == torch.bfloat16:
        upper = flat.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).astype(np.float64)
    return flat.numpy().astype(np.float64, copy=False)


def _rounded(name: str, values: npt.NDArray[np.float64], dtype: str) -> Tensor:
    """``[n]`` float64, rounded once."""
    result = torch.empty(len(values), dtype=DTYPES[dtype], device="cpu")
    for start in range(0, len(values), ELEMENTS):
        result[start : start + ELEMENTS] = round_to(values[start : start + ELEMENTS], dtype)
    if not bool(torch.isfinite(result).all()):
        raise TrajectoryError(f"Tensor {name!r} has values too large for {dtype}: pass --dtype float32, or bfloat16.")
    return result


def _some(steps: Collection[int], most: int = 8) -> str:
    shown = ", ".join(str(step) for step in list(steps)[:most])
    return f"{shown or 'none'}, … {max(steps)}" if len(steps) > most else shown or "none"
