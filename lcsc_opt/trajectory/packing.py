"""Many checkpoint files → one packed trajectory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.errors import CheckpointError, TrajectoryError
from lcsc_opt.progress import progress
from lcsc_opt.trajectory.formats import checkpoint_step, read_checkpoint, read_metadata
from lcsc_opt.trajectory.manifest import MANIFEST, PENDING, WEIGHTS, load_manifest, sync_folder
from lcsc_opt.trajectory.store import Trajectory
from lcsc_opt.trajectory.writer import TrajectoryWriter

PLAN = "pack_sha256"  # the metadata entry that tells whether a partial was made from the same sources


@dataclasses.dataclass(frozen=True, order=True)
class _Source:
    step: int
    path: Path


def pack(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    key: str | None = None,
    overwrite: bool = False,
) -> Trajectory:
    """Pack checkpoint files into the trajectory ``out``, in the order of their steps.

    One checkpoint is in memory at a time. The work grows in ``OUT.partial`` and takes its name when it is
    complete; the same call after an interruption goes on where it stopped.

    Args:
        paths: K ≥ 2 files or folders that :func:`read_checkpoint` reads.
        out: the new folder, by convention ``NAME.trajectory``.
        steps: the training step of each path, ``[K]``; ``None`` takes them from metadata and names.
        key: which state dict of each file; ``None`` finds it in the first one and takes the same from all.
        overwrite: replace a trajectory that is at ``out``.

    Raises:
        CheckpointError: a file that cannot be read as weights, or does not tell its step.
        TrajectoryError: fewer than two checkpoints, a step twice, checkpoints of different models, or
            ``out`` is taken.
    """
    out = Path(out)
    _check_free(out, overwrite=overwrite)
    sources = _sort(paths, steps)
    partial = out.with_name(f"{out.name}.partial")
    fingerprint = _fingerprint(sources, key)
    _discard_other(partial, fingerprint)
    _fill(partial, sources, key, fingerprint)
    _rename(partial, out)
    return Trajectory.open(out)


def _sort(paths: Sequence[str | Path], steps: Sequence[int] | None) -> list[_Source]:
    if len(paths) < 2:
        raise TrajectoryError(f"A trajectory needs at least 2 checkpoints, got {len(paths)}: name more files.")
    if steps is None:
        steps = [checkpoint_step(path, read_metadata(path)) for path in paths]
    if len(steps) != len(paths):
        raise TrajectoryError(f"--steps: expected {len(paths)}, one for each checkpoint, got {len(steps)}.")
    sources = sorted(_Source(int(step), Path(path)) for step, path in zip(steps, paths, strict=True))
    for earlier, later in itertools.pairwise(sources):
        if earlier.step == later.step:
            raise TrajectoryError(f"Step {later.step} is there twice: {earlier.path} and {later.path}. Leave one out.")
    return sources


def _fingerprint(sources: list[_Source], key: str | None) -> str:
    described = [(source.step, *_identity(source.path)) for source in sources]
    return hashlib.sha256(json.dumps([described, key]).encode()).hexdigest()


def _identity(path: Path) -> tuple[str, int, int]:
    """Changes when the weights behind ``path`` do: a folder's files are looked at, too."""
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        status = [file.stat() for file in files if file.is_file()]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return (
        str(path.resolve()),
        sum(s.st_size for s in status),
        max((s.st_mtime_ns for s in status), default=0),
    )


def _fill(partial: Path, sources: list[_Source], key: str | None, fingerprint: str) -> None:
    first = read_checkpoint(sources[0].path, key=key)
    key = first.key
    del first
    metadata = {PLAN: fingerprint, "key": key}
    with TrajectoryWriter(partial, metadata=metadata) as writer:
        done = len(writer.steps)
        with progress("pack", len(sources), done=done) as advance:
            for source in sources[done:]:
                _append(writer, source, key)
                advance(note=f"step {source.step}")


def _append(writer: TrajectoryWriter, source: _Source, key: str) -> None:
    checkpoint = read_checkpoint(source.path, key=key)
    try:
        writer.append(source.step, checkpoint.tensors, source=str(source.path))
    except CheckpointError:
        raise
    except TrajectoryError as error:
        raise TrajectoryError(f"{source.path}: {error}") from error


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not _is_trajectory(out):
        raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
    if not overwrite:
        raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")


def _is_trajectory(path: Path) -> bool:
    ours = {MANIFEST, PENDING, WEIGHTS}
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= ours


def _discard_other(partial: Path, fingerprint: str) -> None:
    """Remove what an interrupted call with other sources left."""
    if not partial.exists():
        return
    if not _is_trajectory(partial):
        raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
    try:
        same = load_manifest(partial).metadata.get(PLAN) == fingerprint
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
