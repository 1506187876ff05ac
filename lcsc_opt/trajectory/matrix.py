"""The rows of ``weights.bin``, written one after the other and then named in the manifest; and a background thread."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, remove, sync_folder, try_advisory_lock
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.trajectory.layout import EXACT, UNMERGEABLE, Layout, stored_dtype
from lcsc_opt.trajectory.manifest import LOCK, Manifest, foreign_files

WRITE_BYTES = 2**20  # checked and written at once: it is still in a cache, and the system copies it three times faster
AT_ONCE_BYTES = 2**14  # as many are hashed sooner than a thread wakes


class MatrixWriter:
    """Writes checkpoints as rows, and names them in the manifest when they are on the disk.

    A crash between the two leaves the old manifest; the next writer overwrites the row. One thread may write while
    another commits; no other calls may overlap. The arguments are those of
    :class:`~lcsc_opt.trajectory.writer.TrajectoryWriter`.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_last: int | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.path = path
        self._keep_last, self._stored = keep_last, None if dtype is None else stored_dtype(dtype)
        self._metadata = {str(name): str(text) for name, text in (metadata or {}).items()}
        self._process = os.getpid()
        self._failed = False
        with contextlib.ExitStack() as undo, self._as_trajectory_error():
            self._lock = _locked(path)
            undo.callback(self._lock)
            self._written = self._committed = _continued(path)  # what rows hold; what the disk is known to have
            if dtype is not None and self._written is not None and self._written.stored != self._stored:
                there = self._written.stored or EXACT
                raise TrajectoryError(f"{path} stores {there}, not {dtype}: leave the dtype out, or begin anew.")
            self._weights = os.open(path / WEIGHTS, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            undo.callback(os.close, self._weights)
            sync_folder(path.parent)
            undo.pop_all()
        self._close = weakref.finalize(self, os.close, self._weights)
        self._close.atexit = False  # what is registered to run then may still append; the process closes it

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were written and are kept, in order."""
        manifest = self._current()
        return () if manifest is None else tuple(saved.step for saved in manifest.checkpoints)

    def close(self) -> None:
        """Let another process write."""
        if self._close.alive and self._process == os.getpid():  # the lock is not a forked process's to release
            self._lock()
        self._close()

    def check(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Compare names, shapes and dtypes of a checkpoint with the first one; gives the layout of its row.

        Raises:
            TrajectoryError: they are not those of the first checkpoint; or the writer is closed.
        """
        if not self._close.alive:
            raise TrajectoryError(f"The writer of {self.path} is closed: open a new one to append.")
        if self._process != os.getpid():
            raise TrajectoryError(f"Another process opened the writer of {self.path}: append in that one only.")
        manifest = self._current()
        if manifest is None:
            return Layout.of(tensors, self._stored)
        manifest.layout.check(tensors, manifest.stored)
        return manifest.layout

    def truncate(self, last: int) -> int:
        """Drop the checkpoints that come after step ``last``, all at once; gives how many they were.

        Raises:
            TrajectoryError: the disk refuses.
        """
        last, manifest = self.whole_step(last), self._current()
        kept = () if manifest is None else tuple(saved for saved in manifest.checkpoints if saved.step <= last)
        if manifest is None or len(kept) == len(manifest.checkpoints):
            return 0
        self._written = manifest.model_copy(update={"checkpoints": kept})
        self.commit()
        return len(manifest.checkpoints) - len(kept)

    @staticmethod
    def whole_step(step: int) -> int:
        """A step as a number.

        Raises:
            TrajectoryError: it is not whole, or cannot be stored.
        """
        number = operator.index(step) if hasattr(step, "__index__") else -1
        if not 0 <= number < 2**63:
            raise TrajectoryError(f"A step is a whole number from 0, not {step!r}.")
        return number

    def is_new(self, step: int) -> bool:
        """Whether ``step`` comes after all saved ones; False when it is one of them.

        Raises:
            TrajectoryError: it lies between saved steps, or is no step at all.
        """
        step, steps = self.whole_step(step), self.steps
        if not steps or step > steps[-1]:
            return True
        if step not in steps:
            raise TrajectoryError(
                f"Step {step} comes after step {steps[-1]}; steps have to increase: open the writer with resume=STEP "
                "where training goes on from an earlier step."
            )
        return False

    def write(self, step: int, layout: Layout, tensors: Mapping[str, Tensor], *, source: str = "") -> None:
        """Write a checkpoint that was checked, for :meth:`commit`; nothing if its step is saved with the same bytes.

        ``layout`` comes from :meth:`check`. With ``keep_last``, commit before the next write: it may overwrite the row
        of a checkpoint that the manifest on the disk still names.

        Raises:
            TrajectoryError: a weight is not finite, the step is not larger than the last one, or the disk refuses.
        """
        new, manifest = self.is_new(step), self._current()
        manifest = manifest or Manifest(row_bytes=layout.row_bytes, stored=self._stored, tensors=layout.tensors)  # type: ignore[arg-type]
        if not new:
            [saved] = [saved for saved in manifest.checkpoints if saved.step == step]
            digest = hashlib.sha256()
            for _, content in layout.row_parts(tensors):
                digest.update(content.numpy().data)
            if digest.hexdigest() != saved.sha256:
                raise TrajectoryError(
                    f"Step {step} is saved already, with other weights: open the writer with resume=STEP where "
                    "training goes on from an earlier step, or write the new run to another trajectory."
                )
            return
        used = {saved.slot for saved in manifest.checkpoints}
        slot = next(slot for slot in range(len(used) + 1) if slot not in used)
        with self._as_trajectory_error():
            sha256, varying = self._write_row(step, slot, tensors, manifest)
        added = manifest.with_checkpoint(self._keep_last, varying, step=step, slot=slot, source=source, sha256=sha256)
        self._written = added.model_copy(update={"metadata": {**manifest.metadata, **self._metadata}})

    def commit(self) -> None:
        """Name all rows that are written by now in the manifest, when they are on the disk.

        Raises:
            TrajectoryError: the disk refuses. Then only what the disk has counts: after a failed sync, a later one does
                not make up for what it left out.
        """
        manifest = self._written
        if manifest is None or manifest is self._committed or self._failed:
            return
        try:
            with self._as_trajectory_error():
                os.fsync(self._weights)
                manifest.save(self.path)
        except BaseException:
            self._failed = True
            raise
        self._committed = manifest

    def _current(self) -> Manifest | None:
        if self._failed:  # before or after the manifest was replaced
            self._written = self._committed = _continued(self.path)
            self._failed = False
        return self._written

    def _write_row(
        self, step: int, slot: int, tensors: Mapping[str, Tensor], manifest: Manifest
    ) -> tuple[str, list[str]]:
        """Write a row, and hash it meanwhile, which takes about as long; it is not synced.

        Returns:
            Its SHA-256, and the names of the tensors that are not as in the last row, among those that were constant.
        """
        digest, varying = hashlib.sha256(), []
        before = manifest.map_rows(self.path)[manifest.checkpoints[-1].slot] if manifest.checkpoints else None
        os.lseek(self._weights, slot * manifest.row_bytes, os.SEEK_SET)
        with ThreadPoolExecutor(1, "lcsc-hash") as pool:
            for spec, content in manifest.layout.row_parts(tensors):
                hashed = _started(pool, digest.update, content.numpy().data)
                for first in range(0, len(content), WRITE_BYTES):
                    some = content[first : first + WRITE_BYTES]
                    if spec is not None and spec.merged:
                        extremes = torch.aminmax(some.view(spec.torch_dtype))  # thirty times faster than isfinite
                        if not all(bool(torch.isfinite(extreme)) for extreme in extremes):
                            within = "" if manifest.stored is None else f" in {manifest.stored}"
                            raise TrajectoryError(
                                f"Tensor {spec.name!r} at step {step} holds NaN or infinity{within}: leave this "
                                "checkpoint out, by a glob or a list."
                            )
                    left = some.numpy().data
                    while left:
                        left = left[os.write(self._weights, left) :]
                if (
                    spec is not None
                    and before is not None
                    and spec.name not in manifest.varying
                    and not torch.equal(content, before[spec.offset : spec.end])
                ):
                    if spec.dtype in UNMERGEABLE:
                        raise TrajectoryError(
                            f"Tensor {spec.name!r} is {spec.dtype} and changes between checkpoints; only float64, "
                            "float32, bfloat16 and float16 can be merged: save it as one of them."
                        )
                    varying.append(spec.name)
                if hashed is not None:
                    hashed.result()
        return digest.hexdigest(), varying

    @contextlib.contextmanager
    def _as_trajectory_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            there = getattr(getattr(self, "_committed", None), "checkpoints", ())
            saved = f"; up to step {there[-1].step} all is saved, append later ones again" if there else ""
            raise TrajectoryError(f"Cannot write to {self.path}: {error.strerror or error}{saved}.") from error


def _started(
    pool: ThreadPoolExecutor, update: Callable[[memoryview], None], content: memoryview
) -> Future[None] | None:
    """Hash in the pool's thread; at once if that is sooner, or if the interpreter is ending and starts no threads."""
    if content.nbytes > AT_ONCE_BYTES:
        with contextlib.suppress(RuntimeError):
            return pool.submit(update, content)
    update(content)
    return None


def _continued(path: Path) -> Manifest | None:
    return Manifest.load(path) if (path / MANIFEST).exists() else None


def _locked(path: Path) -> Callable[[], None]:
    """Keep a second writer out of the folder, which is made, and remove what a killed one did not finish.

    Returns what lets the next writer in.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (foreign := foreign_files(path)) and not (path / MANIFEST).exists():
        raise TrajectoryError(f"{path} is not a trajectory, it holds {foreign[0]!r}: name a new folder.")
    lock = try_advisory_lock(path / LOCK)
    if lock is None:
        raise TrajectoryError(f"Another writer has {path} open: close it, or write from one process only (rank 0).")
    for entry in list(path.iterdir()):
        if is_pending(entry.name):
            remove(entry)
    return lock


class Background:
    """Makes one call at a time in a thread of its own.

    Whoever waits for a call that no thread has begun makes it. So Ctrl-C while the thread starts leaves a call that can
    be waited for, and an interpreter that starts no more threads makes it at once. A call that a signal's handler ends
    by an exception, as Ctrl-C does, is made again.
    """

    def __init__(self, name: str) -> None:
        self._name, self._process = name, os.getpid()
        self._call: Callable[[], object] | None = None
        self._calling, self._errors = threading.Lock(), list[Exception]()
        self._caller: int | None = None  # the thread that makes the call

    @property
    def running(self) -> bool:
        """Whether a call may be running; never in a forked process, which does not have the thread."""
        return self._call is not None and self._process == os.getpid()

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the previous call has ended.

        Raises:
            Exception: the error of the previous call; ``function`` is then not called.
        """
        self.finish()
        self._call = function
        if threading.main_thread().is_alive():  # else the interpreter is ending, and does not wait for new threads
            with contextlib.suppress(RuntimeError):  # no more threads can be started
                threading.Thread(target=self._make, name=self._name, daemon=False).start()
                return
        self.finish()

    def finish(self) -> None:
        """Wait for the call and raise its error, once. Where the user interrupts the waiting, the call goes on."""
        if self.running:
            self._make()
        if self._errors:
            raise self._errors.pop()

    def _make(self) -> None:
        if self._caller == threading.get_ident():  # a signal's handler, within the call
            return
        with self._calling:
            self._caller = threading.get_ident()
            try:
                if self._call is not None:
                    self._call()
                self._call = None
            except Exception as error:
                self._errors.append(error)
                self._call = None
            finally:
                self._caller = None
