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
from collections.abc import Sequence
from pathlib import Path

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
from lcsc_opt.trajectory.layout import EXACT, plan
from lcsc_opt.trajectory.manifest import is_trajectory_file, load_manifest
from lcsc_opt.trajectory.matrix import MatrixWriter, checked_dtype
from lcsc_opt.trajectory.trajectory import Trajectory

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
        dtype: ``exact`` stores every bit; ``float16`` and ``bfloat16`` round floating-point weights.

    Raises:
        TrajectoryError: a file cannot be read as weights, or does not tell its step; fewer than two checkpoints, a step
            twice, checkpoints of different models, too little disk space, ``out`` exists, or another process packs to
            it.
    """
    checked_dtype(dtype)
    out = Path(out)
    if out.exists() and not _is_trajectory(out):
        raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
    if out.exists() and not overwrite:
        raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")
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
            alike = checkpoint_series(earlier.path) == checkpoint_series(later.path)
            advice = "Leave one out." if alike else several_series("The list", paths)
            raise TrajectoryError(f"Step {later.step} is there twice: {earlier.path} and {later.path}. {advice}")
    return sources


def selected(sources: list[Source], selection: Selection) -> list[Source]:
    """The sources that ``selection`` takes; a notice says which.

    Raises:
        TrajectoryError: fewer than two are left.
    """
    chosen = [sources[position] for position in selection.choose([source.step for source in sources])]
    if selection.given:
        steps = [source.step for source in chosen]
        intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
        apart = " to ".join(str(interval) for interval in sorted({min(intervals), max(intervals)}))
        notice(f"of {len(sources)} checkpoints, selected {steps_in_words(steps)}, {apart} apart")
    return chosen


def fingerprint(sources: Sequence[Source], key: str | None, dtype: str = EXACT) -> str:
    """SHA-256, in hex, of the paths, sizes, times and steps of the checkpoints, the key and the dtype."""
    described = []
    for source in sources:
        try:
            files = [source.path, *source.path.rglob("*")] if source.path.is_dir() else [source.path]
            status = [file.stat() for file in files if file.is_file()]
        except OSError as error:
            raise TrajectoryError(f"{source.path} cannot be read: {error.strerror}.") from error
        newest = max((s.st_mtime_ns for s in status), default=0)
        described.append((source.step, str(source.path.resolve()), sum(s.st_size for s in status), newest))
    stored = [] if dtype == EXACT else [dtype]
    return hashlib.sha256(json.dumps([described, key, *stored]).encode()).hexdigest()


def partial_of(out: Path) -> Path:
    """Where a trajectory grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def pack_sources(sources: list[Source], out: Path, key: str | None, identity: str, dtype: str) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``identity`` stopped. No other process may do so meanwhile."""
    partial = partial_of(out)
    if partial.exists():
        if not _is_trajectory(partial):
            raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
        same = False
        with contextlib.suppress(TrajectoryError):
            same = load_manifest(partial).metadata.get(PLAN) == identity
        if not same:  # what an interrupted call with other sources left
            shutil.rmtree(partial)
    _fill(out, sources, key, identity, dtype)
    try:
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise TrajectoryError(f"Cannot rename {partial} to {out}: {error.strerror}.") from error
    return Trajectory.open(out)


def _fill(out: Path, sources: list[Source], key: str | None, identity: str, dtype: str) -> None:
    """Write rows, and sync them to the disk while later ones are read and written."""
    partial = partial_of(out)
    first: Checkpoint | None = None
    metadata: dict[str, str] = {}
    if is_packed(partial):
        key = load_manifest(partial).metadata["key"]
    else:
        first = read_checkpoint(sources[0].path, key=key)
        key = first.key
        check_room(out, first, len(sources), dtype)
        metadata = alphas_metadata(first.tensors, sources[-1].path, key)
    texts, committing = {PLAN: identity, "key": key, **metadata}, Background("lcsc-commit")
    with contextlib.closing(MatrixWriter(partial, metadata=texts, dtype=dtype)) as writer:
        done = len(writer.steps)
        try:
            with progress("pack", len(sources), done=done) as advance:
                for source in sources[done:]:
                    checkpoint = first or read_checkpoint(source.path, key=key)
                    first = None  # frees its memory for the next one
                    try:
                        layout = writer.check(checkpoint.tensors)
                        writer.write(source.step, layout, checkpoint.tensors, source=str(source.path.absolute()))
                    except TrajectoryError as error:
                        raise TrajectoryError(f"{source.path}: {error}") from error
                    if not committing.running:
                        committing.start(writer.commit)
                    if source is sources[-1]:
                        committing.finish()
                        writer.commit()  # before the progress bar says that all is done
                    advance(note=f"step {source.step}")
        except BaseException as error:
            with contextlib.suppress(TrajectoryError):  # the first error says more
                committing.finish()
                if not isinstance(error, TrajectoryError):  # else a sync may have failed: what the disk has counts
                    writer.commit()
            raise


def check_room(out: Path, first: Checkpoint, checkpoints: int, dtype: str) -> None:
    """Say how much of the disk a trajectory takes, from its first checkpoint; nothing is written.

    Raises:
        TrajectoryError: the disk is too small.
    """
    needed = plan(first.tensors, None if dtype == EXACT else dtype).row_bytes * checkpoints
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise TrajectoryError(
            f"{out.parent}: {os.strerror(errno.ENOSPC)}: the trajectory takes {size_in_words(needed)}, and "
            f"{size_in_words(free)} are free; select fewer checkpoints, or {another_folder(out)} on another disk"
        )
    notice(f"{checkpoints} checkpoints are packed once, to {out}, which takes {size_in_words(needed)} of its disk")


def _is_trajectory(path: Path) -> bool:
    return path.is_dir() and all(is_trajectory_file(entry.name) for entry in path.iterdir())
