"""One checkpoint → one row of ``weights.bin``: coded, checked, hashed and written in one pass."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.names import REFERENCE
from lcsc_opt.trajectory.disk.differences import ErrorSample, StoredLayout
from lcsc_opt.trajectory.disk.layout import (
    UNMERGEABLE,
    Layout,
    TensorSpec,
    all_finite,
    as_bytes,
    neighbours_of_row,
    tensors_of_row,
)
from lcsc_opt.trajectory.disk.manifest import Manifest
from lcsc_opt.trajectory.disk.rows import map_bytes

WRITE_BYTES = 2**20  # checked and written at once: it is still in a cache, and the system copies it three times faster
WAITING_BYTES = 64 * 2**20  # that are written and not hashed yet; copies, where tensors are strided or elsewhere
AT_ONCE_BYTES = 2**14  # as many are hashed sooner than a thread wakes
NOTHING = memoryview(b"")


@dataclasses.dataclass(frozen=True)
class RowPart:
    """A part of a checkpoint on its way into its row.

    Attributes:
        specs: the tensors that it holds, neighbours of one dtype; none for padding.
        original: its bytes as they were given.
        read: its bytes as they will be read back.
        stored: the bytes to write.
        position: where to write them in the file.
    """

    specs: tuple[TensorSpec, ...]
    original: memoryview
    read: memoryview
    stored: memoryview
    position: int

    def given(self, spec: TensorSpec) -> memoryview:
        """The original bytes of one of the tensors."""
        start = spec.offset - self.specs[0].offset
        return self.original[start : start + spec.nbytes]


class Coder(Protocol):
    """How checkpoints become rows."""

    @property
    def fields(self) -> Mapping[str, object]:
        """The fields of the manifest that describe this coder."""
        ...

    def file_bytes(self, slot: int) -> int:
        """The least length of a file with a row in this slot."""
        ...

    def parts(self, tensors: Mapping[str, Tensor], slot: int = 0) -> Iterator[RowPart]:
        """The parts of a checkpoint in the order of its exact row, with what is written for them in a slot."""
        ...


class ExactCoder:
    """Rows that are the checkpoints' own bytes."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.fields: Mapping[str, object] = {}

    def file_bytes(self, slot: int) -> int:
        """See :class:`Coder`."""
        return (slot + 1) * self._layout.row_bytes

    def parts(self, tensors: Mapping[str, Tensor], slot: int = 0) -> Iterator[RowPart]:
        """See :class:`Coder`."""
        position = slot * self._layout.row_bytes
        for specs, content in neighbours_of_row(self._layout, tensors):
            yield RowPart(specs, content, content, content, position)
            position += content.nbytes


class DifferenceCoder:
    """Rows of differences from a reference checkpoint, which lies beside them.

    Args:
        layout: of the checkpoints.
        dtype: of the differences.
        reference: ``[row_bytes]`` uint8, mapped: its exact row.
        sha256: of that row.
    """

    def __init__(self, layout: Layout, dtype: str, reference: Tensor, sha256: str) -> None:
        self._layout, self._reference = layout, reference
        self._stored = StoredLayout(layout, dtype)
        self.fields: Mapping[str, object] = {"format": 2, "stored": dtype, "reference_sha256": sha256}

    def parts(self, tensors: Mapping[str, Tensor], slot: int = 0) -> Iterator[RowPart]:
        """See :class:`Coder`; the row, which is smaller than the checkpoint, is written at the end."""
        row = torch.zeros(self._stored.row_bytes, dtype=torch.uint8, device="cpu")
        for spec, content in tensors_of_row(self._layout, tensors):
            read = content if spec is None or not spec.numel else self._put(row, spec, content)
            yield RowPart(() if spec is None else (spec,), content, read, NOTHING, 0)
        whole = memoryview(row.numpy().data)
        for part in self._stored.parts():
            stored = whole[part.start : part.stop]
            yield RowPart((), NOTHING, NOTHING, stored, self._stored.position(slot, part))

    def file_bytes(self, slot: int) -> int:
        """See :class:`Coder`: whole groups of rows."""
        return self._stored.file_bytes(slot + 1)

    def _put(self, row: Tensor, spec: TensorSpec, given: memoryview) -> memoryview:
        content = torch.frombuffer(given, dtype=torch.uint8)
        read = self._stored.put(row, spec, content, self._reference[spec.offset : spec.end])
        return given if read is content else memoryview(as_bytes(read).numpy().data)


def open_coder(path: Path, manifest: Manifest) -> Coder:
    """The coder that the rows of a trajectory were written with."""
    if manifest.stored is None or manifest.reference_sha256 is None:
        return ExactCoder(manifest.layout)
    reference = map_bytes(path / REFERENCE, manifest.row_bytes)
    return DifferenceCoder(manifest.layout, manifest.stored, reference, manifest.reference_sha256)


def new_difference_coder(path: Path, layout: Layout, dtype: str, reference: Mapping[str, Tensor]) -> DifferenceCoder:
    """Write the reference checkpoint, and take differences from it.

    Raises:
        OSError: the disk refused.
        TrajectoryError: it holds NaN or infinity.
    """
    hashes = RowHashes("the reference checkpoint")
    with (path / REFERENCE).open("wb") as file:
        write_row(file.fileno(), ExactCoder(layout), reference, hashes, {})
        os.fsync(file.fileno())
    return DifferenceCoder(layout, dtype, map_bytes(path / REFERENCE, layout.row_bytes), hashes.sha256)


