"""Packing: checkpoints are read one after the other and written as rows of a trajectory, from where a call stopped."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import ANOTHER_FOLDER, shown_size, sync_folder
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints.finding import is_packed
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import (
    Checkpoint,
    average_beside,
    read_checkpoint,
    read_metadata,
    searched_key,
)
from lcsc_opt.checkpoints.weights import completed
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.layout import Layout, stored_dtype
from lcsc_opt.trajectory.manifest import HEADER, PACKED, PREFIX, Manifest, foreign_files
from lcsc_opt.trajectory.matrix import MatrixWriter
from lcsc_opt.trajectory.merge import StateDict
from lcsc_opt.trajectory.neighbours import check_neighbours
from lcsc_opt.trajectory.sources import Sources
from lcsc_opt.trajectory.trajectory import Trajectory


def pack_sources(
    sources: Sources,
    out: Path,
    *,
    key: str | None,
    dtype: str,
    fingerprint: str,
    packed: Trajectory | None = None,
    steps_given: bool = False,
) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``fingerprint`` stopped.

    Checkpoints that are in a trajectory already are read from ``packed``. If the trainer kept an average of its own
    beside the weights of the last checkpoint, it is packed, too.

    The trajectory grows in ``OUT.partial`` and gets its name when it is complete. No other process may pack to ``out``
    meanwhile.

    Raises:
        TrajectoryError: a checkpoint cannot be read or does not fit the first one, they are of several runs
            (:func:`check_neighbours`), or the disk refuses.
    """
    partial = partial_path(out)
    *_, (_, before_last), (last_step, last_path) = sources.items()
    if partial.exists():
        if not is_trajectory(partial):
            raise TrajectoryError(f"{partial} is in the way and is not a trajectory: move it away.")
        if not _was_made_from(partial, fingerprint):
            shutil.rmtree(partial)
    reader: _AnyReader
    metadata: dict[str, str] = {}
    if packed is not None:
        reader = _PackedReader(packed)
        metadata |= packed.metadata
        if not is_packed(partial):
            _announce(out, reader.read(next(iter(sources)), packed.path), len(sources), dtype)
    elif is_packed(partial):
        reader = _Reader(Manifest.load(partial).metadata["key"], earlier=before_last)
    else:
        first_path = next(iter(sources.values()))
        first = read_checkpoint(first_path, key=key or searched_key(*sources.values()))
        _announce(out, first, len(sources), dtype)
        reader = _Reader(first.key, first, before_last)
        if first.prefix:
            metadata[PREFIX] = first.prefix
        metadata |= _side_data(first, sources)
    metadata |= {PACKED: fingerprint, "key": reader.key}
    with contextlib.closing(MatrixWriter(partial, metadata=metadata, dtype=dtype)) as writer:
        _write_rows(writer, sources, reader)
        if not writer.has_trainer_ema:  # else an earlier call has written it
            _write_trainer_ema(writer, last_step, last_path, reader)
    if packed is None:
        try:
            check_neighbours(Trajectory.open(partial), steps_given=steps_given)
        except TrajectoryError:
            shutil.rmtree(partial)
            raise
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


def check_room(out: Path, first: Checkpoint, rows: int, dtype: str) -> int:
    """The bytes that a trajectory will have, from its first checkpoint.

    Raises:
        TrajectoryError: the disk does not have so much.
    """
    layout = Layout.of(first.tensors, stored_dtype(dtype))
    needed = layout.row_bytes * rows
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
    try:
        return Manifest.load(partial).metadata.get(PACKED) == fingerprint
    except TrajectoryError:  # without a row, or broken
        return False


def _announce(out: Path, first: Checkpoint, rows: int, dtype: str) -> None:
    """Say what is packed, or refuse if there is no room for it."""
    size = check_room(out, first, rows, dtype)
    notice(f"packing {rows} checkpoints, once, into {out} ({shown_size(size)})")


def _side_data(first: Checkpoint, sources: Sources) -> dict[str, str]:
    """What lies beside the weights and belongs to all checkpoints: the alphas of a LoRA, and the texts of the headers.

    Raises:
        TrajectoryError: the alphas differ, by which weights mean something else.
    """
    found: dict[str, str] = {}
    header = set(read_metadata(next(iter(sources.values()))).items())
    for path in sources.values():
        header &= set(read_metadata(path).items())
    if header:
        found[HEADER] = json.dumps(dict(sorted(header)))
    if lora_flavour(first.tensors) is None:
        return found
    alphas: dict[str, Path] = {}
    for path in sources.values():
        with contextlib.suppress(TrajectoryError):  # the error comes when the alphas are needed
            read = LoraAlphas.read(path, key=first.key)
            text = "" if read is None else read.model_dump_json(exclude_unset=True)
            alphas.setdefault(text, path)
    if len(alphas) > 1:
        one, other = [*alphas.values()][:2]
        raise TrajectoryError(
            f"{other}: its LoRA has other alphas than {one}, so their weights cannot be combined: leave one part of "
            "the run out (first_step, last_step)."
        )
    text = next(iter(alphas), "")
    return {**found, PACKED_ALPHAS: text} if text else found


