"""The packed trajectory: a memory-mapped matrix with a checkpoint in each row, merged without loading it.

It is a folder with ``weights.bin``, whose rows are the checkpoints, and ``manifest.json``, which describes the rows.
The columns of one dtype are a ``[K, P]`` view of it. A one-hot combination is that checkpoint bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints.names import MANIFEST, WEIGHTS
from lcsc_opt.checkpoints.weights import difference, shapes_of
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.trajectory.layout import TensorSpec, segments
from lcsc_opt.trajectory.manifest import Manifest, load_manifest, map_rows, trajectory_sha256, unreadable
from lcsc_opt.trajectory.merge import Merger, StateDict, ranges_of
from lcsc_opt.trajectory.placement import Mapped, Placement, place


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
        self._rows = map_rows(path, manifest)
        mapped, combined = Mapped(self._rows), segments(manifest.layout, self.varying)
        self._widened = manifest.stored is not None
        self._merger = Merger(mapped, self._rows, manifest.tensors, combined, self._slots, self.varying, self._widened)

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
        if steps is not None:
            kept = tuple(saved for saved in manifest.checkpoints if saved.step in steps)
            if missing := sorted(set(steps) - {saved.step for saved in kept}):
                there = len(manifest.checkpoints)
                raise TrajectoryError(f"{path} has no checkpoint of step {missing[0]}: it holds {there} others.")
            manifest = manifest.model_copy(update={"checkpoints": kept})
        return cls(path, manifest, stamp)

    def on(self, device: torch.device | str, *, how: Placement | None = None) -> Trajectory:
        """The same trajectory, merged and projected on ``device``, in the fastest way possible.

        On a GPU: from a copy of the trajectory in its memory (``resident``) if the copy fits into a part of the free
        memory. Elsewhere, with tensors on the CPU: from the map (``mapped``) if the machine's memory can hold the file.
        Else the trajectory is read for each merge (``streamed``), part by part, while the part before is combined. A
        line on stderr says which way, unless it is the map.

        Several threads may use one object. Pickled for another process, it is only its path and steps, and must be put
        on a device there again.

        Args:
            device: for example ``cuda:1``.
            how: one of the three ways; ``mapped`` on the CPU only. ``None`` takes the fastest.

        Raises:
            TrajectoryError: a checkpoint was overwritten since opening; or ``how`` does not fit the device.
        """
        self._check_unchanged()
        placed, ranges = copy.copy(self), ranges_of(self._slots)
        source = place(self.path / WEIGHTS, self._rows, self._merger.segments, ranges, torch.device(device), how)
        placed._merger = dataclasses.replace(self._merger, source=source)
        self._check_unchanged()
        return placed

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(Trajectory.open, steps=self.steps), (self.path,)

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
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""
        return frozenset(self._manifest.varying)

    @property
    def parameters(self) -> int:
        """P: how many scalars of a checkpoint are floating-point numbers that a merge combines."""
        return sum(spec.numel for spec in self.tensors if spec.merged)

    @property
    def nbytes(self) -> int:
        """How many bytes the K checkpoints take on disk."""
        return len(self) * self._manifest.row_bytes

    @property
    def stored(self) -> str | None:
        """What floating-point weights were rounded to when they were stored; ``None`` if every bit was kept."""
        return self._manifest.stored

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

        Floating-point tensors that were rounded to half precision come in float32.

        Raises:
            TrajectoryError: there is no such checkpoint, or it has been overwritten since opening.
        """
        if not -len(self) <= index < len(self):
            raise TrajectoryError(f"There is no checkpoint {index}: {self.path} holds {len(self)}.")
        self._check_unchanged()
        row = self._rows[self._slots[index]]
        saved = {spec.name: spec.copy_from(row, widened=self._widened) for spec in self.tensors}
        self._check_unchanged()
        return saved

    @property
    def device(self) -> torch.device:
        """Where merged tensors are; see :meth:`on`."""
        return self._merger.source.device

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> StateDict:
        """The linear combination of the checkpoints: ``coefficients`` ``[K]``, any sign, sum to one.

        The tensors are new, contiguous and on :attr:`device`. They have the dtypes of :attr:`tensors`, or float32 for
        weights that were rounded when they were stored. On a GPU, tensors of one dtype share one memory, and all are
        finished when this returns. float64 is accumulated in float64, every
        other dtype in float32 and rounded once. Tensors that are the same in all checkpoints are copied. Integers and
        bools come from the checkpoint with the largest coefficient, the first of those that tie. A single coefficient
        of exactly 1 gives that checkpoint bit for bit.

        Raises:
            StudySpecError: not ``[K]``, not finite, or another sum than one.
            TrajectoryError: a checkpoint was overwritten since opening.
        """
        [merged] = self.merge_many(check_coefficients(coefficients, len(self))[None])
        return merged

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def merge_many(self, coefficients: npt.ArrayLike | Tensor) -> list[StateDict]:
        """The combinations for ``coefficients`` ``[B, K]`` in one read: those of :meth:`merge` up to rounding."""
        rows = check_coefficients(coefficients, len(self), axes=2)
        self._check_unchanged()
        merged = self._merger.merge(rows)
        self._check_unchanged()
        return merged

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
        expected = self._manifest.layout.shapes
        if (differs := difference(expected | shapes_of(gradients), expected)) is not None:  # not all need have one
            raise TrajectoryError(f"The gradients do not fit the trajectory: their model {differs}. Use its own names.")
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
                if hashlib.sha256(self._rows[saved.slot].numpy().data).hexdigest() != saved.sha256:
                    raise TrajectoryError(f"{self.path}: the weights of step {saved.step} are damaged: pack again.")
                advance()

    def _float64_tiles(self) -> Iterator[Tensor]:
        self._check_unchanged()
        with contextlib.closing(self._merger.float64_tiles()) as tiles:
            yield from tiles
        self._check_unchanged()

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


def _stamp(path: Path) -> tuple[int, int, int]:
    """Identifies a version of the manifest: every write makes a new file."""
    try:
        status = (path / MANIFEST).stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_ino, status.st_mtime_ns, status.st_size
