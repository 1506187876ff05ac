"""Packing: checkpoints are read one after the other and written as rows of a trajectory, from where a call stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import ANOTHER_FOLDER, shown_size, sync_folder
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints.content import RUNNING_MEAN
from lcsc_opt.checkpoints.finding import is_packed
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_checkpoint
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.coefficients.rows import Row
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.layout import Layout, stored_dtype
from lcsc_opt.trajectory.manifest import PACKED, Manifest, foreign_files
from lcsc_opt.trajectory.matrix import MatrixWriter, check_finite
from lcsc_opt.trajectory.means import Interval, RunningMean, interval_of, split_rows
from lcsc_opt.trajectory.sources import Sources
from lcsc_opt.trajectory.trajectory import Trajectory


def pack_sources(
    sources: Sources,
    out: Path,
    *,
    key: str | None,
    dtype: str,
    fingerprint: str,
    means: int | None = None,
    packed: Trajectory | None = None,
) -> Trajectory:
    """Pack into ``out``, from where a call with the same ``fingerprint`` stopped.

    With ``means``, so many rows are means of checkpoints, and the last checkpoint is one more row. Checkpoints that are
    in a trajectory already are read from ``packed``.

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
    rows: list[tuple[Row, ...]] = [(row,) for row in sources]
    if means is not None:
        rows = [tuple(map(Row, steps)) for steps in split_rows([row.step for row in sources], means)]
    reader: _AnyReader
    metadata: dict[str, str] = {}
    if packed is not None:
        reader = _PackedReader(packed)
        metadata |= packed.metadata
        if not is_packed(partial):
            _announce(out, reader.read(rows[0][0], packed.path), len(rows), dtype, means)
    elif is_packed(partial):
        reader = _Reader(Manifest.load(partial).metadata["key"])  # LoRA's alphas are in the metadata already
    else:
        first = read_checkpoint(next(iter(sources.values())), key=key)
        _announce(out, first, len(rows), dtype, means)
        reader = _Reader(first.key, first)
        alphas = _lora_alphas(first, list(sources.values())[-1])
        if alphas is not None:
            metadata[PACKED_ALPHAS] = alphas.model_dump_json(exclude_unset=True)
    metadata |= {PACKED: fingerprint, "key": reader.key}
    if isinstance(reader, _Reader) and reader.key == RUNNING_MEAN:
        if means is not None:
            raise TrajectoryError(f"--means: {RUNNING_MEAN} is a mean already; leave --means out, or pass --key model.")
        reader = _IntervalReader(reader, sources)
    with contextlib.closing(MatrixWriter(partial, metadata=metadata, dtype=dtype)) as writer:
        _write_rows(writer, rows, sources, reader)
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


def _announce(out: Path, first: Checkpoint, rows: int, dtype: str, means: int | None) -> None:
    """Say what is packed, or refuse if there is no room for it."""
    size = check_room(out, first, rows, dtype)
    what = "checkpoints" if means is None else "rows (means, and the last checkpoint)"
    notice(f"packing {rows} {what}, once, into {out} ({shown_size(size)})")


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

    def read(self, row: Row, path: Path) -> Checkpoint:  # noqa: ARG002 - the path tells enough
        checkpoint = self._first
        self._first = None  # frees its memory for the next one
        if checkpoint is None:
            return read_checkpoint(path, key=self.key)
        return checkpoint


class _IntervalReader:
    """Reads the means of intervals out of running means of all weights since the training began (icefall).

    With the running means m_i at steps n_i, the mean of the steps between two is (n_i m_i - n_j m_j) / (n_i - n_j):
    rows that differ as much as checkpoints do, where running means differ less and less.
    """

    def __init__(self, reader: _Reader, sources: Sources) -> None:
        self.key = reader.key
        self._reader = reader
        self._sources = sources
        self._rows = list(sources)
        self._last: tuple[Row, Checkpoint] | None = None

    def interval(self, row: Row) -> Interval:
        """The steps that the mean is of."""
        earlier = self._earlier(row)
        first = 1 if earlier is None else earlier.step + 1
        return Interval(first, row.step, row.step - first + 1)

    def read(self, row: Row, path: Path) -> Checkpoint:
        if row.step < 1:
            raise TrajectoryError(f"{path}: {RUNNING_MEAN} at step 0 is a mean of nothing: leave it out.")
        earlier_row = self._earlier(row)
        earlier = None
        if earlier_row is not None:
            earlier = self._running_mean(earlier_row)
        checkpoint = self._running_mean(row)
        if earlier is None or earlier_row is None:
            return checkpoint
        differs = difference(checkpoint.tensors, {name: tuple(t.shape) for name, t in earlier.tensors.items()})
        if differs is not None:
            raise TrajectoryError(f"{path}: The checkpoint does not fit the one before: it {differs}.")
        share = earlier_row.step / (row.step - earlier_row.step)
        tensors: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors.items():
            tensors[name] = tensor
            if tensor.is_floating_point():
                wide = tensor.double()
                change = wide - earlier.tensors[name].double()
                tensors[name] = change.mul_(share).add_(wide).to(tensor.dtype)
        return dataclasses.replace(checkpoint, tensors=tensors)

    def _earlier(self, row: Row) -> Row | None:
        place = self._rows.index(row)
        return self._rows[place - 1] if place else None

    def _running_mean(self, row: Row) -> Checkpoint:
        """The running mean as it was saved; the one that was read last is not read again."""
        if self._last is None or self._last[0] != row:
            self._last = (row, self._reader.read(row, self._sources[row]))
        return self._last[1]