def _average_beside(path: Path, key: str, earlier: Path | None = None) -> StateDict | None:
    average_key = average_beside(path, key, earlier)
    return None if average_key is None else read_checkpoint(path, key=average_key).tensors


class _Watched(Mapping[str, Tensor]):
    """Tensors that are mapped from files, which are looked at before each is read.

    Reading a map of a file that has been cut meanwhile would end the process.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: Path, before: _FileStates) -> None:
        self._tensors = tensors
        self._path = path
        self._before = before

    def __getitem__(self, name: str) -> Tensor:
        if _file_states(self._path) != self._before:
            raise TrajectoryError("was written over while it was read: pack again when it is complete.")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


_FileStates = list[tuple[int, int]]


def _file_states(path: Path) -> _FileStates:
    """Size and time of a file, or of the files in a checkpoint's folder."""
    try:
        states = [file.stat() for file in (path, *path.glob("*"), *path.glob("*/*"))]
    except OSError:  # gone
        return []
    return [(state.st_size, state.st_mtime_ns) for state in states]


class _Reader:
    """Reads the state dict ``key`` of checkpoints, in order; ``first`` is the first one if it was read already."""

    def __init__(self, key: str, first: Checkpoint | None = None, earlier: Path | None = None) -> None:
        self.key = key
        self._first = first
        self._earlier = earlier  # than the last one

    def read(self, step: int, path: Path) -> Checkpoint:  # noqa: ARG002 - the path tells enough
        checkpoint = self._first
        self._first = None  # frees its memory for the next one
        if checkpoint is None:
            return read_checkpoint(path, key=self.key)
        return checkpoint

    def trainer_ema(self, step: int, path: Path) -> StateDict | None:  # noqa: ARG002 - the path tells enough
        """The average that the trainer kept beside the weights of a checkpoint; ``None`` without one."""
        return _average_beside(path, self.key, self._earlier)


class _PackedReader:
    """Reads checkpoints that are in a trajectory already."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.key = trajectory.metadata.get("key", "")
        self._trajectory = trajectory

    def read(self, step: int, path: Path) -> Checkpoint:  # noqa: ARG002 - the step tells enough
        tensors = self._trajectory.checkpoint(self._trajectory.steps.index(step))
        return Checkpoint(tensors, self.key, {})

    def trainer_ema(self, step: int, path: Path) -> StateDict | None:  # noqa: ARG002 - the step tells enough
        """The average that was packed with the checkpoints; of an earlier one than the last, that of its file."""
        if step == self._trajectory.steps[-1]:
            return self._trajectory.trainer_ema()
        source = self.source(step)
        return _average_beside(Path(source), self.key) if source else None

    def source(self, step: int) -> str:
        """Where the checkpoint came from when it was packed first."""
        return self._trajectory.sources[self._trajectory.steps.index(step)]


_AnyReader = _Reader | _PackedReader


def _write_rows(writer: MatrixWriter, sources: Sources, reader: _AnyReader) -> None:
    """Write the rows that are missing, and sync them to the disk while later ones are read and written."""
    committing = Background("lcsc-commit")
    steps = list(sources)
    written = len(writer.steps)
    try:
        with progress("pack", len(steps), done=written) as advance:
            for step in steps[written:]:
                _write_checkpoint(writer, step, sources[step], reader)
                if not committing.running:
                    committing.start(writer.commit)
                if step == steps[-1]:
                    committing.finish()
                    writer.commit()  # before the progress bar says that all is done
                advance(note=f"step {step}")
    except BaseException as error:
        with contextlib.suppress(TrajectoryError):  # the first error says more
            committing.finish()
            if not isinstance(error, TrajectoryError):  # else a sync may have failed: what the disk has counts
                writer.commit()
        raise


def _write_checkpoint(writer: MatrixWriter, step: int, path: Path, reader: _AnyReader) -> None:
    before = _file_states(path)
    tensors = _Watched(reader.read(step, path).tensors, path, before)
    try:
        layout = writer.check(tensors)
        source = _as_text(path)
        if isinstance(reader, _PackedReader):
            source = reader.source(step)
        writer.write(step, layout, tensors, source=source)
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from error


def _as_text(path: Path) -> str:
    """The path as a manifest has it, where a name that is not UTF-8 is escaped."""
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def _write_trainer_ema(writer: MatrixWriter, last_step: int, path: Path, reader: _AnyReader) -> None:
    """Write the trainer's own average at the last step, if it kept one; one that cannot be used is left out."""
    try:
        before = _file_states(path)
        averages = reader.trainer_ema(last_step, path)
        if averages is None:
            return
        last = reader.read(last_step, path).tensors
        watched = _Watched(completed(averages, last), path, before)
        writer.write_trainer_ema(watched, source=_as_text(path))
    except TrajectoryError as error:
        notice(f"{path}: the trainer's EMA is left out: {error}")
        return
    writer.commit()
