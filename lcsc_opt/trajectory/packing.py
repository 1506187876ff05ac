"""Many checkpoint files → one packed trajectory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process, size_in_words, sync_folder
from lcsc_opt.base.paths import another_folder
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints import Checkpoint, checkpoint_series, checkpoint_step, read_checkpoint
from lcsc_opt.checkpoints.finding import (
    Patterns,
    Selection,
    find_checkpoints,
    is_packed,
    several_series,
    steps_in_words,
)
from lcsc_opt.checkpoints.lora import alphas_metadata
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.disk.differences import StoredLayout
from lcsc_opt.trajectory.disk.layout import Layout, plan
from lcsc_opt.trajectory.disk.manifest import is_trajectory_file, load_manifest
from lcsc_opt.trajectory.disk.saving import EXACT, Saver, checked_dtype
from lcsc_opt.trajectory.reading_ahead import ReadAhead
from lcsc_opt.trajectory.store import Trajectory

PLAN = "pack_sha256"  # the metadata entry that tells whether a partial was made from the same sources
EVERYTHING = Selection()


@dataclasses.dataclass(frozen=True, order=True)
class Source:
    """One checkpoint that is not packed yet."""

    step: int
    path: Path


def pack(
    patterns: Patterns,
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    key: str | None = None,
    selection: Selection = EVERYTHING,
    overwrite: bool = False,
    dtype: str = EXACT,
) -> Trajectory:
    """Pack checkpoints into the trajectory ``out``, in the order of their steps.

    Steps are found and selected before any weights are read. One checkpoint is in memory at a time. The trajectory
    grows in ``OUT.partial`` and gets its name when it is complete. After an interruption, the same call continues where
    it stopped.

    Args:
        patterns: files, globs or folders, as :func:`find_checkpoints` takes them.
        out: the new folder, by convention ``NAME.trajectory``.
        steps: the training step of each checkpoint that is found, ``[K]``; ``None`` takes them from metadata, names
            and contents.
        key: which state dict of each file; ``None`` finds it in the first one and takes the same from all.
        selection: which checkpoints to take.
        overwrite: replace a trajectory at ``out``.
        dtype: ``exact`` stores the weights. ``float16``, ``bfloat16`` and ``int8`` store, in that dtype, differences
            from the checkpoint in the middle. Their error in merged weights is measured, and kept in the manifest.

    Raises:
        TrajectoryError: a file cannot be read as weights, or does not tell its step; fewer than two checkpoints, a step
            twice, checkpoints of different models, too little disk space, ``out`` exists, or another process packs to
            it.
    """
    checked_dtype(dtype)
    out = Path(out)
    _check_free(out, overwrite=overwrite)
    sources = selected(find_sources(find_checkpoints(patterns, key=key), steps), selection)

    def busy() -> None:
        raise TrajectoryError(f"Another process packs to {out}: wait until it is done.")

    with only_process(out, busy=busy):
        return pack_sources(sources, out, key, fingerprint(sources, key, dtype), dtype)


def find_sources(paths: Sequence[Path], steps: Sequence[int] | None = None) -> list[Source]:
    """The checkpoints with their steps, in the order of the steps. No weights are read.

    Raises:
        TrajectoryError: a checkpoint does not tell its step, another number of steps than of checkpoints, or a step
            twice.
    """
    if steps is None:
        steps = [checkpoint_step(path) for path in paths]
    if len(steps) != len(paths):
        raise TrajectoryError(f"--steps: expected {len(paths)}, one for each checkpoint, got {len(steps)}.")
    sources = sorted(Source(int(step), path) for step, path in zip(steps, paths, strict=True))
    for earlier, later in itertools.pairwise(sources):
        if earlier.step == later.step:
            raise _twice(earlier, later, paths)
    return sources


def _twice(earlier: Source, later: Source, paths: Sequence[Path]) -> TrajectoryError:
    message = f"Step {later.step} is there twice: {earlier.path} and {later.path}."
    if checkpoint_series(earlier.path) != checkpoint_series(later.path):
        return TrajectoryError(f"{message} {several_series('The list', paths)}")
    return TrajectoryError(f"{message} Leave one out.")


def selected(sources: list[Source], selection: Selection) -> list[Source]:
    """The sources that ``selection`` takes; a notice says which.

    Raises:
        TrajectoryError: fewer than two are left.
    """
    steps = [source.step for source in sources]
    chosen = [sources[position] for position in selection.choose(steps)]
    if selection.given:
        notice(f"of {len(sources)} checkpoints, selected {_described([one.step for one in chosen])}")
    return chosen


def _described(steps: Sequence[int]) -> str:
    intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
    least, most = min(intervals), max(intervals)
    return f"{steps_in_words(steps)}, {least if least == most else f'{least} to {most}'} apart"


def fingerprint(sources: Sequence[Source], key: str | None, dtype: str = EXACT) -> str:
    """SHA-256, in hex, of the paths, sizes, times and steps of the checkpoints, the key and the dtype."""
    described = [(source.step, *_identity(source.path)) for source in sources]
    stored = [] if dtype == EXACT else [dtype]
    return hashlib.sha256(json.dumps([described, key, *stored]).encode()).hexdigest()


def _identity(path: Path) -> tuple[str, int, int]:
    """A value that changes when the weights at ``path`` change, also the files in a folder."""
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        status = [file.stat() for file in files if file.is_file()]
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    return (
        str(path.resolve()),
        sum(s.st_size for s in status),
        max((s.st_mtime_ns for s in status), default=0),
    )


def pack_sources(sources: list[Source], out: Path, key: str | None, identity: str, dtype: str) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``identity`` stopped. No other process may do so meanwhile."""
    partial = partial_of(out)
    _discard_other(partial, identity)
    _fill(out, sources, key, identity, dtype)
    _rename(partial, out)
    return Trajectory.open(out)


