"""Saving checkpoints into a packed trajectory while a model trains."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import operator
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.trajectory.formats import strip_wrappers
from lcsc_opt.trajectory.layout import UNMERGEABLE, Layout, TensorSpec, all_finite, check_same, plan, row_chunks
from lcsc_opt.trajectory.manifest import (
    MANIFEST,
    PENDING,
    WEIGHTS,
    Manifest,
    SavedCheckpoint,
    first_manifest,
    load_manifest,
    save_manifest,
    sync_folder,
)

if sys.platform != "win32":
    import fcntl

WRITE_BYTES = 64 * 2**20  # at once; Linux takes less than 2 GiB
WAITING_BYTES = 64 * 2**20  # that are written and not hashed yet


class TrajectoryWriter:
    """Appends checkpoints to the trajectory at ``path``, which is made or continued.

    A checkpoint becomes visible to readers when all its bytes are on the disk, by one atomic replacement of
    the manifest: whatever instant the process dies at, the trajectory holds whole checkpoints only. With a
    window, one spare row is kept, so that the oldest checkpoint stays until the new one is there. One process
    may write at a time.

    Args:
        path: the folder, by convention ``NAME.trajectory``.
        every: save only at steps that are multiples of it.
        window: keep this many last checkpoints; ``None`` keeps all.
        metadata: texts to note in the manifest; they add to what is there.

    Raises:
        TrajectoryError: the folder holds something else, cannot be written, or another process writes to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        window: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._every = _at_least_one("every", every)
        self._window = None if window is None else _at_least_one("window", window)
        self._metadata = _checked_metadata(metadata or {})
        with _as_trajectory_error(self.path):
            self._weights = _open_weights(self.path)
        self._close = weakref.finalize(self, os.close, self._weights)
        try:
            self._manifest = _continued(self.path)
        except TrajectoryError:
            self.close()
            raise
        self._in_doubt = False

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are saved now, in order."""
        manifest = self._current()
        return () if manifest is None else tuple(saved.step for saved in manifest.checkpoints)

    def close(self) -> None:
        """Let another process write. Everything appended is on the disk already."""
        self._close()

    def append(self, step: int, weights: Mapping[str, Tensor] | nn.Module, *, source: str = "") -> bool:
        """Save ``weights`` as the checkpoint of training iteration ``step``.

        Args:
            step: larger than every saved step; or a saved step again with the same bytes, which changes
                nothing, so that resumed training may come by a second time.
            weights: a state dict or a module (prefixes that DataParallel or ``torch.compile`` put are left
                out); on any device, contiguous or not, with or without gradients.
            source: where the checkpoint came from, as it is noted in the manifest.

        Returns:
            Whether a checkpoint was written: False when ``step`` is not a multiple of ``every``, or is
            saved already.

        Raises:
            TrajectoryError: names, shapes or dtypes differ from the first checkpoint's; a weight is not
                finite; the step is not larger than the last one; or the disk refuses. What was saved before
                stays as it was.
        """
        step = _whole(step)
        if step % self._every:
            return False
        if not self._close.alive:
            raise TrajectoryError(f"The writer of {self.path} is closed: open a new one to append step {step}.")
        tensors = _named_tensors(weights)
        with _as_trajectory_error(self.path):
            return self._append(step, tensors, source)

    def _append(self, step: int, tensors: Mapping[str, Tensor], source: str) -> bool:
        manifest = self._current()
        layout = plan(tensors) if manifest is None else manifest.layout
        check_same(layout, tensors)
        if manifest is not None and not _is_next(manifest, step, tensors):
            return False
        slot = _free_slot(manifest)
        row = self._write(slot, layout, tensors, step, manifest)
        manifest = manifest or first_manifest(layout, row.digests, {})
        self._in_doubt = True  # until the new manifest is known to be on the disk
        self._manifest = self._extended(
            manifest, SavedCheckpoint(step=step, slot=slot, source=source, sha256=row.sha256), row
        )
        save_manifest(self.path, self._manifest)
        self._in_doubt = False
        return True

    def _current(self) -> Manifest | None:
        if self._in_doubt:  # an earlier save failed, before or after its manifest was replaced
            self._manifest = _continued(self.path)
            self._in_doubt = False
        return self._manifest

    def _extended(self, manifest: Manifest, saved: SavedCheckpoint, row: _Row) -> Manifest:
        checkpoints = (*manifest.checkpoints, saved)
        varying = {
            *manifest.varying,
            *(name for name, sha in row.digests.items() if manifest.digests[name] != sha),
        }
        return manifest.model_copy(
            update={
                "checkpoints": checkpoints if self._window is None else checkpoints[-self._window :],
                "varying": tuple(sorted(varying)),
                "metadata": {**manifest.metadata, **self._metadata},
            }
        )

    def _write(
        self, slot: int, layout: Layout, tensors: Mapping[str, Tensor], step: int, manifest: Manifest | None
    ) -> _Row:
        row = _Row(step, frozenset() if manifest is None else frozenset(manifest.varying))
        reference = {} if manifest is None else manifest.digests
        os.lseek(self._weights, slot * layout.row_bytes, os.SEEK_SET)
        with _Hasher() as hasher:
            for spec, chunk in row_chunks(layout, tensors):
                row.check_finite(spec, chunk)
                hasher.submit(chunk, row.add, spec, chunk, reference)
                _write_all(self._weights, chunk)
            os.fsync(self._weights)
            hasher.finish()
        return row


class _Hasher:
    """Hashes in a thread of its own while the bytes are written and synced, which takes about as long.

    Chunks that wait are kept in memory where they are copies, so no more than ``WAITING_BYTES`` may wait.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lcsc-hash")
        self._waiting: collections.deque[tuple[Future[None], int]] = collections.deque()
        self._bytes = 0

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, chunk: memoryview, function: Callable[..., None], *arguments: object) -> None:
        """Call ``function`` after the ones submitted before, soon."""
        try:
            future = self._pool.submit(function, *arguments)
        except RuntimeError:  # the interpreter is ending, and starts no thread any more
            function(*arguments)
            return
        self._waiting.append((future, chunk.nbytes))
        self._bytes += chunk.nbytes
        while len(self._waiting) > 1 and self._bytes > WAITING_BYTES:
            self._finish_one()

    def finish(self) -> None:
        """Wait for all calls; raises what the first of them raised that failed."""
        while self._waiting:
            self._finish_one()

    def _finish_one(self) -> None:
        future, size = self._waiting.popleft()
        self._bytes -= size
        future.result()


