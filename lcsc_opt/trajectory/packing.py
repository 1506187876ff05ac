"""Checkpoints as users name them → a packed trajectory: packed, or opened where it is packed already.

A study knows its checkpoints by their steps and their hash. When it continues, it gets exactly these again: from the
folder, which may have grown, or from the cache if the folder is gone.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import ANOTHER_FOLDER, only_process, sync_folder
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints import hub
from lcsc_opt.checkpoints.finding import (
    Patterns,
    Selection,
    checkpoint_step,
    find_checkpoints,
    is_packed,
)
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.names import checkpoint_series
from lcsc_opt.checkpoints.reading import Checkpoint, read_checkpoint
from lcsc_opt.trajectory.layout import EXACT, Layout, stored_dtype
from lcsc_opt.trajectory.manifest import Manifest, foreign_files
from lcsc_opt.trajectory.matrix import Background, MatrixWriter
from lcsc_opt.trajectory.trajectory import Trajectory

_PLAN = "pack_sha256"  # the metadata entry that tells from which sources a trajectory was made
_EVERYTHING = Selection()
_Sources = Mapping[int, Path]
"""Training step → checkpoint that is not packed yet, in the order of the steps."""


def pack(
    patterns: Patterns,
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    key: str | None = None,
    selection: Selection = _EVERYTHING,
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
    stored_dtype(dtype)
    out = Path(out)
    if out.exists() and not _is_trajectory(out):
        raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
    if out.exists() and not overwrite:
        raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")
    sources = _selected(find_sources(find_checkpoints(patterns, key=key), steps), selection)
    with only_process(out, busy=TrajectoryError(f"Another process packs to {out}: wait until it is done.")):
        return _pack(sources, out, key, _fingerprint(sources, key, dtype), dtype)


def open_or_pack(
    patterns: Patterns,
    *,
    cache: Path,
    key: str | None = None,
    selection: Selection = _EVERYTHING,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
) -> Trajectory:
    """Open a packed trajectory, or pack checkpoints once and open the result from then on.

    When a study continues (:meth:`lcsc_opt.base.paths.KnownCheckpoints.current`), its own trajectory is opened instead.

    Packed trajectories are in ``CACHE/trajectories``, under the hash of the sources' paths, sizes and times, their
    steps, the key and the dtype. They stay there until somebody deletes them. A second process that asks for the same
    waits for the first. After an interruption the next call continues where it stopped.

    Args:
        patterns: one packed trajectory, or what :func:`pack` takes.
        cache: the folder for files that can be made again.
        key: as for :func:`pack`; for a packed trajectory it must be the one it was packed with.
        selection: as for :func:`pack`; for a packed trajectory none, since its checkpoints were selected already.
        steps: as for :func:`pack`.
        dtype: as for :func:`pack`, ``None`` is ``exact``; for a packed trajectory it must be the one it stores.

    Raises:
        TrajectoryError: as :func:`pack`; or a packed trajectory does not take these options.
    """
    alone = [patterns] if isinstance(patterns, (str, Path)) else patterns
    if (known := KnownCheckpoints.current()) is not None:
        return _open_known(known, alone, cache, key, steps, dtype or EXACT, selection.last_step)
    if len(alone) == 1 and is_packed(Path(alone[0]).expanduser()):
        return _open_packed(Path(alone[0]).expanduser(), key, selection, steps, dtype)
    sources = _selected(find_sources(find_checkpoints(alone, key=key), steps), selection)
    return _packed_once(sources, cache, key, dtype or EXACT)


def check_checkpoints(
    patterns: Patterns, *, cache: Path, key: str | None, selection: Selection, dtype: str | None
) -> None:
    """Refuse what :func:`open_or_pack` would refuse before it packs; of weights only the first checkpoint's are read.

    Raises:
        TrajectoryError: as :func:`open_or_pack`.
    """
    alone = [patterns] if isinstance(patterns, (str, Path)) else patterns
    packed = len(alone) == 1 and is_packed(Path(alone[0]).expanduser())
    if (known := KnownCheckpoints.current()) is not None:
        there = packed or set(known.steps) <= _there_now(alone, key, None).keys()
        if not there and (known.moved or _in_cache(cache, known) is None):
            raise _not_there(alone, known)
        return
    if packed:
        _open_packed(Path(alone[0]).expanduser(), key, selection, None, dtype)
        return
    sources = _selected(find_sources(find_checkpoints(alone, key=key)), selection)
    out = _place(cache, _fingerprint(sources, key, dtype or EXACT))
    if not out.exists() and not is_packed(_partial(out)):
        _check_room(out, read_checkpoint(next(iter(sources.values())), key=key), len(sources), dtype or EXACT)


def find_sources(paths: Sequence[Path], steps: Sequence[int] | None = None) -> dict[int, Path]:
    """The checkpoints by their steps, in the order of the steps. No weights are read.

    Raises:
        TrajectoryError: a checkpoint does not tell its step, another number of steps than of checkpoints, or a step
            twice.
    """
    if steps is None:
        steps = [checkpoint_step(path) for path in paths]
    if len(steps) != len(paths):
        raise TrajectoryError(f"--steps: expected {len(paths)}, one for each checkpoint, got {len(steps)}.")
    sources: dict[int, Path] = {}
    for step, path in sorted(zip(map(int, steps), paths, strict=True)):
        if (earlier := sources.get(step)) is not None:
            alike = checkpoint_series(earlier) == checkpoint_series(path)
            advice = "Leave one out." if alike else "Name the files of one series."
            raise TrajectoryError(f"Step {step} is there twice: {earlier} and {path}. {advice}")
        sources[step] = path
    return sources


def _selected(sources: _Sources, selection: Selection) -> dict[int, Path]:
    """The sources that ``selection`` takes, two or more; a notice says which."""
    every = list(sources)
    steps = [every[position] for position in selection.choose(every)]
    if selection.given:
        intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
        apart = " to ".join(str(interval) for interval in sorted({min(intervals), max(intervals)}))
        notice(f"of {len(sources)} checkpoints, selected {len(steps)}: steps {steps[0]} to {steps[-1]}, {apart} apart")
    return {step: sources[step] for step in steps}


def _fingerprint(sources: _Sources, key: str | None, dtype: str) -> str:
    """SHA-256, in hex, of the paths, sizes, times and steps of the checkpoints, the key and the dtype."""
    described = []
    for step, path in sources.items():
        try:
            files = [] if hub.repository_of(path) else [path, *path.rglob("*")]
            status = [file.stat() for file in files if file.is_file()]
        except OSError as error:
            raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
        newest = max((s.st_mtime_ns for s in status), default=0)
        described.append((step, str(path.resolve()), sum(s.st_size for s in status), newest))
    stored = [] if dtype == EXACT else [dtype]
    return hashlib.sha256(json.dumps([described, key, *stored]).encode()).hexdigest()


def _pack(sources: _Sources, out: Path, key: str | None, identity: str, dtype: str) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``identity`` stopped. No other process may do so meanwhile."""
    partial = _partial(out)
    if partial.exists():
        if not _is_trajectory(partial):
            raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
        same = False
        with contextlib.suppress(TrajectoryError):
            same = Manifest.load(partial).metadata.get(_PLAN) == identity
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