def partial_of(out: Path) -> Path:
    """Where a trajectory grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def _fill(out: Path, sources: list[Source], key: str | None, identity: str, dtype: str) -> None:
    partial = partial_of(out)
    reference: dict[str, Tensor] | None = None
    first: Checkpoint | None = None
    metadata: dict[str, str] = {}
    if is_packed(partial):
        key = load_manifest(partial).metadata["key"]
    else:
        first = read_checkpoint(sources[0].path, key=key)
        key = first.key
        if dtype != EXACT:
            reference = read_checkpoint(sources[len(sources) // 2].path, key=key).tensors
        check_room(out, first, len(sources), dtype)
        metadata = alphas_metadata(first.tensors, sources[-1].path, key)
    texts = {PLAN: identity, "key": key, **metadata}
    saver = Saver(partial, metadata=texts, dtype=dtype, reference=reference)
    with contextlib.closing(saver), Committing(saver) as committing:
        done = len(saver.steps)
        with progress("pack", len(sources), done=done) as advance, ReadAhead() as ahead:
            for source, following in itertools.zip_longest(sources[done:], sources[done + 1 :]):
                start = time.monotonic()
                checkpoint = first or read_checkpoint(source.path, key=key)
                first = None  # frees its memory for the next one
                if following is not None:
                    ahead.begin(following.path, like=source.path, used=_size(checkpoint))
                size = _write(saver, source, checkpoint)
                committing.begin()
                if following is None:
                    committing.finish()  # before the progress bar says that all is done
                advance(note=f"step {source.step}, {size / max(time.monotonic() - start, 1e-6) / 1e6:.0f} MB/s")
        saver.measure()


def _needed(layout: Layout, checkpoints: int, dtype: str) -> int:
    """Bytes that the trajectory takes on the disk."""
    if dtype == EXACT:
        return layout.row_bytes * checkpoints
    return StoredLayout(layout, dtype).row_bytes * checkpoints + layout.row_bytes


class Committing:
    """Syncs rows to the disk while later rows are read and written; on a slow disk, several rows at once."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._background = Background("lcsc-commit")

    def __enter__(self) -> Committing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = isinstance(error, TrajectoryError)  # perhaps a sync failed: keep the manifest as it is
        with contextlib.suppress(TrajectoryError):  # the first error says more
            self._background.finish() if refused else self.finish()

    def begin(self) -> None:
        """Commit the written rows, unless a commit is running."""
        if not self._background.running:
            self._background.start(self._saver.commit)

    def finish(self) -> None:
        """Commit the written rows, and wait for it."""
        self._background.finish()
        self._saver.commit()


def _write(saver: Saver, source: Source, checkpoint: Checkpoint) -> int:
    """Write one checkpoint; gives its size in bytes."""
    try:
        layout = saver.check(checkpoint.tensors)
        saver.write(source.step, layout, checkpoint.tensors, source=str(source.path.absolute()))
    except TrajectoryError as error:
        if str(source.path) in str(error):
            raise
        raise TrajectoryError(f"{source.path}: {error}") from error
    return _size(checkpoint)


def _size(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def check_room(out: Path, first: Checkpoint, checkpoints: int, dtype: str) -> None:
    """Say how much of the disk a trajectory takes, from its first checkpoint; nothing is written.

    Raises:
        TrajectoryError: the disk is too small.
    """
    needed = _needed(plan(first.tensors), checkpoints, dtype)
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise TrajectoryError(
            f"{out.parent}: {os.strerror(errno.ENOSPC)}: the trajectory takes {size_in_words(needed)}, and "
            f"{size_in_words(free)} are free; select fewer checkpoints, or {another_folder(out)} on another disk"
        )
    notice(f"{checkpoints} checkpoints are packed once, to {out}, which takes {size_in_words(needed)} of its disk")


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not _is_trajectory(out):
        raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
    if not overwrite:
        raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")


def _is_trajectory(path: Path) -> bool:
    return path.is_dir() and all(is_trajectory_file(entry.name) for entry in path.iterdir())


def _discard_other(partial: Path, identity: str) -> None:
    """Remove the leftovers of an interrupted call with other sources."""
    if not partial.exists():
        return
    if not _is_trajectory(partial):
        raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
    try:
        same = load_manifest(partial).metadata.get(PLAN) == identity
    except TrajectoryError:
        same = False
    if not same:
        shutil.rmtree(partial)


def _rename(partial: Path, out: Path) -> None:
    try:
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise TrajectoryError(f"Cannot rename {partial} to {out}: {error.strerror}.") from error