@dataclasses.dataclass
class RowHashes:
    """Hashes and checks one row while it is written. Tensors that are known to vary need no digest of their own."""

    name: str
    varying: frozenset[str] = frozenset()
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the exact row as it will be read back."""
        return self._hash.hexdigest()

    def add(self, part: RowPart, reference: Mapping[str, str]) -> None:
        """Take a part into the hashes."""
        self._hash.update(part.read)
        for spec in part.specs:
            if spec.name not in self.varying:
                digest = self.digests[spec.name] = hashlib.sha256(part.given(spec)).hexdigest()
                _check_mergeable(spec, digest, reference)

    def check_finite(self, part: RowPart, where: slice) -> None:
        """Refuse NaN and infinity."""
        if not part.specs or not part.specs[0].merged or _finite(part.original[where], part.specs[0]):
            return
        name = next(spec.name for spec in part.specs if not _finite(part.given(spec), spec))
        raise TrajectoryError(
            f"Tensor {name!r} at {self.name} holds NaN or infinity: leave this checkpoint out, by a glob or a list."
        )


def _finite(content: memoryview, spec: TensorSpec) -> bool:
    return not content or all_finite(torch.frombuffer(content, dtype=spec.torch_dtype))


class _Hashing:
    """Hashes the parts of a row, one after the other, in a thread; a small one at once where none waits.

    Parts that wait may be copies, so no more than :data:`WAITING_BYTES` of them may wait.
    """

    def __init__(self, pool: ThreadPoolExecutor, hashes: RowHashes, digests: Mapping[str, str]) -> None:
        self._pool, self._hashes, self._digests = pool, hashes, digests
        self._waiting: collections.deque[tuple[Future[None], int]] = collections.deque()
        self._bytes = 0

    def add(self, part: RowPart) -> None:
        """Queue a part behind those before; raises the error of an earlier one."""
        self._finish_those_done()
        if not self._waiting and part.original.nbytes <= AT_ONCE_BYTES:
            self._hashes.add(part, self._digests)
            return
        try:
            future = self._pool.submit(self._hashes.add, part, self._digests)
        except RuntimeError:  # the interpreter is ending: the thread does what it was given, and takes no more
            self.finish()
            self._hashes.add(part, self._digests)
            return
        self._waiting.append((future, part.original.nbytes))
        self._bytes += part.original.nbytes
        self._finish_those_done()

    def finish(self) -> None:
        """Wait until all parts are hashed; raises the first error."""
        while self._waiting:
            self._finish_one()

    def _finish_those_done(self) -> None:
        while self._waiting and (self._waiting[0][0].done() or self._too_much()):
            self._finish_one()

    def _too_much(self) -> bool:
        return len(self._waiting) > 1 and self._bytes > WAITING_BYTES

    def _finish_one(self) -> None:
        future, size = self._waiting.popleft()
        self._bytes -= size
        future.result()


def write_row(
    descriptor: int,
    coder: Coder,
    tensors: Mapping[str, Tensor],
    hashes: RowHashes,
    digests: Mapping[str, str],
    *,
    slot: int = 0,
    sample: ErrorSample | None = None,
) -> None:
    """Write a row, and hash it meanwhile, which takes about as long. The row is not synced.

    Args:
        descriptor: of the file.
        coder: makes the row.
        tensors: of the checkpoint.
        hashes: filled in.
        digests: of the tensors of the first checkpoint.
        slot: of the row.
        sample: collects what was stored.

    Raises:
        OSError: the disk refused.
        TrajectoryError: a weight is not finite, or a tensor changes that cannot be merged.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lcsc-hash") as pool:
        hashing = _Hashing(pool, hashes, digests)
        position = -1  # where the file stands; not known yet
        for part in coder.parts(tensors, slot):
            if part.specs or part.read:
                hashing.add(part)
            if part.stored and part.position != position:
                os.lseek(descriptor, part.position, os.SEEK_SET)
                position = part.position
            for start in range(0, max(part.original.nbytes, part.stored.nbytes), WRITE_BYTES):
                where = slice(start, start + WRITE_BYTES)
                hashes.check_finite(part, where)
                _write_all(descriptor, part.stored[where])
            position += part.stored.nbytes
            if sample is not None and part.specs:
                (spec,) = part.specs
                sample.add(spec, part.original, part.read)
        if os.fstat(descriptor).st_size < coder.file_bytes(slot):
            os.ftruncate(descriptor, coder.file_bytes(slot))
        hashing.finish()
    if sample is not None:
        sample.end_checkpoint()


def row_sha256(coder: Coder, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the exact row that would be read back."""
    digest = hashlib.sha256()
    for part in coder.parts(tensors):
        digest.update(part.read)
    return digest.hexdigest()


def _check_mergeable(spec: TensorSpec, digest: str, reference: Mapping[str, str]) -> None:
    if spec.dtype in UNMERGEABLE and reference.get(spec.name, digest) != digest:
        raise TrajectoryError(
            f"Tensor {spec.name!r} is {spec.dtype} and changes between checkpoints; only float64, float32, "
            "bfloat16 and float16 can be merged: save it as one of them."
        )


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