@dataclasses.dataclass
class _Row:
    """Hashes and checks one row while its bytes go by; tensors that vary already need no own digest."""

    step: int
    varying: frozenset[str] = frozenset()
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, spec: TensorSpec | None, chunk: memoryview, reference: Mapping[str, str]) -> None:
        """Take ``chunk`` into the hashes."""
        self._hash.update(chunk)
        if spec is not None and spec.name not in self.varying:
            digest = self.digests[spec.name] = hashlib.sha256(chunk).hexdigest()
            _check_mergeable(spec, digest, reference)

    def check_finite(self, spec: TensorSpec | None, chunk: memoryview) -> None:
        """Refuse NaN and infinity."""
        if spec is None or not spec.merged or not spec.numel:
            return
        if not all_finite(torch.frombuffer(chunk, dtype=spec.torch_dtype)):
            raise TrajectoryError(
                f"Tensor {spec.name!r} at step {self.step} holds NaN or infinity: leave this checkpoint out."
            )


def _check_mergeable(spec: TensorSpec, digest: str, reference: Mapping[str, str]) -> None:
    if spec.dtype in UNMERGEABLE and reference.get(spec.name, digest) != digest:
        raise TrajectoryError(
            f"Tensor {spec.name!r} is {spec.dtype} and changes between checkpoints; only float64, float32, "
            "bfloat16 and float16 can be merged: save it as one of them."
        )


def _is_next(manifest: Manifest, step: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether ``step`` comes after all saved ones; False when it is saved with the same bytes."""
    last = max((saved.step for saved in manifest.checkpoints), default=-1)
    if step > last:
        return True
    same_step = [saved for saved in manifest.checkpoints if saved.step == step]
    if not same_step:
        raise TrajectoryError(f"Step {step} comes after step {last}; steps have to increase.")
    row = hashlib.sha256()
    for _, chunk in row_chunks(manifest.layout, tensors):
        row.update(chunk)
    if row.hexdigest() != same_step[0].sha256:
        raise TrajectoryError(
            f"Step {step} is saved already, with other weights: write the new run to another trajectory."
        )
    return False


def _free_slot(manifest: Manifest | None) -> int:
    used = set() if manifest is None else {saved.slot for saved in manifest.checkpoints}
    return next(slot for slot in range(len(used) + 1) if slot not in used)


def _named_tensors(weights: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        weights = strip_wrappers(weights.state_dict())
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TrajectoryError(f"Entry {name!r} is {type(tensor).__name__}, not a tensor: leave it out.")
    return weights


def _continued(path: Path) -> Manifest | None:
    return load_manifest(path) if (path / MANIFEST).exists() else None


def _open_weights(path: Path) -> int:
    path.mkdir(parents=True, exist_ok=True)
    foreign = {entry.name for entry in path.iterdir()} - {MANIFEST, PENDING, WEIGHTS}
    if foreign and not (path / MANIFEST).exists():
        raise TrajectoryError(f"{path} is not a trajectory, it holds {min(foreign)!r}: name a new folder.")
    descriptor = os.open(path / WEIGHTS, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _lock(descriptor, path)
        sync_folder(path.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    """Keep a second writer out, where the file system can; the lock goes with the process."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrajectoryError(
            f"Another writer has {path} open: close it, or write from one process only (rank 0)."
        ) from None
    except OSError:  # some network file systems have no locks
        return


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk[:WRITE_BYTES]) :]


@contextlib.contextmanager
def _as_trajectory_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrajectoryError(f"Cannot write to {path}: {error.strerror or error}.") from error


def _whole(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TrajectoryError(f"A step is a whole number, not {step!r}.") from None
    if not 0 <= number < 2**63:
        raise TrajectoryError(f"A step cannot be {number}.")
    return number


def _at_least_one(name: str, value: int) -> int:
    if _whole(value) < 1:
        raise TrajectoryError(f"{name}: expected at least 1, got {value}.")
    return _whole(value)


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TrajectoryError(f"metadata[{name!r}]: names and values have to be text, got {text!r}.")
    return dict(metadata)