class _PackedReader:
    """Reads checkpoints that are in a trajectory already."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.key = trajectory.metadata.get("key", "")
        self._trajectory = trajectory

    def read(self, row: Row, path: Path) -> Checkpoint:  # noqa: ARG002 - the row tells enough
        tensors = self._trajectory.checkpoint(self._index(row))
        return Checkpoint(tensors, self.key, {})

    def interval(self, row: Row) -> Interval | None:
        """What the row is the mean of; ``None`` for a checkpoint."""
        intervals = self._trajectory.intervals
        if intervals is None:
            return None
        return intervals[self._index(row)]

    def source(self, row: Row) -> str:
        """Where the row came from when it was packed first."""
        return self._trajectory.sources[self._index(row)]

    def _index(self, row: Row) -> int:
        return self._trajectory.rows.index(row)


_AnyReader = _Reader | _PackedReader | _IntervalReader


def _check_all_finite(layout: Layout, tensors: Mapping[str, Tensor], row: Row) -> None:
    for spec in layout.tensors:
        if spec.merged and spec.numel:
            check_finite(tensors[spec.name], spec, row, None)


def _write_rows(writer: MatrixWriter, rows: Sequence[Sequence[Row]], sources: Sources, reader: _AnyReader) -> None:
    """Write the rows that are missing, and sync them to the disk while later ones are read and written."""
    committing = Background("lcsc-commit")
    written = len(writer.steps)
    are_means = len(rows) < len(sources)
    try:
        with progress("pack", len(sources), done=sum(map(len, rows[:written]))) as advance:
            for averaged in rows[written:]:
                last = averaged[-1]
                interval: Interval | None = None
                if are_means:
                    interval = interval_of([row.step for row in averaged])
                elif not isinstance(reader, _Reader):
                    interval = reader.interval(last)
                if len(averaged) == 1:
                    _write_checkpoint(writer, last, sources[last], reader, interval)
                else:
                    layout, tensors = _mean(writer, {row: sources[row] for row in averaged}, reader, advance)
                    writer.write(last, layout, tensors, interval=interval)
                if not committing.running:
                    committing.start(writer.commit)
                if averaged is rows[-1]:
                    committing.finish()
                    writer.commit()  # before the progress bar says that all is done
                advance(note=str(last))
    except BaseException as error:
        with contextlib.suppress(TrajectoryError):  # the first error says more
            committing.finish()
            if not isinstance(error, TrajectoryError):  # else a sync may have failed: what the disk has counts
                writer.commit()
        raise


def _mean(
    writer: MatrixWriter, sources: Sources, reader: _AnyReader, advance: Callable[..., object]
) -> tuple[Layout, Mapping[str, Tensor]]:
    """The layout of these checkpoints, and their mean, summed in float64.

    The caller advances the progress by the last one.
    """
    mean: RunningMean | None = None
    for row, path in sources.items():
        tensors = reader.read(row, path).tensors
        try:
            layout = writer.check(tensors)
            _check_all_finite(layout, tensors, row)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}: {error}") from error
        if mean is None:
            mean = RunningMean(layout, dtype=torch.float64, device=CPU)
        mean.add(tensors)
        if mean.count < len(sources):
            advance(note=str(row))
    assert mean is not None
    return layout, mean.tensors


def _write_checkpoint(
    writer: MatrixWriter, row: Row, path: Path, reader: _AnyReader, interval: Interval | None
) -> None:
    tensors = reader.read(row, path).tensors
    try:
        layout = writer.check(tensors)
        source = str(path.absolute())
        if isinstance(reader, _PackedReader):
            source = reader.source(row)
        writer.write(row, layout, tensors, source=source, interval=interval)
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from error