def _fill(out: Path, sources: _Sources, key: str | None, identity: str, dtype: str) -> None:
    """Write rows, and sync them to the disk while later ones are read and written."""
    partial, paths = _partial(out), list(sources.values())
    first: Checkpoint | None = None
    metadata: dict[str, str] = {}
    if is_packed(partial):
        key = Manifest.load(partial).metadata["key"]
    else:
        first = read_checkpoint(paths[0], key=key)
        key = first.key
        _check_room(out, first, len(sources), dtype)
        with contextlib.suppress(TrajectoryError):  # the error comes when the alphas are needed
            if lora_flavour(first.tensors) and (alphas := LoraAlphas.read(paths[-1], key=key)):
                metadata = {PACKED_ALPHAS: alphas.model_dump_json(exclude_unset=True)}
    texts, committing = {_PLAN: identity, "key": key, **metadata}, Background("lcsc-commit")
    with contextlib.closing(MatrixWriter(partial, metadata=texts, dtype=dtype)) as writer:
        done = len(writer.steps)
        try:
            with progress("pack", len(sources), done=done) as advance:
                for step, path in list(sources.items())[done:]:
                    checkpoint = first or read_checkpoint(path, key=key)
                    first = None  # frees its memory for the next one
                    try:
                        layout = writer.check(checkpoint.tensors)
                        writer.write(step, layout, checkpoint.tensors, source=str(path.absolute()))
                    except TrajectoryError as error:
                        raise TrajectoryError(f"{path}: {error}") from error
                    if not committing.running:
                        committing.start(writer.commit)
                    if path is paths[-1]:
                        committing.finish()
                        writer.commit()  # before the progress bar says that all is done
                    advance(note=f"step {step}")
        except BaseException as error:
            with contextlib.suppress(TrajectoryError):  # the first error says more
                committing.finish()
                if not isinstance(error, TrajectoryError):  # else a sync may have failed: what the disk has counts
                    writer.commit()
            raise


def _check_room(out: Path, first: Checkpoint, checkpoints: int, dtype: str) -> None:
    """Say how much of the disk a trajectory takes, from its first checkpoint, or refuse; nothing is written."""
    needed = Layout.of(first.tensors, stored_dtype(dtype)).row_bytes * checkpoints
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    takes = f"takes {tqdm.format_sizeof(needed, 'B')}"
    if needed > free:
        raise TrajectoryError(
            f"{out.parent}: {os.strerror(errno.ENOSPC)}: the trajectory {takes}, and {tqdm.format_sizeof(free, 'B')} "
            f"are free; select fewer checkpoints, or {ANOTHER_FOLDER}"
        )
    notice(f"{checkpoints} checkpoints are packed once, to {out}, which {takes} of its disk")


