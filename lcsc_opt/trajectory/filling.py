"""Packing: checkpoints are read one after the other and written as rows of a trajectory, from where a call stopped."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import ANOTHER_FOLDER, sync_folder
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints.finding import is_packed
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_checkpoint
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.layout import Layout, stored_dtype
from lcsc_opt.trajectory.manifest import Manifest, foreign_files
from lcsc_opt.trajectory.matrix import MatrixWriter
from lcsc_opt.trajectory.sources import Sources
from lcsc_opt.trajectory.trajectory import Trajectory

_PLAN = "pack_sha256"  # the metadata entry that tells from which sources a trajectory was made


def pack_sources(sources: Sources, out: Path, *, key: str | None, dtype: str, fingerprint: str) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``fingerprint`` stopped.

    The trajectory grows in ``OUT.partial`` and gets its name when it is complete. No other process may pack to ``out``
    meanwhile.

    Raises:
        TrajectoryError: a checkpoint cannot be read or does not fit the first one, or the disk refuses.
    """
    partial = partial_path(out)
    if partial.exists():
        if not is_trajectory(partial):
            raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
        if not _was_made_from(partial, fingerprint):
            shutil.rmtree(partial)
    if is_packed(partial):
        reader = _Reader(Manifest.load(partial).metadata["key"])
        alphas = None  # they are in the metadata already
    else:
        reader, alphas = _begin(out, sources, key, dtype)
    metadata = {_PLAN: fingerprint, "key": reader.key}
    if alphas is not None:
        metadata[PACKED_ALPHAS] = alphas.model_dump_json(exclude_unset=True)
    with contextlib.closing(MatrixWriter(partial, metadata=metadata, dtype=dtype)) as writer:
        _write_rows(writer, sources, reader)
    finish_packing(out)
    return Trajectory.open(out)


def finish_packing(out: Path) -> None:
    """Give a trajectory that is complete its name.

    Raises:
        TrajectoryError: the disk refuses.
    """
    partial = partial_path(out)
    try:
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise TrajectoryError(f"Cannot rename {partial} to {out}: {error.strerror}.") from error


def check_room(out: Path, first: Checkpoint, checkpoints: int, dtype: str) -> None:
    """Say how large a trajectory will be, from its first checkpoint, or refuse; nothing is written.

    Raises:
        TrajectoryError: the disk does not have so much.
    """
    needed = Layout.of(first.tensors, stored_dtype(dtype)).row_bytes * checkpoints
    existing_parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing_parent).free
    size = tqdm.format_sizeof(needed, "B")
    if needed > free:
        raise TrajectoryError(
            f"{out.parent}: {os.strerror(errno.ENOSPC)}: the trajectory needs {size}, and "
            f"{tqdm.format_sizeof(free, 'B')} are free; select fewer checkpoints, or {ANOTHER_FOLDER}"
        )
    notice(f"packing {checkpoints} checkpoints, once, into {out} ({size})")


def is_trajectory(path: Path) -> bool:
    """Whether ``path`` is a folder with nothing but a trajectory, complete or not."""
    return path.is_dir() and not foreign_files(path)


def partial_path(out: Path) -> Path:
    """Where a trajectory grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def _was_made_from(partial: Path, fingerprint: str) -> bool:
    try:
        return Manifest.load(partial).metadata.get(_PLAN) == fingerprint
    except TrajectoryError:  # without a row, or broken
        return False


def _begin(out: Path, sources: Sources, key: str | None, dtype: str) -> tuple[_Reader, LoraAlphas | None]:
    """Read the first checkpoint, and refuse if there is no room for all. Gives it to a reader, for the first row."""
    paths = list(sources.values())
    first = read_checkpoint(paths[0], key=key)
    check_room(out, first, len(sources), dtype)
    return _Reader(first.key, first), _lora_alphas(first, paths[-1])


def _lora_alphas(first: Checkpoint, last: Path) -> LoraAlphas | None:
    """The alphas of LoRA checkpoints, which PEFT writes next to the weights."""
    with contextlib.suppress(TrajectoryError):  # the error comes when the alphas are needed
        if lora_flavour(first.tensors):
            return LoraAlphas.read(last, key=first.key)
    return None


class _Reader:
    """Reads the state dict ``key`` of checkpoints, in order; ``first`` is the first one if it was read already."""

    def __init__(self, key: str, first: Checkpoint | None = None) -> None:
        self.key = key
        self._first = first

    def read(self, path: Path) -> Checkpoint:
        checkpoint = self._first
        self._first = None  # frees its memory for the next one
        if checkpoint is None:
            return read_checkpoint(path, key=self.key)
        return checkpoint


def _write_rows(writer: MatrixWriter, sources: Sources, reader: _Reader) -> None:
    """Write the rows that are missing, and sync them to the disk while later ones are read and written."""
    committing = Background("lcsc-commit")
    done = len(writer.steps)
    last_step = list(sources)[-1]
    try:
        with progress("pack", len(sources), done=done) as advance:
            for step, path in list(sources.items())[done:]:
                _write_row(writer, step, path, reader.read(path))
                if not committing.running:
                    committing.start(writer.commit)
                if step == last_step:
                    committing.finish()
                    writer.commit()  # before the progress bar says that all is done
                advance(note=f"step {step}")
    except BaseException as error:
        with contextlib.suppress(TrajectoryError):  # the first error says more
            committing.finish()
            if not isinstance(error, TrajectoryError):  # else a sync may have failed: what the disk has counts
                writer.commit()
        raise


def _write_row(writer: MatrixWriter, step: int, path: Path, checkpoint: Checkpoint) -> None:
    try:
        layout = writer.check(checkpoint.tensors)
        writer.write(step, layout, checkpoint.tensors, source=str(path.absolute()))
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from error
