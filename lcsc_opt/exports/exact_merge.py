"""Merging with the same result, bit for bit, on every machine.

A search uses :meth:`Trajectory.merge`, which is fast, but its sums depend on the BLAS, its threads and its vector
width. Exported models are merged here instead, one tensor after the other, each in the order of the steps: each element
is multiplied in float64, rounded, added in float64, rounded. Both are single IEEE operations on one element, so neither
threads nor the kind of machine can change a bit. At the end the sum is rounded once to the wanted dtype, to nearest,
ties to even.

Memory: the merged model, a float64 sum of one tensor, and that tensor of one checkpoint. The checkpoints are mapped
from their files, whose pages the system can free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.layout import DTYPES, MERGED, Layout, RowPart, TensorSpec
from lcsc_opt.trajectory.merge import StateDict

ELEMENTS = 2**16  # processed at once; few enough to stay in a cache


class CheckpointFiles:
    """Checkpoints as they were saved, step → file or folder; what a merge needs of a :class:`Trajectory`."""

    stored = None  # rows keep their dtypes

    def __init__(self, paths: Mapping[int, Path], *, key: str | None = None) -> None:
        self.steps, self.sources, self._key = tuple(paths), tuple(map(str, paths.values())), key
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The layout of all checkpoints, that of the first one that is read."""
        if self._layout is None:
            self.row_parts(0)
        assert self._layout is not None
        return self._layout

    def row_parts(self, index: int) -> Iterator[RowPart]:
        """As :meth:`Trajectory.row_parts`; tensors are mapped from the file if the format allows it.

        Raises:
            TrajectoryError: it cannot be read, or is of another model than the first one.
        """
        tensors = read_checkpoint(self.sources[index], key=self._key).tensors
        self._layout = self._layout or Layout.of(tensors)
        self._layout.check(tensors)
        return self._layout.row_parts(tensors)

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
    needed = recipe.needed_of(checkpoints.steps)
    torch.set_flush_denormal(False)  # a library built with -ffast-math sets it for its thread
    names = {i: f"Step {recipe.steps[i]} {checkpoints.sources[place]}".rstrip() for i, place in needed.items()}
    parts, digests = dict[int, Iterator[RowPart]](), {index: hashlib.sha256() for index in needed}
    for index, place in needed.items():
        try:
            parts[index] = checkpoints.row_parts(place)
        except TrajectoryError as error:
            raise TrajectoryError(f"{names[index]}: {error}") from error
    layout, result, last, begun = checkpoints.layout, StateDict(), max(needed), False
    sums = np.empty(max((spec.numel for spec in layout.tensors if spec.merged), default=0))  # of one tensor at a time
    with progress("merge", len(layout.tensors)) as advance:
        for index, spec, content in _in_turn(parts):
            digests[index].update(content.numpy().data)
            if spec is None:
                continue
            row = coefficients[row_of.get(spec.name, 0)]
            widened = spec.merged and checkpoints.stored is not None
            if spec.merged and spec.name not in recipe.constant:
                if row[index] != 0:
                    _add(sums, float(row[index]), content.view(spec.torch_dtype), begun=begun)
                    begun = True
                if index == last:
                    dtype, begun = recipe.dtype or ("float32" if widened else spec.dtype), False
                    result[spec.name] = _rounded(spec.name, sums[: spec.numel], dtype).view(spec.shape)
            elif index == row.argmax():
                copied = torch.empty(spec.shape, dtype=spec.torch_dtype, device="cpu")
                copied.reshape(-1).view(torch.uint8).copy_(content)
                result |= cast({spec.name: copied.float() if widened else copied}, recipe.dtype)
            if index == last:
                advance(note=spec.name)
    for index, digest in digests.items():
        sha256, expected = digest.hexdigest(), recipe.checkpoint_sha256[index]
        if sha256 != expected:
            raise TrajectoryError(
                f"{names[index]}: not the checkpoint that was combined: its weights have the SHA-256 "
                f"{sha256[:12]}…, the recipe's {expected[:12]}…. Name the same file, or pass the right --key."
            )
    if layout.sha256(zip(recipe.steps, recipe.checkpoint_sha256, strict=True)) != recipe.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )
    return result


def _in_turn(rows: Mapping[int, Iterator[RowPart]]) -> Iterator[tuple[int, TensorSpec | None, Tensor]]:
    """The first part of each row, then the second part of each, …"""
    while True:
        for index, parts in rows.items():
            if (part := next(parts, None)) is None:  # all rows have one layout
                return
            yield index, *part


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


def _add(sums: npt.NDArray[np.float64], coefficient: float, flat: Tensor, *, begun: bool) -> None:
    """Add ``coefficient * flat``, ``[n]``, to the first n sums. The first product is not added to zero: −0 stays −0."""
    for start in range(0, flat.numel(), ELEMENTS):
        # rounded once here and once in the addition: two operations, never one fused
        product = _widened(flat[start : start + ELEMENTS]) * coefficient
        into = sums[start : start + len(product)]
        into[:] = into + product if begun else product


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
