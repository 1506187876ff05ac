"""Merging with the same result, bit for bit, on every machine.

A search uses :meth:`Trajectory.merge`, which is fast, but its sums depend on the BLAS, its threads and its vector
width. Exported models are merged here instead, one tensor after the other, each in the order of the steps: each element
is multiplied in float64, rounded, added in float64, rounded. Both are single IEEE operations on one element, so neither
threads nor the kind of machine can change a bit. At the end the sum is rounded once to the dtype that is written, to
nearest, ties to even.

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
        self.steps = tuple(paths)
        self.sources = tuple(str(path) for path in paths.values())
        self._key = key
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
        if self._layout is None:
            self._layout = Layout.of(tensors)
        self._layout.check(tensors)
        return self._layout.row_parts(tensors)

    def lora_alphas(self) -> LoraAlphas:
        """The alphas of a LoRA whose tensors do not hold them, from the configuration next to the last file."""
        last_source = self.sources[self.steps.index(max(self.steps))]
        return LoraAlphas.read(last_source, key=self._key) or LoraAlphas()


Checkpoints = Trajectory | CheckpointFiles


def merge_exactly(checkpoints: Checkpoints, recipe: Recipe) -> StateDict:
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
    places = recipe.find_needed(checkpoints.steps)  # index in the recipe → index among the checkpoints
    torch.set_flush_denormal(False)  # a library built with -ffast-math sets it for its thread
    rows = _open_rows(checkpoints, recipe, places)
    merge = _Merge(checkpoints, recipe)
    digests = {index: hashlib.sha256() for index in places}
    last_index = max(places)
    result = StateDict()
    with progress("merge", len(checkpoints.layout.tensors)) as advance:
        for index, spec, content in _in_turn(rows):
            digests[index].update(content.numpy().data)
            if spec is None:  # padding between tensors
                continue
            row = coefficients[row_of.get(spec.name, 0)]
            if spec.merged and spec.name not in recipe.constant:
                merge.add(spec, float(row[index]), content)
                if index == last_index:
                    result[spec.name] = merge.finish(spec)
            elif index == row.argmax():
                result[spec.name] = merge.copy(spec, content)
            if index == last_index:
                advance(note=spec.name)
    sha256_of = {index: digest.hexdigest() for index, digest in digests.items()}
    _check_digests(checkpoints, recipe, places, sha256_of)
    return result


class _Merge:
    """The float64 sums of one tensor at a time, and the dtypes that a recipe asks for."""

    def __init__(self, checkpoints: Checkpoints, recipe: Recipe) -> None:
        self._dtype = recipe.dtype
        self._is_rounded = checkpoints.stored is not None  # packed in 16 bits, but merged as float32
        largest = max((spec.numel for spec in checkpoints.layout.tensors if spec.merged), default=0)
        self._sums = np.empty(largest)
        self._has_product = False  # whether the sums of this tensor have begun

    def add(self, spec: TensorSpec, coefficient: float, content: Tensor) -> None:
        """Add a checkpoint's tensor times its coefficient."""
        if coefficient != 0:
            _add(self._sums, coefficient, content.view(spec.torch_dtype), begun=self._has_product)
            self._has_product = True

    def finish(self, spec: TensorSpec) -> Tensor:
        """The merged tensor; the sums are reset."""
        self._has_product = False
        dtype: str = self._dtype or spec.dtype
        if self._dtype is None and self._is_rounded:
            dtype = "float32"
        return _rounded(spec.name, self._sums[: spec.numel], dtype).view(spec.shape)

    def copy(self, spec: TensorSpec, content: Tensor) -> Tensor:
        """A tensor that is not merged."""
        copied = torch.empty(spec.shape, dtype=spec.torch_dtype, device="cpu")
        copied.reshape(-1).view(torch.uint8).copy_(content)
        if spec.merged and self._is_rounded:
            copied = copied.float()
        return cast({spec.name: copied}, self._dtype)[spec.name]


def _open_rows(checkpoints: Checkpoints, recipe: Recipe, places: Mapping[int, int]) -> dict[int, Iterator[RowPart]]:
    """The parts of each checkpoint that is needed, by its index in the recipe."""
    rows: dict[int, Iterator[RowPart]] = {}
    for index, place in places.items():
        try:
            rows[index] = checkpoints.row_parts(place)
        except TrajectoryError as error:
            raise TrajectoryError(f"{_name_of(checkpoints, recipe, index, place)}: {error}") from error
    return rows


