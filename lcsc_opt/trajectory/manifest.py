"""``manifest.json``: what the rows of ``weights.bin`` are. Read with suspicion, replaced atomically."""

from __future__ import annotations

import itertools
import math
import mmap
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, replacing
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.trajectory.layout import ALIGNMENT, DTYPES, Layout, TensorSpec

LOCK = "writer.lock"  # held by the process that writes
_MOST_SCALARS = 2**48  # of one tensor

_Whole = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class _SavedCheckpoint(pydantic.BaseModel):
    """One checkpoint: its training step, its row, where it came from, and the SHA-256 of the row."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    step: _Whole
    slot: _Whole
    source: str
    sha256: Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")]


class Manifest(pydantic.BaseModel):
    """The whole manifest, validated: offsets are the ones that :meth:`Layout.arranged` gives, slots are distinct.

    Attributes:
        row_bytes: of a row.
        stored: what floating-point tensors were rounded to; ``None`` if they keep their dtype.
        tensors: in the order of their bytes.
        varying: the names of tensors that were not bit-identical in all checkpoints written so far.
        checkpoints: in the order of their steps, which strictly increase.
        metadata: the writer's notes.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    format: Literal[1] = 1
    row_bytes: Annotated[int, pydantic.Field(ge=ALIGNMENT)]
    stored: Literal["float16", "bfloat16"] | None = None
    tensors: Annotated[tuple[TensorSpec, ...], pydantic.Field(min_length=1)]
    varying: tuple[str, ...] = ()
    checkpoints: tuple[_SavedCheckpoint, ...] = ()
    metadata: dict[str, str] = {}

    @property
    def layout(self) -> Layout:
        """Where the tensors lie in a row."""
        return Layout(self.tensors, self.row_bytes)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Manifest:
        for spec in self.tensors:
            if spec.dtype not in DTYPES:
                raise ValueError(f"tensor {spec.name!r} has an unknown dtype {spec.dtype!r}")
            if min(spec.shape, default=0) < 0 or math.prod(max(size, 1) for size in spec.shape) > _MOST_SCALARS:
                raise ValueError(f"tensor {spec.name!r} has an impossible shape")
        if Layout.arranged((spec.name, spec.shape, spec.dtype) for spec in self.tensors) != self.layout:
            raise ValueError("tensors are not where their shapes and dtypes put them")
        names = {spec.name for spec in self.tensors}
        if len(names) < len(self.tensors) or not set(self.varying) <= names:
            raise ValueError("a tensor is listed twice, or 'varying' names one that is not there")
        if len({saved.slot for saved in self.checkpoints}) < len(self.checkpoints):
            raise ValueError("two checkpoints share a slot")
        if any(later.step <= earlier.step for earlier, later in itertools.pairwise(self.checkpoints)):
            raise ValueError("steps do not increase")
        return self

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and validate the manifest of the trajectory at ``path``.

        Raises:
            TrajectoryError: it is not there, cannot be read, or says something impossible.
        """
        try:
            return cls.model_validate_json((path / MANIFEST).read_bytes())
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                reason = f"Cannot read {path / MANIFEST}: {error.strerror}."
            elif (path / WEIGHTS).exists():
                reason = f"{path} holds no whole checkpoint yet: append one, or pack again."
            else:
                reason = f"{path} is not a trajectory: make one with `lcsc trajectory pack`."
            raise TrajectoryError(reason) from None
        except (pydantic.ValidationError, RecursionError) as error:
            reason = "nested too deeply"
            if isinstance(error, pydantic.ValidationError):
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                reason = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
            raise TrajectoryError(f"{path / MANIFEST} is broken ({reason}): pack again.") from error

    def save(self, path: Path) -> None:
        """Replace the manifest at ``path`` so that a reader sees the old one or the new one, also after a crash.

        Raises:
            OSError: the disk refused; the old manifest is then still there, or the new one is complete.
        """
        with replacing(path / MANIFEST) as pending:
            pending.write_text(self.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")

    def with_checkpoint(self, checkpoints: int | None, varying: Iterable[str], **saved: Any) -> Manifest:
        """This manifest and a checkpoint that was ``saved``, without all but the last ``checkpoints``."""
        kept = (*self.checkpoints, _SavedCheckpoint(**saved))[-checkpoints if checkpoints else 0 :]
        return self.model_copy(update={"checkpoints": kept, "varying": tuple(sorted({*self.varying, *varying}))})

    def sha256_of(self, steps: Collection[int]) -> str:
        """The identity of its checkpoints of these steps, as :attr:`Trajectory.sha256`."""
        return self.layout.sha256((saved.step, saved.sha256) for saved in self.checkpoints if saved.step in steps)

    def map_rows(self, path: Path) -> Tensor:
        """The matrix at ``path``, ``[slots, row_bytes]`` uint8, mapped read-only and shared with other processes.

        Raises:
            TrajectoryError: the file is shorter, or cannot be mapped.
        """
        slots = 1 + max((saved.slot for saved in self.checkpoints), default=-1)
        path, size = path / WEIGHTS, slots * self.row_bytes
        try:
            with path.open("rb") as file:
                there = file.seek(0, 2)
                if there < size:
                    raise TrajectoryError(f"{path} is truncated: {there} bytes of {size}. Copy it or pack again.")
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise TrajectoryError(f"Cannot map {path}: {error}.") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
            return torch.frombuffer(mapped, dtype=torch.uint8).view(slots, self.row_bytes)


def foreign_files(path: Path) -> list[str]:
    """The names of what does not belong into a trajectory's folder, sorted."""
    return sorted(e.name for e in path.iterdir() if e.name not in (MANIFEST, WEIGHTS, LOCK) and not is_pending(e.name))
