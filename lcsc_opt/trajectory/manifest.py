"""``manifest.json``: what the rows of ``weights.bin`` are. Validated when it is read, replaced atomically."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, replacing
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.base.settings import first_problem
from lcsc_opt.trajectory.layout import ALIGNMENT, DTYPES, Layout, TensorSpec

LOCK = "writer.lock"  # held by the process that writes
PACKED = "pack_sha256"  # the metadata entry that tells from which sources a trajectory was packed
HEADER = "header"  # the metadata entry for the texts that the headers of all files have, as JSON
PREFIX = "prefix"  # the metadata entry for what is before all names in the files, and is left out here
_MOST_SCALARS = 2**48  # of one tensor: torch computes sizes in 64 bits

_Whole = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class SavedRow(pydantic.BaseModel):
    """A row of ``weights.bin`` that is complete.

    Attributes:
        step: the training step.
        slot: the position of the row, from 0.
        source: the path of the file that it was made from; empty for one that a training loop wrote.
        sha256: of the bytes of the row, in hex.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    step: _Whole
    slot: _Whole
    source: str
    sha256: Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")]

    @property
    def end(self) -> int:
        """The first slot behind it."""
        return self.slot + 1


class SavedAverage(SavedRow):
    """A row that is no checkpoint, but an average that the trainer kept of the weights at its step.

    Attributes:
        name: how reports call it.
        slots: how many it takes: several where its numbers are wider than those of the checkpoints.
        dtypes: name → dtype, of the tensors that have another one than in the checkpoints.
    """

    name: str
    slots: Annotated[int, pydantic.Field(ge=1, lt=2**63)] = 1
    dtypes: dict[str, str] = {}

    @property
    def end(self) -> int:
        """The first slot behind it."""
        return self.slot + self.slots

    def layout(self, checkpoints: Layout) -> Layout:
        """Where its tensors lie in its slots.

        Args:
            checkpoints: the layout of the checkpoints' rows.

        Raises:
            ValueError: it has an unknown tensor or dtype, or more bytes than its slots.
        """
        if not (self.dtypes.keys() <= checkpoints.shapes.keys() and DTYPES.keys() >= set(self.dtypes.values())):
            raise ValueError(f"{self.name!r} has an unknown tensor or dtype")
        arranged = Layout.arranged(
            (spec.name, spec.shape, self.dtypes.get(spec.name, spec.dtype)) for spec in checkpoints.tensors
        )
        row_bytes = self.slots * checkpoints.row_bytes
        if arranged.row_bytes > row_bytes:
            raise ValueError(f"{self.name!r} has more bytes than its slots")
        return Layout(arranged.tensors, row_bytes)


