"""Merging with the same result, bit for bit, on every machine.

A search uses :meth:`Trajectory.merge`, which is fast, but its sums depend on the BLAS, its threads and its vector
width. Exported models are merged here instead, one checkpoint after the other in the order of the steps: each element
is multiplied in float64, rounded, added in float64, rounded. Both are single IEEE operations on one element, so neither
threads nor the kind of machine can change a bit. At the end the sum is rounded once to the wanted dtype, to nearest,
ties to even.

Memory: one checkpoint, and a float64 sum of each of its elements.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints import read_checkpoint
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.layout import DTYPES, MERGED, Layout
from lcsc_opt.trajectory.merge import StateDict

ELEMENTS = 2**18  # processed at once; few enough to stay in a cache


class CheckpointFiles:
    """Checkpoints as they were saved, step → file or folder; what a merge needs of a :class:`Trajectory`."""

    stored = None  # rows keep their dtypes

    def __init__(self, paths: Mapping[int, Path], *, key: str | None = None) -> None:
        self.steps, self.sources, self._key = tuple(paths), tuple(map(str, paths.values())), key

    def checkpoint(self, index: int) -> Mapping[str, Tensor]:
        """The file's tensors, mapped from the file if the format allows it; never write to them."""
        return read_checkpoint(self.sources[index], key=self._key).tensors

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them, from the configuration next to the last file."""
        return LoraAlphas.read(self.sources[self.steps.index(max(self.steps))], key=self._key) or LoraAlphas()


def merge_exactly(checkpoints: Trajectory | CheckpointFiles, recipe: Recipe) -> StateDict:
    """Merge checkpoints with the same bits as on every other machine; each checkpoint is verified.

    A single coefficient of exactly 1 gives that checkpoint. Constant tensors are copied; integers and bools come from
    the checkpoint with the largest coefficient, the first of those that tie. Checkpoints whose coefficient is zero
    are not read, and there may be more checkpoints than needed. Floating-point tensors of the result are of the
    recipe's dtype.

    Raises:
        StudySpecError: the recipe's coefficients do not sum to one.
        TrajectoryError: a checkpoint is missing or has other weights than the recipe's, or a weight is too large for
            its dtype.
    """
    row_of, coefficients = recipe.in_rows()
    largest = coefficients.argmax(axis=1)
    needed = {recipe.steps[index]: int(index) for index in np.flatnonzero(coefficients.any(axis=0))}
    if missing := sorted(needed.keys() - set(checkpoints.steps)):
        raise TrajectoryError(
            f"{len(missing)} of the {len(needed)} checkpoints that are combined are missing: "
            f"{_some(missing)}. Name them, too; the steps that are there: {_some(sorted(checkpoints.steps))}."
        )
    torch.set_flush_denormal(False)  # a library built with -ffast-math sets it for its thread
    layout, sums, copies = None, dict[str, npt.NDArray[np.float64]](), StateDict()
    with progress("merge", len(needed)) as advance:
        for step, index in needed.items():
            place = checkpoints.steps.index(step)
            tensors, name = checkpoints.checkpoint(place), f"Step {step} {checkpoints.sources[place]}".rstrip()
            layout = layout or Layout.of(tensors, checkpoints.stored)
            try:
                layout.check(tensors, checkpoints.stored)
            except TrajectoryError as error:
                raise TrajectoryError(f"{name}: {error}") from error
            sha256, expected = layout.row_sha256(tensors), recipe.checkpoint_sha256[index]
            if sha256 != expected:
                raise TrajectoryError(
                    f"{name}: not the checkpoint that was combined: its weights have the SHA-256 "
                    f"{sha256[:12]}…, the recipe's {expected[:12]}…. Name the same file, or pass the right --key."
                )
            for spec in layout.tensors:
                row = row_of.get(spec.name, 0)
                if spec.merged and spec.name not in recipe.constant:
                    if coefficients[row, index] != 0:
                        _add(sums, spec.name, float(coefficients[row, index]), tensors[spec.name])
                elif index == largest[row]:
                    copies[spec.name] = tensors[spec.name].detach().clone()
            advance(note=f"step {step}")
            del tensors  # free the memory before the next one is read
    assert layout is not None  # coefficients sum to one, so at least one is not zero
    if layout.sha256(zip(recipe.steps, recipe.checkpoint_sha256, strict=True)) != recipe.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )
    result = cast(copies, recipe.dtype)
    for spec in layout.tensors:
        if spec.name in sums:  # each is freed as soon as it is rounded
            own = spec.dtype if checkpoints.stored is None else "float32"
            result[spec.name] = _rounded(spec.name, sums.pop(spec.name), recipe.dtype or own).view(spec.shape)
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
    """``[n]`` float64 → ``[n]`` of ``dtype``, rounded once, to the nearest, ties to even.

    torch would round twice on the way to the 16-bit types, through float32.
    """
    result = torch.empty(len(values), dtype=DTYPES[dtype], device="cpu")
    for start in range(0, len(values), ELEMENTS):
        some = values[start : start + ELEMENTS]
        with np.errstate(over="ignore", under="ignore"):
            nearest = some.astype(np.float32 if dtype == "bfloat16" else dtype)
        if dtype == "bfloat16":  # rounding to odd float32 first makes the second rounding correct
            away = np.abs(nearest.astype(np.float64)) > np.abs(some)
            inexact = nearest.astype(np.float64) != some
            bits = (nearest.view(np.uint32) - away) | inexact  # towards zero, then odd
            rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            result[start : start + ELEMENTS].view(torch.int16).copy_(
                torch.from_numpy(rounded.astype(np.uint16).view(np.int16))
            )
        else:
            result[start : start + ELEMENTS] = torch.from_numpy(nearest)
    if not bool(torch.isfinite(result).all()):
        raise TrajectoryError(f"Tensor {name!r} has values too large for {dtype}: pass --dtype float32, or bfloat16.")
    return result


def _some(steps: Collection[int], most: int = 8) -> str:
    shown = ", ".join(str(step) for step in list(steps)[:most])
    return f"{shown or 'none'}, … {max(steps)}" if len(steps) > most else shown or "none"
