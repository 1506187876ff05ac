"""Saving checkpoints, one after the other, as rows of a packed trajectory."""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.trajectory.differences import STORED, ErrorSample
from lcsc_opt.trajectory.in_order import InOrder
from lcsc_opt.trajectory.layout import Layout, check_same, plan
from lcsc_opt.trajectory.manifest import (
    FILES,
    MANIFEST,
    RELATIVE_ERROR,
    WEIGHTS,
    Manifest,
    SavedCheckpoint,
    first_manifest,
    load_manifest,
    save_manifest,
    sync_folder,
)
from lcsc_opt.trajectory.row_writing import (
    Coder,
    ExactCoder,
    RowHashes,
    new_difference_coder,
    open_coder,
    row_sha256,
    write_row,
)

if sys.platform != "win32":
    import fcntl

EXACT = "exact"


class Saver:
    """Saves checkpoints in the thread that calls it; one thread at a time may.

    The manifest names a row when all its bytes are on the disk; while one row is synced, the next may be written. What
    the arguments mean is said by :class:`~lcsc_opt.trajectory.writer.TrajectoryWriter`, which does the same in the
    background; this one needs no copy of weights that stay as they are.
    """

    def __init__(
        self,
        path: Path,
        *,
        window: int | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path = path
        self._window = window
        self._metadata = _checked_metadata(metadata or {})
        self._dtype, self._reference = checked_dtype(dtype), reference
        self._coder: Coder | None = None
        self._sample: ErrorSample | None = None
        self._committed: Manifest | None = None  # what the disk is known to have
        self._in_doubt = False
        with self._as_trajectory_error():
            self._weights = _open_weights(path)
        self._close = weakref.finalize(self, os.close, self._weights)
        self._commits = InOrder("lcsc-commit")
        try:
            self._manifest = self._committed = _continued(path)
            self._check_dtype()
        except TrajectoryError:
            self.close()
            raise

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the first error says more
            with contextlib.suppress(TrajectoryError):
                self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were saved and are kept, in order."""
        manifest = self._current()
        return () if manifest is None else tuple(saved.step for saved in manifest.checkpoints)

    @property
    def closed(self) -> bool:
        """Whether another process may write."""
        return not self._close.alive

    def close(self) -> None:
        """Wait as :meth:`flush` does, then let another process write."""
        try:
            self.flush()
        finally:
            self._commits.close()
            if not self.closed:
                _unlock(self._weights)
            self._close()

    def flush(self) -> None:
        """Wait until everything saved is on the disk.

        Raises:
            TrajectoryError: the disk refused a checkpoint that was saved without waiting; it is not there.
        """
        with self._as_trajectory_error():
            self._commits.finish()

    def measure(self) -> float | None:
        """See :meth:`TrajectoryWriter.measure`."""
        error = None if self._sample is None else self._sample.relative_error()
        if error is None:
            return None
        self.flush()
        manifest = self._current()
        if manifest is not None:
            metadata = {**manifest.metadata, RELATIVE_ERROR: f"{error:.3g}"}
            self._manifest = manifest.model_copy(update={"metadata": metadata})
            with self._as_trajectory_error():
                self._commit(self._manifest)
        return error

    def check(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Compare a checkpoint with the first one, without a look at its weights.

        Returns:
            How it is laid out in a row, for :meth:`save`.

        Raises:
            TrajectoryError: names, shapes or dtypes are not those of the first checkpoint, or of the reference; or the
                disk refused what was saved before, and that was not told yet.
        """
        manifest = self._current()
        if manifest is not None:
            check_same(manifest.layout, tensors)
            return manifest.layout
        layout = plan(tensors)
        self._coder = None  # of a first checkpoint that was refused
        if self._reference is not None and self._dtype not in (None, EXACT):
            check_same(layout, self._reference)
            with self._as_trajectory_error():
                self._begin(layout, self._reference)
        return layout

    def is_new(self, step: int) -> bool:
        """Whether ``step`` comes after all saved ones; False when it is one of them.

        Raises:
            TrajectoryError: neither, or no step at all.
        """
        step, steps = whole_step(step), self.steps
        if not steps or step > steps[-1]:
            return True
        if step not in steps:
            raise TrajectoryError(f"Step {step} comes after step {steps[-1]}; steps have to increase.")
        return False

    def save(
        self, step: int, layout: Layout, content: Mapping[str, Tensor], *, source: str = "", wait: bool = True
    ) -> bool:
        """Save a checkpoint that was checked.

        Args:
            step: as for :meth:`TrajectoryWriter.append`.
            layout: from :meth:`check`.
            content: its tensors; or their bytes, each ``[nbytes]`` uint8.
            source: where it came from.
            wait: until it is on the disk. Without, the system has all its bytes when this returns.

        Returns:
            Whether a row was written: False when the step is saved already with the same bytes.

        Raises:
            TrajectoryError: a weight is not finite, the step is not larger than the last one, or the disk refuses.
        """
        with self._as_trajectory_error():
            if wait or self._window is not None:
                self.flush()  # in a window, the free row is free only when the manifest on the disk leaves it out
            new, manifest = self.is_new(step), self._current()
            coder = self._coder or (self._begin(layout, content) if manifest is None else self._go_on(manifest))
            if manifest is not None and not new:
                _check_saved(manifest, step, content, coder)
                return False
            slot = _free_slot(manifest)
            row = self._write(slot, coder, content, step, manifest, sync=wait)
            saved = SavedCheckpoint(step=step, slot=slot, source=source, sha256=row.sha256)
            self._manifest = self._extended(manifest or first_manifest(layout, row.digests, coder.fields), saved, row)
            if wait:
                self._commit(self._manifest)
            else:
                self._commits.submit(self._commit_newest)
            return True

    def _commit_newest(self) -> None:
        """Name all rows that are written by now, after one sync: where the disk is slow, it is asked less often."""
        manifest = self._manifest
        if manifest is None or manifest is self._committed or self._in_doubt:
            return  # in doubt: what a failed sync left out, no later one makes up for
        try:
            os.fsync(self._weights)
        except BaseException:
            self._in_doubt = True
            raise
        self._commit(manifest)

    def _commit(self, manifest: Manifest) -> None:
        try:
            save_manifest(self.path, manifest)
        except BaseException:  # before or after the manifest was replaced
            self._in_doubt = True
            raise
        self._committed = manifest

    def _current(self) -> Manifest | None:
        if self._in_doubt:
            self.flush()  # tells what failed, unless that was told already
            self._manifest = self._committed = _continued(self.path)
            self._coder = None
            self._in_doubt = False
        return self._manifest

    def _extended(self, manifest: Manifest, saved: SavedCheckpoint, row: RowHashes) -> Manifest:
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
        self,
        slot: int,
        coder: Coder,
        content: Mapping[str, Tensor],
        step: int,
        manifest: Manifest | None,
        *,
        sync: bool,
    ) -> RowHashes:
        hashes = RowHashes(f"step {step}", frozenset() if manifest is None else frozenset(manifest.varying))
        digests = {} if manifest is None else manifest.digests
        write_row(self._weights, coder, content, hashes, digests, slot=slot, sync=sync, sample=self._sample)
        return hashes

    def _begin(self, layout: Layout, reference: Mapping[str, Tensor]) -> Coder:
        """How rows of a new trajectory are made."""
        if self._dtype in (None, EXACT):
            return self._use(ExactCoder(layout), layout)
        return self._use(new_difference_coder(self.path, layout, str(self._dtype), reference), layout)

    def _go_on(self, manifest: Manifest) -> Coder:
        """How rows are made that come after those of an earlier writer."""
        return self._use(open_coder(self.path, manifest), manifest.layout)

    def _use(self, coder: Coder, layout: Layout) -> Coder:
        self._coder = coder
        self._sample = None if isinstance(coder, ExactCoder) else ErrorSample(layout, checkpoints=self._window)
        return coder

    def _check_dtype(self) -> None:
        there = None if self._manifest is None else self._manifest.stored or EXACT
        if there is not None and self._dtype not in (None, there):
            raise TrajectoryError(f"{self.path} stores {there}, not {self._dtype}: leave the dtype out, or begin anew.")

    @contextlib.contextmanager
    def _as_trajectory_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            saved = ""
            if self._committed is not None and self._committed.checkpoints:
                saved = f"; up to step {self._committed.checkpoints[-1].step} all is saved, append later ones again"
            raise TrajectoryError(f"Cannot write to {self.path}: {error.strerror or error}{saved}.") from error


