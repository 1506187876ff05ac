"""Saving checkpoints, one after the other, as rows of a packed trajectory."""

from __future__ import annotations

import contextlib
import operator
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, remove, sync_folder, try_lock, unlock
from lcsc_opt.checkpoints.names import MANIFEST, WEIGHTS
from lcsc_opt.trajectory.disk.differences import STORED, ErrorSample
from lcsc_opt.trajectory.disk.layout import Layout, check_same, plan
from lcsc_opt.trajectory.disk.manifest import (
    LOCK,
    RELATIVE_ERROR,
    Manifest,
    SavedCheckpoint,
    first_manifest,
    is_trajectory_file,
    load_manifest,
    save_manifest,
)
from lcsc_opt.trajectory.disk.row_writing import (
    Coder,
    ExactCoder,
    RowHashes,
    new_difference_coder,
    open_coder,
    row_sha256,
    write_row,
)

EXACT = "exact"


class Saver:
    """Writes checkpoints as rows, and names them in the manifest when they are on the disk.

    One thread may write while another commits; no other calls may overlap. The arguments are those of
    :class:`~lcsc_opt.trajectory.writer.TrajectoryWriter`.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_last: int | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path = path
        self._keep_last = keep_last
        self._metadata = _checked_metadata(metadata or {})
        self._dtype, self._reference = checked_dtype(dtype), reference
        self._coder: Coder | None = None
        self._sample: ErrorSample | None = None
        self._process = os.getpid()
        self._written: Manifest | None = None  # with what rows hold
        self._committed: Manifest | None = None  # as the disk is known to have it
        self._failed = False
        with contextlib.ExitStack() as undo, self._as_trajectory_error():
            self._lock = _locked(path)
            undo.callback(unlock, self._lock)
            self._written = self._committed = _continued(path)
            self._check_dtype()
            self._weights = _open_weights(path)
            undo.pop_all()
        self._close = weakref.finalize(self, os.close, self._weights)
        self._close.atexit = False  # what is registered to run then may still append; the process closes it

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were written and are kept, in order."""
        manifest = self._current()
        return () if manifest is None else tuple(saved.step for saved in manifest.checkpoints)

    @property
    def closed(self) -> bool:
        """Whether another process may write."""
        return not self._close.alive

    def close(self) -> None:
        """Let another process write."""
        if not self.closed and self._process == os.getpid():  # the lock is not a forked process's to release
            unlock(self._lock)
        self._close()

    def measure(self) -> float | None:
        """See :meth:`TrajectoryWriter.measure`."""
        error = None if self._sample is None else self._sample.relative_error()
        manifest = self._current()
        if error is not None and manifest is not None:
            metadata = {**manifest.metadata, RELATIVE_ERROR: f"{error:.3g}"}
            self._written = manifest.model_copy(update={"metadata": metadata})
            self.commit()
        return error

    def check(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Compare names, shapes and dtypes of a checkpoint with the first one.

        Returns:
            The layout of its row, for :meth:`write`.

        Raises:
            TrajectoryError: names, shapes or dtypes are not those of the first checkpoint, or of the reference; or the
                writer is closed.
        """
        self._check_open()
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

    def truncate(self, last: int) -> int:
        """Drop the checkpoints that come after step ``last``, all at once.

        Returns:
            How many they were.

        Raises:
            TrajectoryError: the disk refuses.
        """
        last, manifest = whole_step(last), self._current()
        kept = () if manifest is None else tuple(saved for saved in manifest.checkpoints if saved.step <= last)
        if manifest is None or len(kept) == len(manifest.checkpoints):
            return 0
        self._written = manifest.model_copy(update={"checkpoints": kept})
        self.commit()
        return len(manifest.checkpoints) - len(kept)

    def is_new(self, step: int) -> bool:
        """Whether ``step`` comes after all saved ones; False when it is one of them.

        Raises:
            TrajectoryError: it lies between saved steps, or is no step at all.
        """
        step, steps = whole_step(step), self.steps
        if not steps or step > steps[-1]:
            return True
        if step not in steps:
            raise TrajectoryError(
                f"Step {step} comes after step {steps[-1]}; steps have to increase: open the writer with resume=STEP "
                "where training goes on from an earlier step."
            )
        return False

    def write(self, step: int, layout: Layout, content: Mapping[str, Tensor], *, source: str = "") -> bool:
        """Write a checkpoint that was checked, for :meth:`commit`.

        With ``keep_last``, commit before the next write: it may overwrite the row of a checkpoint that the manifest on
            the disk still names.

        Args:
            step: as for :meth:`TrajectoryWriter.append`.
            layout: from :meth:`check`.
            content: its tensors; or their bytes, each ``[nbytes]`` uint8.
            source: where it came from.

        Returns:
            Whether a row was written: False when the step is saved already with the same bytes.

        Raises:
            TrajectoryError: a weight is not finite, the step is not larger than the last one, or the disk refuses.
        """
        new, manifest = self.is_new(step), self._current()
        with self._as_trajectory_error():
            coder = self._coder or (self._begin(layout, content) if manifest is None else self._go_on(manifest))
            if manifest is not None and not new:
                _check_saved(manifest, step, content, coder)
                return False
            slot = _free_slot(manifest)
            row = self._write_row(slot, coder, content, step, manifest)
        saved = SavedCheckpoint(step=step, slot=slot, source=source, sha256=row.sha256)
        self._written = self._extended(manifest or first_manifest(layout, row.digests, coder.fields), saved, row)
        return True

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
                save_manifest(self.path, manifest)
        except BaseException:
            self._failed = True
            raise
        self._committed = manifest

    def _current(self) -> Manifest | None:
        if self._failed:  # before or after the manifest was replaced
            self._written = self._committed = _continued(self.path)
            self._coder, self._failed = None, False
        return self._written

    def _check_open(self) -> None:
        if self.closed:
            raise TrajectoryError(f"The writer of {self.path} is closed: open a new one to append.")
        if self._process != os.getpid():
            raise TrajectoryError(f"Another process opened the writer of {self.path}: append in that one only.")

    def _extended(self, manifest: Manifest, saved: SavedCheckpoint, row: RowHashes) -> Manifest:
        checkpoints = (*manifest.checkpoints, saved)
        varying = {
            *manifest.varying,
            *(name for name, sha in row.digests.items() if manifest.digests[name] != sha),
        }
        return manifest.model_copy(
            update={
                "checkpoints": checkpoints if self._keep_last is None else checkpoints[-self._keep_last :],
                "varying": tuple(sorted(varying)),
                "metadata": {**manifest.metadata, **self._metadata},
            }
        )

    def _write_row(
        self, slot: int, coder: Coder, content: Mapping[str, Tensor], step: int, manifest: Manifest | None
    ) -> RowHashes:
        hashes = RowHashes(f"step {step}", frozenset() if manifest is None else frozenset(manifest.varying))
        digests = {} if manifest is None else manifest.digests
        write_row(self._weights, coder, content, hashes, digests, slot=slot, sample=self._sample)
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
        self._sample = None if isinstance(coder, ExactCoder) else ErrorSample(layout, checkpoints=self._keep_last)
        return coder

    def _check_dtype(self) -> None:
        there = None if self._written is None else self._written.stored or EXACT
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
        TrajectoryError: there is no such dtype.
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
            f"Step {step} is saved already, with other weights: open the writer with resume=STEP where training goes "
            "on from an earlier step, or write the new run to another trajectory."
        )


def _free_slot(manifest: Manifest | None) -> int:
    used = set() if manifest is None else {saved.slot for saved in manifest.checkpoints}
    return next(slot for slot in range(len(used) + 1) if slot not in used)


def _continued(path: Path) -> Manifest | None:
    return load_manifest(path) if (path / MANIFEST).exists() else None


def _locked(path: Path) -> FileLock:
    """Keep a second writer out of the folder, which is made, and remove what a killed one did not finish."""
    path.mkdir(parents=True, exist_ok=True)
    names = [entry.name for entry in path.iterdir()]
    foreign = [name for name in names if not is_trajectory_file(name)]
    if foreign and MANIFEST not in names:
        raise TrajectoryError(f"{path} is not a trajectory, it holds {min(foreign)!r}: name a new folder.")
    lock = try_lock(path / LOCK)
    if lock is None:
        raise TrajectoryError(f"Another writer has {path} open: close it, or write from one process only (rank 0).")
    for name in filter(is_pending, names):
        remove(path / name)
    return lock


def _open_weights(path: Path) -> int:
    descriptor = os.open(path / WEIGHTS, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        sync_folder(path.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TrajectoryError(f"metadata[{name!r}]: names and values have to be text, got {text!r}.")
    return dict(metadata)
