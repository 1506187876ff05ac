"""Packing: checkpoints become rows of a trajectory, one after the other, from where a call stopped.

A thread reads and hashes the next checkpoint while this one is checked and written.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import ANOTHER_FOLDER, only_process, shown_size, sync
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints.averages import trainers_averages
from lcsc_opt.checkpoints.finding import is_packed
from lcsc_opt.checkpoints.reading import Checkpoint, read_checkpoint, searched_key
from lcsc_opt.checkpoints.watched import FileState
from lcsc_opt.checkpoints.weights import completed
from lcsc_opt.trajectory.layout import EXACT, Layout
from lcsc_opt.trajectory.manifest import PACKED, PREFIX, Manifest, foreign_files
from lcsc_opt.trajectory.matrix import MatrixWriter, row_sha256
from lcsc_opt.trajectory.neighbours import check_distinct, check_neighbours
from lcsc_opt.trajectory.side_data import check_alphas, side_data
from lcsc_opt.trajectory.sources import PackRequest, Sources
from lcsc_opt.trajectory.trajectory import Trajectory

COMMIT_SECONDS = 1.0  # from one commit to the next, at least: each waits for the disk


def made_once(out: Path, make: Callable[[], object]) -> Trajectory:
    """The packed trajectory ``out``, which ``make`` makes if it is not there. A second process waits for the first."""
    if not out.exists():
        with only_process(out, busy=f"another process packs the same checkpoints to {out}: waiting"):
            if not out.exists():  # another process may have made it meanwhile
                make()
    return Trajectory.open(out)


def pack_once(request: PackRequest, sources: Sources) -> Trajectory:
    """Pack these sources into the request's folder unless that is done.

    Raises:
        TrajectoryError: as :func:`pack_sources`.
    """
    out = request.path_of(sources)
    return made_once(out, functools.partial(pack_sources, request, sources, out))


def pack_sources(request: PackRequest, sources: Sources, out: Path) -> Trajectory:
    """Pack into ``out``, from where a call for the same sources stopped. No other process may do so meanwhile.

    The averages that the trainer kept itself of the last checkpoint's weights are packed, too. The
    trajectory grows in ``OUT.partial`` and gets its name when it is complete.

    Raises:
        TrajectoryError: a checkpoint cannot be read or does not fit the first one, two hold the same weights, they are
            of several runs (:func:`check_neighbours`), or the disk refuses.
    """
    partial = partial_path(out)
    fingerprint = request.fingerprint(sources)
    if partial.exists():
        if not is_trajectory(partial):
            raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
        if not _was_made_from(partial, fingerprint):
            shutil.rmtree(partial)
    if is_packed(partial):  # an interrupted call has chosen the key, checked the room and given the notice
        metadata = Manifest.load(partial).metadata
    else:
        metadata = {PACKED: fingerprint, **_first_metadata(request, sources, out)}
    key = metadata["key"]
    with contextlib.closing(MatrixWriter(partial, metadata=metadata, dtype=request.dtype or EXACT)) as writer:
        _write_rows(writer, sources, key, request.stored)
        _write_averages(writer, sources, key)
    try:
        manifest = Manifest.load(partial)
        check_alphas(manifest.layout, manifest.varying)
        if request.steps is None:  # who names the steps knows better
            check_distinct(manifest)
        check_neighbours(Trajectory.open(partial), steps_given=request.steps is not None)
    except TrajectoryError:
        shutil.rmtree(partial)  # the same checkpoints would be refused again
        raise
    finish_packing(out)
    return Trajectory.open(out)


def _first_metadata(request: PackRequest, sources: Sources, out: Path) -> dict[str, str]:
    """Say what is packed, and give the metadata of all rows, from the first checkpoint: key, :func:`side_data`, prefix.

    Raises:
        TrajectoryError: it cannot be read, or the disk has too little room for all.
    """
    paths = [*sources.values()]
    first = read_checkpoint(paths[0], key=request.key or searched_key(*paths))
    size = _check_room(out, first, len(paths), request.stored)
    notice(f"packing {len(paths)} checkpoints, once, into {out} ({shown_size(size)})")
    metadata = {"key": first.key, **side_data(paths, first)}
    if first.prefix:
        metadata[PREFIX] = first.prefix
    return metadata


def finish_packing(out: Path) -> None:
    """Give a trajectory that is complete its name.

    Raises:
        TrajectoryError: the disk refuses.
    """
    partial = partial_path(out)
    try:
        if out.exists():  # the user has asked to replace it
            shutil.rmtree(out)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise TrajectoryError(f"Cannot rename {partial} to {out}: {error.strerror}.") from error


def _check_room(out: Path, first: Checkpoint, rows: int, stored: str | None) -> int:
    """The bytes that a trajectory will have, from its first checkpoint.

    Raises:
        TrajectoryError: the disk does not have so much.
    """
    layout = Layout.of(first.tensors, stored)
    needed = layout.row_bytes * rows
    # folders that are not there yet are made when it is written
    existing_parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing_parent).free
    if needed > free:
        raise TrajectoryError(
            f"{out.parent}: {os.strerror(errno.ENOSPC)}: the trajectory needs {shown_size(needed)}, and "
            f"{shown_size(free)} are free; select fewer checkpoints, or {ANOTHER_FOLDER}"
        )
    return needed


def is_trajectory(path: Path) -> bool:
    """Whether ``path`` is a folder with nothing but a trajectory, complete or not."""
    return path.is_dir() and not foreign_files(path)


def partial_path(out: Path) -> Path:
    """Where a trajectory grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def _was_made_from(partial: Path, fingerprint: str) -> bool:
    """Whether a call for the same sources began this trajectory."""
    try:
        return Manifest.load(partial).metadata.get(PACKED) == fingerprint
    except TrajectoryError:  # it has no row yet, or is broken: nothing to continue
        return False


