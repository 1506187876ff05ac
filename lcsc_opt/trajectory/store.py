"""The packed trajectory on disk: K checkpoints in one memory-mapped file, merged without loading them.

A trajectory is a folder with ``weights.bin``, whose rows are the checkpoints, and ``manifest.json``, which describes
the rows. Tensors keep their own dtype, so a one-hot combination is that checkpoint bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints.names import MANIFEST, REFERENCE, WEIGHTS
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.trajectory.disk.layout import TensorSpec, segments
from lcsc_opt.trajectory.disk.manifest import RELATIVE_ERROR, Manifest, load_manifest, trajectory_sha256, unreadable
from lcsc_opt.trajectory.disk.rows import DifferenceRows, ExactRows, Rows, map_bytes
from lcsc_opt.trajectory.merge import placement, projection
from lcsc_opt.trajectory.merge.merger import Merger, StateDict
from lcsc_opt.trajectory.merge.sources import Mapped, Placement, Source


class Trajectory:
    """K checkpoints of one training run, opened for reading with :meth:`open`.

    Only the pages that are read take memory, and the system can free them. Several threads may use one object. Pickled
    for another process, it is only its path and steps.
    """

    def __init__(self, path: Path, manifest: Manifest, stamp: tuple[int, int, int]) -> None:
        self.path = path
        self._manifest = manifest
        self._stamp = stamp
        self._slots = [saved.slot for saved in manifest.checkpoints]
        self._rows = _rows(path, manifest)
        stored = manifest.stored_layout
        self._stored_bytes = manifest.row_bytes if stored is None else stored.row_bytes
        self._segments = segments(manifest.layout, frozenset(manifest.varying))
        self._merger = self._from(Mapped(self._rows))

    @classmethod
    def open(cls, path: str | Path, *, steps: Sequence[int] | None = None) -> Trajectory:
        """Map the trajectory at ``path``.

        Args:
            path: the folder.
            steps: ``[K]``, opens only the checkpoints of these steps; ``None`` opens all.

        Raises:
            TrajectoryError: there is none, its manifest is broken, it holds no checkpoint, it is truncated, or it lacks
                one of the ``steps``.
        """
        path = Path(path)
        stamp = _stamp(path)  # before reading, so that a later change is noticed
        manifest = load_manifest(path)
        if not manifest.checkpoints:
            raise TrajectoryError(f"{path} holds no whole checkpoint yet: append one, or pack again.")
        return cls(path, manifest if steps is None else _only(manifest, steps, path), stamp)

    def on(self, device: torch.device | str, *, how: Placement | None = None) -> Trajectory:
        """The same trajectory, merged and projected on ``device``, in the fastest way possible.

        On a GPU: from a copy of the trajectory in its memory (``resident``) if the copy fits into a part of the free
        memory. Else the trajectory is read for each merge (``streamed``) into pinned memory, and copied while the part
        before is combined. Elsewhere, with tensors on the CPU: from the map (``mapped``) if the system can keep the
        file in memory, else read for each merge (``streamed``). A line on stderr says which way, unless it is the map.

        Several threads may use one object; if it is streamed, they merge one after the other. Pickled for another
        process, it is only its path and steps, and must be put on a device there again.

        Args:
            device: for example ``cuda:1``.
            how: one of the three ways; ``resident`` and ``streamed`` on any device, ``mapped`` on the CPU only.
                ``None`` takes the fastest.

        Raises:
            TrajectoryError: a checkpoint was overwritten since opening; or ``how`` does not fit the device.
        """
        self._check_unchanged()
        placed = copy.copy(self)
        placed._merger = self._from(self._source(torch.device(device), how))
        self._check_unchanged()
        return placed

    def __reduce__(self) -> tuple[object, ...]:
        return _open, (self.path, self.steps)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"<Trajectory {str(self.path)!r}: {len(self)} checkpoints of {self.parameters} parameters>"

    @property
    def steps(self) -> tuple[int, ...]:
        """The training step of each checkpoint, ``[K]``, strictly increasing."""
        return tuple(saved.step for saved in self._manifest.checkpoints)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where each checkpoint came from, ``[K]``; empty text for those that a training loop wrote."""
        return tuple(saved.source for saved in self._manifest.checkpoints)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of every checkpoint, in the order of their bytes."""
        return self._manifest.tensors

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, in the order of :attr:`tensors`."""
        return tuple(spec.name for spec in self.tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that occur, by name, each once."""
        return tuple(dict.fromkeys(spec.dtype for spec in self.tensors))

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""
        return frozenset(self._manifest.varying)

    @property
    def parameters(self) -> int:
        """P: how many scalars of a checkpoint are floating-point numbers that a merge combines."""
        return sum(spec.numel for spec in self.tensors if spec.merged)

    @property
    def nbytes(self) -> int:
        """How many bytes the K checkpoints take on disk, including the reference checkpoint if there is one."""
        reference = 0 if self.stored is None else self._manifest.row_bytes
        return len(self) * self._stored_bytes + reference

    @property
    def stored(self) -> str | None:
        """The dtype of the differences that are stored instead of the weights; ``None`` if weights are stored."""
        return self._manifest.stored

    @property
    def relative_error(self) -> float | None:
        """The measured error of merged weights from storing differences; see :meth:`TrajectoryWriter.measure`."""
        text = self.metadata.get(RELATIVE_ERROR)
        return None if text is None else float(text)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The writer's notes, name → text."""
        return MappingProxyType(self._manifest.metadata)

    @property
    def sha256(self) -> str:
        """The hash of the trajectory's names, shapes, dtypes, steps and the bytes of all rows."""
        return trajectory_sha256(self.tensors, zip(self.steps, self.checkpoint_sha256, strict=True))

    @property
    def checkpoint_sha256(self) -> tuple[str, ...]:
        """The SHA-256 of each checkpoint's row, ``[K]``."""
        return tuple(saved.sha256 for saved in self._manifest.checkpoints)

    @torch.inference_mode(mode=False)
    def checkpoint(self, index: int) -> StateDict:
        """A copy of checkpoint ``index`` (0 … K−1, or from the end when negative), bit for bit, on the CPU.

        Raises:
            TrajectoryError: there is no such checkpoint, or it has been overwritten since opening.
        """
        if not -len(self) <= index < len(self):
            raise TrajectoryError(f"There is no checkpoint {index}: {self.path} holds {len(self)}.")
        self._check_unchanged()
        saved = {spec.name: self._rows.tensor(self._slots[index], spec) for spec in self.tensors}
        self._check_unchanged()
        return saved

    @property
    def device(self) -> torch.device:
        """Where merged tensors are; see :meth:`on`."""
        return self._merger.source.device

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> StateDict:
        """The linear combination of the checkpoints: ``coefficients`` ``[K]``, any sign, sum to one.

        The tensors are new, contiguous, on :attr:`device` and in their stored dtypes. On a GPU, tensors of one dtype
        share one memory, and all are finished when this returns. float64 is accumulated in float64, every other dtype
        in float32 and rounded once. Tensors that are the same in all checkpoints are copied. Integers and bools come
        from the checkpoint with the largest coefficient, the first of those that tie. A single coefficient of exactly 1
        gives that checkpoint bit for bit.

        Raises:
            StudySpecError: not ``[K]``, not finite, or another sum than one.
            TrajectoryError: a checkpoint was overwritten since opening.
        """
        [merged] = self._merge(check_coefficients(coefficients, len(self))[None])
        return merged

    def merge_many(self, coefficients: npt.ArrayLike | Tensor) -> list[StateDict]:
        """The combinations for ``coefficients`` ``[B, K]`` in one read of the trajectory; otherwise as :meth:`merge`.

        Equal to B calls of :meth:`merge` up to rounding: the order of the sums depends on B.
        """
        return self._merge(check_coefficients(coefficients, len(self), axes=2))

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def project(self, gradients: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """From the gradient of a function of the merged weights to its gradient in the coefficients, ``[K]`` float64.

        That is ⟨theta_i, gradient⟩ for each checkpoint, in one read of the trajectory. Names without a gradient count
        as zero, and so do tensors that a merge copies: constant ones, integers and bools. The rounding at the end of a
        merge is taken to have derivative one.

        Args:
            gradients: name → gradient, of the shape of the tensor, of any dtype, on any device.

        Raises:
            TrajectoryError: another name or shape, or a checkpoint was overwritten since opening.
        """
        projection.check_gradients(gradients, self.tensors)
        self._check_unchanged()
        projected = self._merger.project(gradients)
        self._check_unchanged()
        return projected

    def gram(self) -> npt.NDArray[np.float64]:
        """Inner products of the checkpoints after their mean is subtracted: ``[K, K]`` float64.

        For directions d, e with sum zero, ``d @ gram @ e`` is the inner product of the changes they make to
        the weights.
        """
        total = np.zeros((len(self), len(self)))
        for tile in self._float64_tiles():
            centered = tile - tile.mean(dim=0)
            total += (centered @ centered.t()).cpu().numpy()
        return total

    def difference_norms(self) -> npt.NDArray[np.float64]:
        """The L2 norm of each checkpoint's difference from the one before it: ``[K−1]`` float64."""
        squares = np.zeros(len(self) - 1)
        for tile in self._float64_tiles():
            squares += tile.diff(dim=0).square().sum(dim=1).cpu().numpy()
        return np.sqrt(squares)

    @property
    def touched(self) -> bool:
        """Whether the weights file is newer than the manifest, which no writer leaves so.

        A copied folder may look the same; :meth:`verify` tells the difference.
        """
        try:
            weights, manifest = ((self.path / name).stat().st_mtime_ns for name in (WEIGHTS, MANIFEST))
        except OSError as error:
            raise unreadable(self.path, error) from None
        return weights > manifest

    def verify(self) -> None:
        """Hash every row again.

        Raises:
            TrajectoryError: the bytes of a step are not those that were written; names the first such step.
        """
        with progress("verify", len(self)) as advance:
            for saved in self._manifest.checkpoints:
                if self._rows.sha256(saved.slot) != saved.sha256:
                    raise TrajectoryError(f"{self.path}: the weights of step {saved.step} are damaged: pack again.")
                advance()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _merge(self, rows: npt.NDArray[np.float64]) -> list[StateDict]:
        self._check_unchanged()
        merged = self._merger.merge(rows)
        self._check_unchanged()
        return merged

    def _float64_tiles(self) -> Iterator[Tensor]:
        self._check_unchanged()
        with contextlib.closing(self._merger.float64_tiles()) as tiles:
            yield from tiles
        self._check_unchanged()

    def _source(self, device: torch.device, how: Placement | None) -> Source:
        paths = [self.path / WEIGHTS] if self.stored is None else [self.path / WEIGHTS, self.path / REFERENCE]
        stored = placement.Stored(
            self.path.name, len(self), self.nbytes, paths, self._rows, self._segments, self._slots
        )
        return placement.place(stored, device, how)

    def _from(self, source: Source) -> Merger:
        return Merger(self._rows, source, self.tensors, self._segments, self._slots, self.varying)

    def _check_unchanged(self) -> None:
        """Refuse if a writer has overwritten a used row since opening. Appended rows do no harm."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        now = load_manifest(self.path)
        kept = now.layout == self._manifest.layout and set(self._manifest.checkpoints) <= set(now.checkpoints)
        if not kept:
            raise TrajectoryError(f"{self.path} was changed since it was opened: open it again.")
        self._stamp = stamp


def _open(path: Path, steps: tuple[int, ...]) -> Trajectory:
    return Trajectory.open(path, steps=steps)


def _only(manifest: Manifest, steps: Sequence[int], path: Path) -> Manifest:
    """The manifest with only the checkpoints of these steps."""
    kept = tuple(saved for saved in manifest.checkpoints if saved.step in steps)
    if missing := sorted(set(steps) - {saved.step for saved in kept}):
        there = len(manifest.checkpoints)
        raise TrajectoryError(f"{path} has no checkpoint of step {missing[0]}: it holds {there} others.")
    return manifest.model_copy(update={"checkpoints": kept})


def _rows(path: Path, manifest: Manifest) -> Rows:
    stored = manifest.stored_layout
    if stored is None:
        content = map_bytes(path / WEIGHTS, manifest.slots * manifest.row_bytes)
        return ExactRows(content.view(manifest.slots, manifest.row_bytes))
    content = map_bytes(path / WEIGHTS, stored.file_bytes(manifest.slots))
    reference = map_bytes(path / REFERENCE, manifest.row_bytes)
    return DifferenceRows(content, manifest.layout, stored, reference)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Identifies a version of the manifest: every write makes a new file."""
    try:
        status = (path / MANIFEST).stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_ino, status.st_mtime_ns, status.st_size