def checked_dtype(dtype: str | None) -> str | None:
    """How rows are stored.

    Raises:
        TrajectoryError: it is none of the names that there are.
    """
    if dtype is not None and dtype not in (EXACT, *STORED):
        raise TrajectoryError(f"dtype: expected {EXACT}, {', '.join(STORED)}, got {dtype!r}.")
    return dtype


def whole_step(step: int) -> int:
    """A step as a number.

    Raises:
        TrajectoryError: it is not whole, or cannot be stored.
    """
    try:
        number = operator.index(step)
    except TypeError:
        raise TrajectoryError(f"A step is a whole number, not {step!r}.") from None
    if not 0 <= number < 2**63:
        raise TrajectoryError(f"A step cannot be {number}.")
    return number


def _check_saved(manifest: Manifest, step: int, content: Mapping[str, Tensor], coder: Coder) -> None:
    """Raises when the step is saved with other bytes."""
    (saved,) = (one for one in manifest.checkpoints if one.step == step)
    if row_sha256(coder, content) != saved.sha256:
        raise TrajectoryError(
            f"Step {step} is saved already, with other weights: write the new run to another trajectory."
        )


def _free_slot(manifest: Manifest | None) -> int:
    used = set() if manifest is None else {saved.slot for saved in manifest.checkpoints}
    return next(slot for slot in range(len(used) + 1) if slot not in used)


def _continued(path: Path) -> Manifest | None:
    return load_manifest(path) if (path / MANIFEST).exists() else None


def _open_weights(path: Path) -> int:
    path.mkdir(parents=True, exist_ok=True)
    foreign = {entry.name for entry in path.iterdir()} - set(FILES)
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


def _unlock(descriptor: int) -> None:
    """Also for the processes that were forked meanwhile, such as a data loader's, which have the file open, too."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TrajectoryError(f"metadata[{name!r}]: names and values have to be text, got {text!r}.")
    return dict(metadata)
