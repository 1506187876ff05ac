"""``manifest.json``: what the rows of ``weights.bin`` are. Read with suspicion, written atomically."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, replacing
from lcsc_opt.checkpoints.names import MANIFEST, REFERENCE, WEIGHTS
from lcsc_opt.trajectory.disk.differences import StoredLayout
from lcsc_opt.trajectory.disk.layout import ALIGNMENT, DTYPES, MOST_SCALARS, Layout, TensorSpec, arrange

RELATIVE_ERROR = "relative_error"  # the metadata entry that holds what storing differences did to merged weights
LOCK = "writer.lock"  # held by the process that writes

Sha256 = Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid")


class SavedCheckpoint(_Model):
    """One checkpoint: its training step, its row, where it came from, and the SHA-256 of the row."""

    step: Whole
    slot: Whole
    source: str
    sha256: Sha256


class Manifest(_Model):
    """The whole manifest, validated: offsets are the ones that :func:`arrange` gives, slots are distinct.

    Attributes:
        row_bytes: of a checkpoint's exact row.
        stored: the dtype of the differences that are stored; ``None`` where rows are exact.
        reference_sha256: of ``reference.bin``; ``None`` where rows are exact.
        digests: tensor name → SHA-256 of its bytes in the first checkpoint that was ever written.
        varying: the names of tensors that were not bit-identical in all checkpoints written so far.
        checkpoints: in the order of their steps, which strictly increase.
    """

    format: Literal[1, 2] = 1
    row_bytes: Annotated[int, pydantic.Field(ge=ALIGNMENT)]
    stored: Literal["float16", "bfloat16", "int8"] | None = None
    reference_sha256: Sha256 | None = None
    tensors: Annotated[tuple[TensorSpec, ...], pydantic.Field(min_length=1)]
    varying: tuple[str, ...] = ()
    digests: dict[str, Sha256]
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    metadata: dict[str, str] = {}

    @property
    def layout(self) -> Layout:
        """Where the tensors lie in a row."""
        return Layout(self.tensors, self.row_bytes)

    @property
    def slots(self) -> int:
        """How many rows ``weights.bin`` has to have."""
        return 1 + max((saved.slot for saved in self.checkpoints), default=-1)

    @property
    def stored_layout(self) -> StoredLayout | None:
        """Where the differences lie in a row; ``None`` where rows are exact."""
        return None if self.stored is None else StoredLayout(self.layout, self.stored)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Manifest:
        if not (self.format == 2) == (self.stored is not None) == (self.reference_sha256 is not None):
            raise ValueError("format 2 stores differences from a reference, format 1 does not")
        _check_tensors(self.tensors)
        if arrange((spec.name, spec.shape, spec.dtype) for spec in self.tensors) != self.layout:
            raise ValueError("tensors are not where their shapes and dtypes put them")
        names = {spec.name for spec in self.tensors}
        if set(self.digests) != names or not set(self.varying) <= names:
            raise ValueError("'digests' or 'varying' name other tensors than 'tensors'")
        _check_checkpoints(self.checkpoints)
        return self


def _check_tensors(tensors: tuple[TensorSpec, ...]) -> None:
    if len({spec.name for spec in tensors}) < len(tensors):
        raise ValueError("a tensor is listed twice")
    for spec in tensors:
        if spec.dtype not in DTYPES:
            raise ValueError(f"tensor {spec.name!r} has an unknown dtype {spec.dtype!r}")
        if min(spec.shape, default=0) < 0 or math.prod(max(size, 1) for size in spec.shape) > MOST_SCALARS:
            raise ValueError(f"tensor {spec.name!r} has an impossible shape")


def _check_checkpoints(checkpoints: tuple[SavedCheckpoint, ...]) -> None:
    if len({saved.slot for saved in checkpoints}) < len(checkpoints):
        raise ValueError("two checkpoints share a slot")
    if any(later.step <= earlier.step for earlier, later in itertools.pairwise(checkpoints)):
        raise ValueError("steps do not increase")


def trajectory_sha256(tensors: Iterable[TensorSpec], rows: Iterable[tuple[int, str]]) -> str:
    """The identity of K checkpoints: names, shapes and dtypes of their tensors, steps, and SHA-256 of each row."""
    described = [(spec.name, spec.shape, spec.dtype) for spec in tensors]
    return hashlib.sha256(json.dumps([described, list(rows)]).encode()).hexdigest()


def load_manifest(path: Path) -> Manifest:
    """Read and validate the manifest of the trajectory at ``path``.

    Raises:
        TrajectoryError: it is not there, cannot be read, or says something impossible.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return Manifest.model_validate_json(text)
    except (pydantic.ValidationError, RecursionError) as error:
        raise TrajectoryError(f"{path / MANIFEST} is broken ({_reason(error)}): pack again.") from error


def unreadable(path: Path, error: OSError) -> TrajectoryError:
    """What to tell a user whose trajectory at ``path`` has no manifest that can be read."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return TrajectoryError(f"Cannot read {path / MANIFEST}: {error.strerror}.")
    if not path.exists():
        return TrajectoryError(f"There is no trajectory at {path}: make one with `lcsc trajectory pack`.")
    if (path / WEIGHTS).exists():
        return TrajectoryError(f"{path} holds no whole checkpoint yet: append one, or pack again.")
    return TrajectoryError(f"{path} is not a trajectory, {MANIFEST} is missing: pack the checkpoints first.")


def _reason(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return "nested too deeply"
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest at ``path`` so that a reader sees the old one or the new one, also after a crash.

    Raises:
        OSError: the disk refused; the old manifest is then still there, or the new one is complete.
    """
    text = manifest.model_dump_json(indent=1, exclude_none=True)
    with replacing(path / MANIFEST) as pending:
        pending.write_text(text, encoding="utf-8")


def is_trajectory_file(name: str) -> bool:
    """Whether a file of this name may lie in a trajectory's folder."""
    return name in (MANIFEST, WEIGHTS, REFERENCE, LOCK) or is_pending(name)


def first_manifest(layout: Layout, digests: Mapping[str, str], stored: Mapping[str, object]) -> Manifest:
    """The manifest of a trajectory whose first checkpoint has just been hashed; it lists none yet.

    Args:
        layout: of the checkpoints.
        digests: of the first one's tensors.
        stored: the fields that say how rows are stored; none for exact ones.
    """
    exact = Manifest(row_bytes=layout.row_bytes, tensors=layout.tensors, digests=dict(digests))
    return exact.model_copy(update=dict(stored))
