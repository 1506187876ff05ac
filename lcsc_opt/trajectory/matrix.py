"""The rows of ``weights.bin``, written one after the other and then named in the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import operator
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import is_pending, remove, sync, try_lock
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.base.records import TRAINER_EMA
from lcsc_opt.trajectory.layout import EXACT, UNMERGEABLE, Layout, TensorSpec, aligned, stored_dtype
from lcsc_opt.trajectory.manifest import LOCK, Manifest, SavedAverage, SavedRow, foreign_files


class MatrixWriter:
    """Writes checkpoints as rows, and names them in the manifest when they are on the disk.

    A crash between the two leaves the old manifest; the next writer overwrites the row. No two calls may overlap. The
    arguments are those of :class:`~lcsc_opt.trajectory.writer.TrajectoryWriter`.
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
        self._keep_last = keep_last
        self._stored: str | None = None
        if dtype is not None:
            self._stored = stored_dtype(dtype)
        self._metadata = {str(name): str(text) for name, text in (metadata or {}).items()}
        self._process = os.getpid()
        self._failed = False
        with contextlib.ExitStack() as undo, self._as_trajectory_error():
            self._open(undo, dtype)
            undo.pop_all()  # only an error closes what was opened
        self._close = weakref.finalize(self, os.close, self._weights)
        self._close.atexit = False  # functions that run at exit may still append; the process closes the file

    def _open(self, undo: contextlib.ExitStack, dtype: str | None) -> None:
        """Make and lock the folder, read the manifest, and open the file of the rows, which ``undo`` closes."""
        self._release = _make_and_lock(self.path)
        undo.callback(self._release)
        for entry in list(self.path.iterdir()):
            if is_pending(entry.name):  # a killed writer did not finish it
                remove(entry)
        self._committed = _load_manifest(self.path)  # the manifest on the disk
        self._written = self._committed  # the same with the rows that were written since, for the next commit
        if self._committed is not None and dtype is not None and self._committed.stored != self._stored:
            raise TrajectoryError(
                f"{self.path} stores {self._committed.stored or EXACT}, not {dtype}: leave the dtype out, or start a "
                "new trajectory."
            )
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._weights = os.open(self.path / WEIGHTS, flags, 0o666)
        undo.callback(os.close, self._weights)
        sync(self.path.parent)  # which may have got this folder

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were written and are kept, in order."""
        manifest = self._current()
        if manifest is None:
            return ()
        return tuple(saved.step for saved in manifest.checkpoints)

    def close(self) -> None:
        """Let another process write."""
        if self._close.alive and self._process == os.getpid():  # the lock is not a forked process's to release
            self._release()
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

    def layout_of_average(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of an average of the trainer's, whose tensors keep their dtypes, in whole slots.

        Args:
            tensors: with the names and shapes of the checkpoints.

        Raises:
            TrajectoryError: there is no checkpoint yet, or a tensor cannot be stored.
        """
        layout = Layout.of(tensors)
        return Layout(layout.tensors, aligned(layout.row_bytes, self._begun().row_bytes))

    def truncate(self, last: int) -> int:
        """Drop the checkpoints that come after step ``last``, all at once; gives how many they were.

        Raises:
            TrajectoryError: the disk refuses.
        """
        last = whole_step(last)
        manifest = self._current()
        if manifest is None:
            return 0
        remaining = tuple(saved for saved in manifest.checkpoints if saved.step <= last)
        dropped = len(manifest.checkpoints) - len(remaining)
        if dropped:
            # training may reach the step of an average again with other weights
            averages = tuple(saved for saved in manifest.averages if saved.step <= last)
            self._written = manifest.model_copy(update={"checkpoints": remaining, "averages": averages})
            self.commit()
        return dropped

    def is_new(self, step: int) -> bool:
        """Whether a step comes after all saved ones; False when it is one of them.

        Raises:
            TrajectoryError: it lies before or between saved ones, or is no step at all.
        """
        whole_step(step)
        steps = self.steps
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise TrajectoryError(
                f"Step {step} comes after step {steps[-1]}; steps have to increase: open the writer with resume=STEP "
                "to continue training from an earlier step."
            )
        return True

    def write(self, step: int, layout: Layout, row: Tensor, *, source: str = "", sha256: str | None = None) -> None:
        """Write a checkpoint that was checked, for :meth:`commit`; nothing if its step is saved with the same bytes.

        With ``keep_last``, commit before the next write: it may overwrite the row of a checkpoint that the manifest on
        the disk still names.

        Args:
            step: of the checkpoint.
            layout: from :meth:`check`.
            row: from :meth:`Layout.row_of` of this layout.
            source: the file that it was read from.
            sha256: of the row, as :func:`row_sha256`, where the caller knows it.

        Raises:
            TrajectoryError: a weight is not finite, the step does not come after the last one, or the disk refuses.
        """
        is_new = self.is_new(step)
        manifest = self._current()
        if manifest is None:
            manifest = Manifest(row_bytes=layout.row_bytes, stored=self._stored, tensors=layout.tensors)  # type: ignore[arg-type]
        sha256 = sha256 or row_sha256(row)
        if not is_new:
            _check_same_bytes(manifest, step, sha256)
            return
        saved = SavedRow(step=step, slot=manifest.free_slot(), source=source, sha256=sha256)
        newly_varying = self._newly_varying(row, manifest)
        varying = {*manifest.varying, *newly_varying}
        _check_numbers(row, layout, step, varying=varying, stored=manifest.stored)
        self._write_row(row, saved.slot * manifest.row_bytes)
        added = manifest.with_checkpoint(saved, newly_varying, keep_last=self._keep_last)
        self._written = added.model_copy(update={"metadata": manifest.metadata | self._metadata})

    def write_trainer_ema(self, layout: Layout, row: Tensor, *, source: str, name: str = TRAINER_EMA) -> None:
        """Write an average of the trainer's at the last step, as one more row, for :meth:`commit`.

        One of the same name is replaced.

        Args:
            layout: from :meth:`layout_of_average`; or from :meth:`check`, rounded as the checkpoints are.
            row: from :meth:`Layout.row_of` of this layout.
            source: the file that it was read from.
            name: how reports call it.

        Raises:
            TrajectoryError: there is no checkpoint yet, a weight is not finite, or the disk refuses.
        """
        manifest = self._begun()
        step = manifest.checkpoints[-1].step
        _check_numbers(row, layout, step, varying=manifest.varying)
        dtype_of = {spec.name: spec.dtype for spec in manifest.tensors}
        slots = layout.row_bytes // manifest.row_bytes
        average = SavedAverage(
            step=step,
            slot=manifest.free_slot(slots),
            source=source,
            sha256=row_sha256(row),
            name=name,
            slots=slots,
            dtypes={spec.name: spec.dtype for spec in layout.tensors if spec.dtype != dtype_of[spec.name]},
        )
        self._write_row(row, average.slot * manifest.row_bytes)
        others = tuple(saved for saved in manifest.averages if saved.name != name)
        self._written = manifest.model_copy(update={"averages": (*others, average)})

    def _begun(self) -> Manifest:
        """The manifest with all rows that were written.

        Raises:
            TrajectoryError: there is none.
        """
        manifest = self._current()
        if manifest is None:
            raise TrajectoryError(f"{self.path} holds no checkpoint yet: append one first.")
        return manifest

    def commit(self) -> None:
        """Sync the rows that were written to the disk, then name them in the manifest.

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
        """The manifest with all rows that were written; ``None`` before the first."""
        if self._failed:  # a commit, before or after it replaced the manifest: only the disk knows
            self._committed = _load_manifest(self.path)
            self._written = self._committed
            self._failed = False
        return self._written

    def _write_row(self, row: Tensor, offset: int) -> None:
        """Write a row that was checked from byte ``offset`` of the file; it is not synced."""
        remaining = row.numpy().data
        with self._as_trajectory_error():
            os.lseek(self._weights, offset, os.SEEK_SET)
            while remaining:  # the system may take only a part at a time
                written = os.write(self._weights, remaining)
                remaining = remaining[written:]

    def _newly_varying(self, row: Tensor, manifest: Manifest) -> list[str]:
        """The names of tensors that were the same in all checkpoints so far, and are not in this row.

        Raises:
            TrajectoryError: one of them cannot be merged.
        """
        if not manifest.checkpoints:
            return []
        last = manifest.checkpoints[-1]
        last_row = manifest.map_rows(self.path)[last.slot]
        constant = [spec for spec in manifest.tensors if spec.name not in manifest.varying]
        changed = [spec for spec in constant if not torch.equal(spec.of_row(row), spec.of_row(last_row))]
        for spec in changed:
            _check_mergeable(spec)
            if spec.merged and not _is_finite(spec.of_row(last_row).view(spec.torch_dtype)):
                raise TrajectoryError(  # infinity was allowed until now
                    f"Tensor {spec.name!r} holds infinity up to step {last.step} and has other values now, so it "
                    "cannot be merged: pack the checkpoints from before this change, or those after it."
                )
        return [spec.name for spec in changed]

    @contextlib.contextmanager
    def _as_trajectory_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrajectoryError(f"Cannot write to {self.path}: {error.strerror or error}.") from error


def whole_step(step: int) -> int:
    """A step of a user's, perhaps one of NumPy's numbers, as Python's.

    Raises:
        TrajectoryError: it is not whole, negative, or too large to be stored.
    """
    number = operator.index(step) if hasattr(step, "__index__") else -1
    if not 0 <= number < 2**63:
        raise TrajectoryError(f"A step is a whole number from 0, not {step!r}.")
    return number


def row_sha256(row: Tensor) -> str:
    """The SHA-256 of a row ``[row_bytes]`` uint8, in hex, as a manifest has it."""
    return hashlib.sha256(row.numpy().data).hexdigest()


def _check_same_bytes(manifest: Manifest, step: int, sha256: str) -> None:
    """Refuse other weights for a step that is saved."""
    [saved] = [saved for saved in manifest.checkpoints if saved.step == step]
    if sha256 != saved.sha256:
        raise TrajectoryError(
            f"Step {step} is saved already, with other weights: open the writer with resume=STEP to "
            "continue training from an earlier step, or write the new run to another trajectory."
        )


def _check_numbers(
    row: Tensor, layout: Layout, step: int, *, varying: Collection[str], stored: str | None = None
) -> None:
    """Refuse NaN and infinity in the tensors that are merged, which are looked at together: most rows have none.

    Args:
        row: ``[row_bytes]`` uint8.
        layout: of the row.
        step: of the row.
        varying: the names of tensors that are not the same in all checkpoints, this one included.
        stored: what weights were rounded to; ``None`` if every bit was kept.
    """
    merged = [spec for spec in layout.tensors if spec.merged]
    for dtype, neighbours in itertools.groupby(merged, key=lambda spec: spec.torch_dtype):
        specs = list(neighbours)
        numbers = row[specs[0].offset : specs[-1].end].view(dtype)
        if not _is_finite(numbers):
            for spec in specs:
                _check_finite(spec.of_row(row), spec, step, stored, varies=spec.name in varying)


def _check_finite(content: Tensor, spec: TensorSpec, step: int, stored: str | None, *, varies: bool) -> None:
    """Refuse NaN and infinity in the bytes of a tensor.

    A constant may hold infinity, as a causal mask does, unless it was rounded: infinity may come from that.
    """
    numbers = content.view(spec.torch_dtype)
    if _is_finite(numbers):
        return
    if not varies and stored is None and not numbers.isnan().any():
        return
    rounded = ""
    if stored is not None:
        rounded = f" in {stored}"
    raise TrajectoryError(
        f"Tensor {spec.name!r} at step {step} holds NaN or infinity{rounded}: leave this checkpoint out."
    )


def _is_finite(values: Tensor) -> bool:
    """Whether numbers hold no NaN and no infinity."""
    if not len(values):
        return True
    least, most = torch.aminmax(values)  # NaN if there is one; thirty times faster than isfinite of all
    return math.isfinite(least.item()) and math.isfinite(most.item())


def _check_mergeable(spec: TensorSpec) -> None:
    """Refuse a tensor that changes between checkpoints and has no linear combinations; counters are copied."""
    is_matrix_of_integers = not spec.merged and len(spec.shape) > 1  # quantized weights
    if spec.dtype in UNMERGEABLE or is_matrix_of_integers:
        raise TrajectoryError(
            f"Tensor {spec.name!r} is {spec.dtype} and changes between checkpoints; only float64, float32, bfloat16 "
            "and float16 can be merged: save it as one of them, and quantized weights dequantized."
        )


def _load_manifest(path: Path) -> Manifest | None:
    """The manifest of a trajectory that is continued; ``None`` for a new one."""
    if (path / MANIFEST).exists():
        return Manifest.load(path)
    return None


def _make_and_lock(path: Path) -> Callable[[], None]:
    """Make the folder if it is new, and keep a second writer out of it.

    Returns:
        What lets the next writer in.
    """
    path.mkdir(parents=True, exist_ok=True)
    foreign = foreign_files(path)
    if foreign and not (path / MANIFEST).exists():
        raise TrajectoryError(f"{path} is not a trajectory, it holds {foreign[0]!r}: name a new folder.")
    lock = try_lock(path / LOCK)
    if lock is None:
        raise TrajectoryError(f"Another writer has {path} open: close it, or write from one process only (rank 0).")
    return lock.release