def _check_digests(
    checkpoints: Checkpoints, recipe: Recipe, places: Mapping[int, int], sha256_of: Mapping[int, str]
) -> None:
    """Refuse other checkpoints than the recipe's, and the same bytes in another layout."""
    for index, place in places.items():
        sha256 = sha256_of[index]
        expected = recipe.checkpoint_sha256[index]
        if sha256 != expected:
            raise TrajectoryError(
                f"{_name_of(checkpoints, recipe, index, place)}: not the checkpoint that was combined: its weights "
                f"have the SHA-256 {sha256[:12]}…, the recipe's {expected[:12]}…. {_advice(checkpoints, recipe)}"
            )
    trajectory_sha256 = checkpoints.layout.sha256(zip(recipe.steps, recipe.checkpoint_sha256, strict=True))
    if trajectory_sha256 != recipe.trajectory_sha256:
        raise TrajectoryError(
            "The checkpoints hold the bytes that the recipe names, under other tensor names, shapes or dtypes: "
            "use the files as they were saved."
        )


def _advice(checkpoints: Checkpoints, recipe: Recipe) -> str:
    """What to name in place of checkpoints that are not the recipe's."""
    if isinstance(checkpoints, CheckpointFiles) and recipe.stored is not None:
        return (
            f"The recipe combines weights rounded to {recipe.stored}: name their trajectory, or pack the same "
            f"checkpoints as it (lcsc trajectory pack --stored {recipe.stored})."
        )
    return "Name the same file, or pass the right --key."


def _name_of(checkpoints: Checkpoints, recipe: Recipe, index: int, place: int) -> str:
    return f"Step {recipe.steps[index]} {checkpoints.sources[place]}".rstrip()


def _in_turn(rows: Mapping[int, Iterator[RowPart]]) -> Iterator[tuple[int, TensorSpec | None, Tensor]]:
    """The first part of each row, then the second part of each, …"""
    while True:
        for index, parts in rows.items():
            part = next(parts, None)
            if part is None:  # all rows have one layout, so all of them have ended
                return
            spec, content = part
            yield index, spec, content


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> StateDict:
    """Round floating-point tensors to ``dtype``, as :func:`merge_exactly` does. Others stay; for ``None`` all stay.

    Raises:
        TrajectoryError: a weight is too large for ``dtype``.
    """
    result = StateDict()
    for name, tensor in tensors.items():
        detached = tensor.detach()
        is_floating = tensor.dtype in MERGED.values()
        if dtype is None or not is_floating or tensor.dtype == DTYPES[dtype]:
            result[name] = detached.contiguous()
        else:
            result[name] = _rounded(name, _widened(detached.reshape(-1)), dtype).view(tensor.shape)
    return result


def _add(sums: npt.NDArray[np.float64], coefficient: float, flat: Tensor, *, begun: bool) -> None:
    """Add ``coefficient * flat``, ``[n]``, to the first n sums. The first product is not added to zero: −0 stays −0."""
    for start in range(0, flat.numel(), ELEMENTS):
        # rounded once here and once in the addition: two operations, never one fused
        product = _widened(flat[start : start + ELEMENTS]) * coefficient
        block = sums[start : start + len(product)]
        block[:] = block + product if begun else product


def _widened(flat: Tensor) -> npt.NDArray[np.float64]:
    """``[n]`` float64. Computed by numpy in this thread: threads of torch may round small numbers to zero."""
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
        block = values[start : start + ELEMENTS]
        rounded = result[start : start + ELEMENTS]
        with np.errstate(over="ignore", under="ignore"):
            if dtype == "bfloat16":
                rounded.view(torch.int16).copy_(torch.from_numpy(_bfloat16_bits(block)))
            else:
                rounded.copy_(torch.from_numpy(block.astype(dtype)))
    if not bool(torch.isfinite(result).all()):
        raise TrajectoryError(f"Tensor {name!r} has values too large for {dtype}: pass --dtype float32, or bfloat16.")
    return result


def _bfloat16_bits(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int16]:
    """The bits of ``values`` in bfloat16. Rounding to odd float32 first makes the second rounding correct."""
    nearest = values.astype(np.float32)
    is_away_from_zero = np.abs(nearest.astype(np.float64)) > np.abs(values)
    is_inexact = nearest.astype(np.float64) != values
    odd = (nearest.view(np.uint32) - is_away_from_zero) | is_inexact  # towards zero, then odd
    rounded = (odd.astype(np.uint64) + 0x7FFF + ((odd >> 16) & 1)) >> 16
    bits: npt.NDArray[np.int16] = rounded.astype(np.uint16).view(np.int16)
    return bits