class Manifest(pydantic.BaseModel):
    """The whole manifest, validated: tensors lie where :meth:`Layout.arranged` puts them, no two rows share a slot.

    Attributes:
        format: of the manifest itself.
        row_bytes: the bytes of a row.
        stored: what floating-point tensors were rounded to; ``None`` if they keep their dtype.
        tensors: in the order of their bytes.
        varying: the names of tensors that were not bit-identical in all checkpoints written so far.
        checkpoints: in the order of their steps, which strictly increase.
        averages: further rows, which are none of them: the trainer's own averages, the usual one last.
        metadata: the writer's notes.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    format: Literal[1] = 1
    row_bytes: Annotated[int, pydantic.Field(ge=ALIGNMENT)]
    stored: Literal["float16", "bfloat16"] | None = None
    tensors: Annotated[tuple[TensorSpec, ...], pydantic.Field(min_length=1)]
    varying: tuple[str, ...] = ()
    checkpoints: tuple[SavedRow, ...] = ()
    averages: tuple[SavedAverage, ...] = ()
    metadata: dict[str, str] = {}

    @property
    def layout(self) -> Layout:
        """Where the tensors lie in a row."""
        return Layout(self.tensors, self.row_bytes)

    @property
    def rows(self) -> tuple[SavedRow, ...]:
        """All rows: the checkpoints, and the trainer's averages."""
        return (*self.checkpoints, *self.averages)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Manifest:
        for spec in self.tensors:
            if spec.dtype not in DTYPES:
                raise ValueError(f"tensor {spec.name!r} has an unknown dtype {spec.dtype!r}")
            scalars = math.prod(max(size, 1) for size in spec.shape)  # no size of 0 hides the others
            if min(spec.shape, default=0) < 0 or scalars > _MOST_SCALARS:
                raise ValueError(f"tensor {spec.name!r} has an impossible shape")
        if Layout.arranged((spec.name, spec.shape, spec.dtype) for spec in self.tensors) != self.layout:
            raise ValueError("tensors are not where their shapes and dtypes put them")
        names = {spec.name for spec in self.tensors}
        if len(names) < len(self.tensors) or not set(self.varying) <= names:
            raise ValueError("a tensor is listed twice, or 'varying' names an unknown one")
        if any(later.slot < earlier.end for earlier, later in itertools.pairwise(self._rows_by_slot())):
            raise ValueError("two rows share a slot")
        for average in self.averages:
            average.layout(self.layout)  # refuses what does not fit
        if any(later.step <= earlier.step for earlier, later in itertools.pairwise(self.checkpoints)):
            raise ValueError("steps do not increase")
        return self

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and validate the manifest of the trajectory at ``path``.

        Raises:
            TrajectoryError: it does not exist, cannot be read, or contradicts itself.
        """
        try:
            return cls.model_validate_json((path / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            message = f"{path} is not a trajectory: make one with `lcsc trajectory pack`."
            if (path / WEIGHTS).exists():
                message = f"{path} holds no complete checkpoint yet: append one, or pack again."
            raise TrajectoryError(message) from None
        except (OSError, RecursionError) as error:
            raise TrajectoryError(
                f"{path / MANIFEST} cannot be read ({error}): remove {path} and pack again."
            ) from error
        except pydantic.ValidationError as error:
            raise TrajectoryError(
                f"{path / MANIFEST} is broken ({first_problem(error)}): remove {path} and pack again."
            ) from error

    def save(self, path: Path) -> None:
        """Replace the manifest at ``path`` so that a reader sees the old one or the new one, also after a crash.

        Raises:
            OSError: the disk refused; the old manifest is then still there, or the new one is complete.
        """
        with replacing(path / MANIFEST) as pending:
            pending.write_text(self.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")

    def with_checkpoint(self, saved: SavedRow, varying: Iterable[str], *, keep_last: int | None) -> Manifest:
        """This manifest with one more checkpoint.

        Args:
            saved: its row.
            varying: names of tensors that this checkpoint changes for the first time.
            keep_last: how many of the last checkpoints stay; ``None`` keeps all.
        """
        checkpoints = (*self.checkpoints, saved)
        if keep_last is not None:
            checkpoints = checkpoints[-keep_last:]
        all_varying = tuple(sorted({*self.varying, *varying}))
        return self.model_copy(update={"checkpoints": checkpoints, "varying": all_varying})

    def free_slot(self, count: int = 1) -> int:
        """The first of ``count`` slots that no row has: of dropped checkpoints, or the next ones after all rows."""
        slot = 0
        for saved in self._rows_by_slot():
            if saved.slot - slot >= count:
                break
            slot = saved.end
        return slot

    def _rows_by_slot(self) -> list[SavedRow]:
        """All rows, in the order of the file."""
        return sorted(self.rows, key=lambda saved: saved.slot)

    def sha256_of(self, steps: Collection[int]) -> str:
        """The identity of its checkpoints of these steps, as :attr:`Trajectory.sha256`."""
        return self.layout.sha256((saved.step, saved.sha256) for saved in self.checkpoints if saved.step in steps)

    def map_rows(self, path: Path) -> Tensor:
        """The rows at ``path``, ``[slots, row_bytes]`` uint8, mapped read-only and shared with other processes.

        Raises:
            TrajectoryError: the file is shorter, or cannot be mapped.
        """
        slots = max((saved.end for saved in self.rows), default=0)  # some of them may be free
        return _map_bytes(path / WEIGHTS, slots * self.row_bytes).view(slots, self.row_bytes)


def _map_bytes(path: Path, size: int) -> Tensor:
    """The first bytes of a file, ``[size]`` uint8, mapped read-only.

    Raises:
        TrajectoryError: the file is shorter, or cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, os.SEEK_END)
            if file_size < size:
                raise TrajectoryError(
                    f"{path} is truncated: {file_size} bytes of {size}. Copy it, or remove its folder and pack again."
                )
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TrajectoryError(f"Cannot map {path}: {error}.") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
        return torch.frombuffer(mapped, dtype=torch.uint8)


def foreign_files(path: Path) -> list[str]:
    """The names of entries that do not belong in a trajectory's folder, sorted."""
    names = [entry.name for entry in path.iterdir()]
    return sorted(name for name in names if name not in (MANIFEST, WEIGHTS, LOCK) and not is_pending(name))