def _is_trajectory(path: Path) -> bool:
    return path.is_dir() and not foreign_files(path)


def _partial(out: Path) -> Path:
    """Where a trajectory grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def _place(cache: Path, identity: str) -> Path:
    return cache / "trajectories" / f"{identity[:24]}.trajectory"


def _packed_once(sources: _Sources, cache: Path, key: str | None, dtype: str) -> Trajectory:
    identity = _fingerprint(sources, key, dtype)
    out = _place(cache, identity)
    if not out.exists():
        with only_process(out, busy=f"another process packs the same checkpoints to {out}: waiting"):
            if not out.exists():  # another process may have made it meanwhile
                return _pack(sources, out, key, identity, dtype)
    return Trajectory.open(out)


def _open_packed(
    path: Path, key: str | None, selection: Selection, steps: Sequence[int] | None, dtype: str | None
) -> Trajectory:
    trajectory = Trajectory.open(path)
    packed, there = trajectory.metadata.get("key", ""), trajectory.stored or EXACT
    if asked := [*selection.given, *(["steps"] if steps is not None else [])]:
        left_out = ", ".join(asked)
        raise TrajectoryError(f"{path} is packed: leave out {left_out}, or name the checkpoints it was made from.")
    if key not in (None, packed):
        raise TrajectoryError(f"{path} was packed with the key {packed!r}, not {key!r}: leave it out, or pack again.")
    if dtype not in (None, there):
        raise TrajectoryError(f"{path} stores {there}, not {dtype}: leave {dtype} out, or pack again.")
    return trajectory


def _open_known(
    known: KnownCheckpoints,
    patterns: Sequence[str | Path],
    cache: Path,
    key: str | None,
    steps: Sequence[int] | None,
    dtype: str,
    last_step: int | None,
) -> Trajectory:
    """Exactly the checkpoints that a study knows: from its packed trajectory or the cache, else packed again."""
    if known.packed is not None and (found := Trajectory.holding(known.packed, known)) is not None:
        return found
    alone = Path(patterns[0]).expanduser() if len(patterns) == 1 else None
    if alone is not None and is_packed(alone) and (found := Trajectory.holding(alone, known)) is not None:
        same = Manifest.load(alone).checkpoints[-1].step == known.steps[-1]
    else:
        sources = _there_now(patterns, key, steps)
        own = {step: path for step, path in sources.items() if step in known.steps}
        found = None if known.moved else _in_cache(cache, known)
        if found is None and len(own) == len(known.steps):
            found = _packed_once(own, cache, key, dtype)
        if found is None or found.sha256 != known.sha256:
            raise _not_there(patterns, known)
        packed = _place(cache, _fingerprint(own, key, dtype))
        last = max((step for step in sources if last_step is None or step <= last_step), default=-1)
        same = last == known.steps[-1] and Trajectory.holding(packed, known) is not None
    if not same:
        named = ", ".join(map(str, patterns))
        notice(
            f"{named}: holds other checkpoints now, or none, and the study goes on with its own {len(known.steps)}; to "
            f"begin on those there: lcsc fork STUDY NAME --checkpoints {named}"
        )
    return found


def _not_there(patterns: Sequence[str | Path], known: KnownCheckpoints) -> TrajectoryError:
    named = ", ".join(map(str, patterns))
    begun_with = f"the {len(known.steps)} checkpoints that the study was begun with"
    span = f"(steps {known.steps[0]} to {known.steps[-1]})"
    there = any(glob.has_magic(str(pattern)) or Path(pattern).expanduser().exists() for pattern in patterns)
    found = f"does not hold {begun_with} {span}, or not with these weights" if there else f"is gone, with {begun_with}"
    return TrajectoryError(
        f"{named}: {found}, and the cache has no packed copy of them: put them back, or say where they are now (lcsc "
        "run FILE objective.settings.checkpoints=PLACE), or give the study another name"
    )


def _there_now(patterns: Sequence[str | Path], key: str | None, steps: Sequence[int] | None) -> dict[int, Path]:
    """The sources that exist now; empty if they are gone or no longer form a trajectory."""
    try:
        return find_sources(find_checkpoints(patterns, key=key), steps)
    except TrajectoryError:
        return {}


def _in_cache(cache: Path, known: KnownCheckpoints) -> Trajectory | None:
    """The known checkpoints in the cache, from whatever files they were packed."""
    folders = sorted(path for path in (cache / "trajectories").glob("*.trajectory") if is_packed(path))
    return next(filter(None, (Trajectory.holding(path, known) for path in folders)), None)