def _write_rows(writer: MatrixWriter, sources: Sources, key: str, stored: str | None) -> None:
    """Write the rows that are missing; they are committed in between, so that a killed process loses little.

    Args:
        writer: has the rows of the first sources, in their order, if an earlier call was interrupted.
        sources: all of them.
        key: which state dict of each.
        stored: what weights are rounded to; ``None`` keeps every bit.
    """
    written = len(writer.steps)
    missing = [*sources.items()][written:]
    committed_at = time.monotonic()
    try:
        with progress("pack", len(sources), done=written) as advance:
            rows = _read_ahead([path for _, path in missing], key, stored)
            for (step, path), row in zip(missing, rows, strict=True):
                try:
                    layout = writer.check(row.tensors)
                    writer.write(step, layout, row.content, source=_as_text(path), sha256=row.sha256)
                except TrajectoryError as error:
                    raise TrajectoryError(f"{path}: {error}") from error
                if time.monotonic() - committed_at > COMMIT_SECONDS:
                    writer.commit()
                    committed_at = time.monotonic()
                advance(note=f"step {step}")
    finally:
        writer.commit()  # whatever ended this: the next call goes on from here


def _as_text(path: Path) -> str:
    """A path as a manifest has it, in UTF-8: other bytes of a name become question marks."""
    return str(path.absolute()).encode(errors="replace").decode()


class Row(NamedTuple):
    """A checkpoint as it is mapped from its file; its bytes as a row, copied out of the file; and the row's hash."""

    tensors: Mapping[str, Tensor]
    content: Tensor
    sha256: str


def _read_ahead(paths: Sequence[Path], key: str, stored: str | None) -> Iterator[Row]:
    """The rows of checkpoints, each of which a thread has read and hashed while the one before was written.

    There is memory for two, so a row is valid until the next one is asked for. To hash takes as long as all else
    together, which is why there is a thread (``benchmarks/results/packing.md``).
    """
    if not paths:  # an earlier call has written all rows
        return
    memory: list[Tensor | None] = [None, None]

    def read(index: int) -> Row:
        row = read_row(paths[index], key, stored, memory=memory[index % 2])
        memory[index % 2] = row.content
        return row

    with ThreadPoolExecutor(1, "lcsc-read") as pool:
        reading = pool.submit(read, 0)
        for index in range(len(paths)):
            row = reading.result()
            if index + 1 < len(paths):
                reading = pool.submit(read, index + 1)
            yield row


def read_row(path: Path, key: str, stored: str | None, *, memory: Tensor | None = None) -> Row:
    """One checkpoint, copied out of its file.

    Args:
        path: of the checkpoint.
        key: which state dict of it.
        stored: what weights are rounded to; ``None`` keeps every bit.
        memory: of an earlier row, which is written over.

    Raises:
        TrajectoryError: it cannot be read, has no weights that can be stored, or was written over meanwhile.
    """
    file = FileState(path)
    tensors = read_checkpoint(path, key=key).tensors
    try:
        content = Layout.of(tensors, stored).row_of(tensors, memory=memory, copy=file.copy)
        file.check()
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from error
    return Row(tensors, content, row_sha256(content))


def _write_averages(writer: MatrixWriter, sources: Sources, key: str) -> None:
    """Write the trainer's own averages at the last step.

    One that cannot be used is left out, with a notice: only a report needs it.
    """
    *_, before_last, last = sources.values()
    try:
        kept = trainers_averages(last, key, before_last)
    except TrajectoryError as error:
        notice(f"{last}: the trainer's EMA is left out: {error}")
        return
    for sentence in kept.said:
        notice(sentence)
    written: list[str] = []
    for average, name in zip(kept.averages, kept.names, strict=True):
        try:
            file = FileState(average.path)
            weights = completed(average.tensors, read_checkpoint(last, key=key).tensors)
            layout = writer.layout_of_average(weights)
            row = layout.row_of(weights, copy=file.copy)
            file.check()
            writer.write_trainer_ema(layout, row, source=_as_text(average.path), name=name)
        except TrajectoryError as error:
            notice(f"{last}: the {name} is left out: {error}")
            continue
        written.append(f"{name}, {average.place}")
        writer.commit()
    # of a single one in the checkpoint the key was named with that of the weights
    if len(written) > 1 or any(average.path != last for average in kept.averages):
        notice(f"the report has a row for {' and for '.join(written)}")
