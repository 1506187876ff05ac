"""Saving checkpoints into a packed trajectory while a model trains."""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.trajectory.differences import STORED, ErrorSample
from lcsc_opt.trajectory.formats import strip_wrappers
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
        dtype: ``exact`` keeps every bit of the weights. ``float16``, ``bfloat16`` and ``int8`` store differences from a
            reference checkpoint in that dtype; :meth:`measure` tells what this does. ``None`` goes on as the
            trajectory began, or is ``exact``.
        reference: the checkpoint that differences are taken from, best one from the middle; ``None`` takes the first
            one appended.

    Raises:
        TrajectoryError: the dtype is none of these, or the trajectory began with another; the folder holds something
            else, cannot be written, or another process writes to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        window: int | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path = Path(path)
        self._every = _at_least_one("every", every)
        self._window = None if window is None else _at_least_one("window", window)
        self._metadata = _checked_metadata(metadata or {})
        self._dtype, self._reference = _checked_dtype(dtype), reference
        self._coder: Coder | None = None
        self._sample: ErrorSample | None = None
        with _as_trajectory_error(self.path):
            self._weights = _open_weights(self.path)
        self._close = weakref.finalize(self, os.close, self._weights)
        self._commits = InOrder("lcsc-commit")
        try:
            self._manifest = _continued(self.path)
            self._check_dtype()
        except TrajectoryError:
            self.close()
            raise
        self._committed = self._manifest  # what the disk is known to have
        self._in_doubt = False

    def __enter__(self) -> TrajectoryWriter:
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
        """The steps that were appended and are kept, in order."""
        manifest = self._current()
        return () if manifest is None else tuple(saved.step for saved in manifest.checkpoints)

    def measure(self) -> float | None:
        """What storing differences does to merged weights, and note it in the manifest.

        The relative error, root mean square, of random combinations of the size that searches find (Σ|a| near 5) of the
        checkpoints that this writer appended, on some thousands of their weights.

        Returns:
            It; ``None`` where rows are exact or fewer than two checkpoints were appended.
        """
        error = None if self._sample is None else self._sample.relative_error()
        if error is None:
            return None
        with _as_trajectory_error(self.path):
            self.flush()
            manifest = self._current()
            if manifest is not None:
                metadata = {**manifest.metadata, RELATIVE_ERROR: f"{error:.3g}"}
                self._manifest = manifest.model_copy(update={"metadata": metadata})
                self._commit(self._manifest)
        return error

    def close(self) -> None:
        """Wait as :meth:`flush` does, then let another process write."""
        try:
            self.flush()
        finally:
            self._commits.close()
            self._close()

    def flush(self) -> None:
        """Wait until everything appended is on the disk.

        Raises:
            TrajectoryError: the disk refused a checkpoint that was appended without waiting; it is not saved.
        """
        with _as_trajectory_error(self.path):
            self._commits.finish()

    def append(
        self, step: int, weights: Mapping[str, Tensor] | nn.Module, *, source: str = "", wait: bool = True
    ) -> bool:
        """Save ``weights`` as the checkpoint of training iteration ``step``.

        Args:
            step: larger than every saved step; or a saved step again with the same bytes, which changes
                nothing, so that resumed training may come by a second time.
            weights: a state dict or a module (prefixes that DataParallel or ``torch.compile`` put are left
                out); on any device, contiguous or not, with or without gradients.
            source: where the checkpoint came from, as it is noted in the manifest.
            wait: until it is on the disk. Without, the system has all its bytes when this returns, and the disk is
                waited for while the next checkpoint is made; :meth:`flush` tells when it is there.

        Returns:
            Whether a checkpoint was written: False when ``step`` is not a multiple of ``every``, or is
            saved already.

        Raises:
            TrajectoryError: names, shapes or dtypes differ from the first checkpoint's; a weight is not
                finite; the step is not larger than the last one; or the disk refuses this checkpoint, or the one
                before it, if that was not waited for. What was saved before stays as it was.
        """
        step = _whole(step)
        if step % self._every:
            return False
        if not self._close.alive:
            raise TrajectoryError(f"The writer of {self.path} is closed: open a new one to append step {step}.")
        tensors = _named_tensors(weights)
        with _as_trajectory_error(self.path):
            return self._append(step, tensors, source, wait=wait)

    def _append(self, step: int, tensors: Mapping[str, Tensor], source: str, *, wait: bool) -> bool:
        if wait or self._window is not None:
            self.flush()  # in a window, the row that is free is so only when the manifest on the disk leaves it out
        manifest = self._current()
        layout = plan(tensors) if manifest is None else manifest.layout
        check_same(layout, tensors)
        coder = self._coder or self._begun(manifest, layout, tensors)
        if manifest is not None and not _is_next(manifest, step, tensors, coder):
            return False
        slot = _free_slot(manifest)
        row = self._write(slot, coder, tensors, step, manifest, sync=wait)
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
        tensors: Mapping[str, Tensor],
        step: int,
        manifest: Manifest | None,
        *,
        sync: bool,
    ) -> RowHashes:
        hashes = RowHashes(f"step {step}", frozenset() if manifest is None else frozenset(manifest.varying))
        digests = {} if manifest is None else manifest.digests
        write_row(self._weights, coder, tensors, hashes, digests, slot=slot, sync=sync, sample=self._sample)
        return hashes

    def _begun(self, manifest: Manifest | None, layout: Layout, tensors: Mapping[str, Tensor]) -> Coder:
        """How rows are made, decided by the trajectory, or by its first checkpoint."""
        if manifest is not None:
            self._coder = open_coder(self.path, manifest)
        elif self._dtype in (None, EXACT):
            self._coder = ExactCoder(layout)
        else:
            reference = tensors if self._reference is None else self._reference
            check_same(layout, reference)
            self._coder = new_difference_coder(self.path, layout, str(self._dtype), reference)
        self._reference = None  # it is on the disk
        self._sample = None if isinstance(self._coder, ExactCoder) else ErrorSample(layout)
        return self._coder

    def _check_dtype(self) -> None:
        there = None if self._manifest is None else self._manifest.stored or EXACT
        if there is not None and self._dtype not in (None, there):
            raise TrajectoryError(f"{self.path} stores {there}, not {self._dtype}: leave the dtype out, or begin anew.")


def _is_next(manifest: Manifest, step: int, tensors: Mapping[str, Tensor], coder: Coder) -> bool:
    """Whether ``step`` comes after all saved ones; False when it is saved with the same bytes."""
    last = max((saved.step for saved in manifest.checkpoints), default=-1)
    if step > last:
        return True
    same_step = [saved for saved in manifest.checkpoints if saved.step == step]
    if not same_step:
        raise TrajectoryError(f"Step {step} comes after step {last}; steps have to increase.")
    if row_sha256(coder, tensors) != same_step[0].sha256:
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


def _checked_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in (EXACT, *STORED):
        raise TrajectoryError(f"dtype: expected {EXACT}, {', '.join(STORED)}, got {dtype!r}.")
    return dtype


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TrajectoryError(f"metadata[{name!r}]: names and values have to be text, got {text!r}.")
    return dict(metadata)
