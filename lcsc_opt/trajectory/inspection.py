"""The contents of a trajectory, packed or not, and warnings about it."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints import checkpoint_series, checkpoint_step, read_checkpoint
from lcsc_opt.checkpoints.finding import Patterns, find_checkpoints, is_packed
from lcsc_opt.checkpoints.weights import difference, shapes_of
from lcsc_opt.trajectory.layout import EXACT, Layout, TensorSpec
from lcsc_opt.trajectory.trajectory import Trajectory


def inspect(patterns: Patterns, *, key: str | None = None, verify: bool = False) -> dict[str, Any]:
    """Look at a packed trajectory, or at checkpoints that :func:`find_checkpoints` finds.

    Unpacked checkpoints are read completely, once; two of them are in memory at a time.

    Args:
        patterns: as for :func:`find_checkpoints`, or one packed trajectory.
        key: which state dict of each file, as for :func:`read_checkpoint`.
        verify: compare the bytes of a packed trajectory with the hashes in its manifest.

    Returns:
        A mapping that can be written as JSON:

        * ``path`` (what was inspected), ``packed`` (whether it is one packed trajectory, or K checkpoints);
        * ``series``: the names of its checkpoints without their steps; empty for those that a training loop wrote;
        * ``key``: which state dict of each file; ``""`` if a file is one state dict;
        * ``checkpoints`` (K), ``parameters`` (P, floating-point scalars of one), ``tensors`` (how many one has);
        * ``dtypes`` that occur, each once; ``stored``: ``exact``, or what floating-point weights were rounded to;
        * ``bytes``: size of the tensors of all checkpoints;
        * ``first_step``, ``last_step``: ``None`` if the steps are not known; ``intervals`` between steps that occur;
        * ``sha256``: of the packed trajectory, also before it is packed; ``None`` if it cannot be packed;
        * ``verified``: whether all bytes were compared with their hashes;
        * ``steps``: ``[K]``; empty if they are not known;
        * ``difference_norms``: ``[K−1]``, the L2 norm of each checkpoint's difference from the one before it; ``None``
          if it is not finite or cannot be computed;
        * ``warnings``: one line each.

    Raises:
        TrajectoryError: there is nothing; no checkpoint can be read; ``verify`` for unpacked ones, which have no
            hashes; or a packed one is damaged.
    """
    alone = [patterns] if isinstance(patterns, (str, Path)) else patterns
    if len(alone) == 1 and (verify or is_packed(Path(alone[0]).expanduser())):
        trajectory = Trajectory.open(Path(alone[0]).expanduser())
        if verify:
            trajectory.verify()
        return _described(
            trajectory.tensors,
            list(trajectory.steps),
            [Path(source) for source in trajectory.sources if source],
            identical_checkpoints(trajectory),
            path=str(trajectory.path),
            packed=True,
            key=trajectory.metadata.get("key", ""),
            checkpoints=len(trajectory),
            stored=trajectory.stored or EXACT,
            bytes=trajectory.nbytes,
            sha256=trajectory.sha256,
            verified=verify,
            difference_norms=[_finite(norm) for norm in trajectory.difference_norms()],
        )
    if verify:
        raise TrajectoryError("Only a packed trajectory has hashes to verify: name one alone, or leave out --verify.")
    return _inspect_files(" ".join(map(str, alone)), find_checkpoints(alone, key=key), key)


def identical_checkpoints(trajectory: Trajectory) -> list[str]:
    """Warnings of checkpoints with the same bytes."""
    names = (f"step {step}" for step in trajectory.steps)
    return _duplicates(list(zip(names, trajectory.checkpoint_sha256, strict=True)))


def _described(
    tensors: Sequence[TensorSpec], steps: list[int], paths: list[Path], warnings: Sequence[str], **known: Any
) -> dict[str, Any]:
    """What :func:`inspect` returns; ``known`` in the place of what is told from the first checkpoint's tensors."""
    series = sorted(set(map(checkpoint_series, paths)))
    mixed = [f"several series of checkpoints: {', '.join(series)}"] if len(series) > 1 else []
    return {
        "dtypes": list(dict.fromkeys(spec.dtype for spec in tensors)),
        **known,
        "series": series,
        "parameters": sum(spec.numel for spec in tensors if spec.merged),
        "tensors": len(tensors),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "intervals": sorted({later - earlier for earlier, later in itertools.pairwise(steps)}),
        "steps": steps,
        "warnings": [*mixed, *_gaps(steps), *warnings],
    }


def _inspect_files(shown: str, paths: list[Path], key: str | None) -> dict[str, Any]:
    steps, paths, complaints = _in_order(paths)
    names = [f"step {step} ({path.name})" for step, path in zip(steps, paths, strict=True)] if steps else []
    first: Layout | None = None
    before: Mapping[str, Tensor] | None = None
    size, rows, norms = 0, list[tuple[str, str]](), list[float | None]()
    dtypes: dict[str, None] = {}
    broken, odd = list[str](), list[str]()  # warnings
    with progress("read", len(paths)) as advance:
        for path, name in zip(paths, names or [path.name for path in paths], strict=True):
            tensors: Mapping[str, Tensor] | None = None
            try:
                checkpoint = read_checkpoint(path, key=key)
                layout, tensors = Layout.of(checkpoint.tensors), checkpoint.tensors
            except TrajectoryError as error:
                broken.append(str(error))
            else:
                if first is None:
                    first, key = layout, checkpoint.key
                size += layout.row_bytes
                dtypes.update(dict.fromkeys(spec.dtype for spec in layout.tensors))
                merged = (spec.name for spec in layout.tensors if spec.merged)
                infinite = next((each for each in merged if not bool(torch.isfinite(tensors[each]).all())), None)
                if infinite is not None:
                    odd.append(f"NaN or infinity: tensor {infinite!r} of {name}")
                if (differs := difference(layout.shapes, first.shapes)) is not None:
                    odd.append(f"mixed architectures: {name} {differs}")
                elif layout != first:
                    odd.append(f"mixed dtypes: {name} has other dtypes than the first checkpoint")
                else:
                    rows.append((name, layout.row_sha256(tensors)))
            norms.append(_distance(before, tensors))
            before = tensors
            advance(note=path.name)
    if first is None:
        raise TrajectoryError(broken[0])
    whole = len(rows) == len(paths) and len(set(steps)) == len(paths) and not odd
    return _described(
        first.tensors,
        steps,
        paths,
        [*complaints, *broken, *_duplicates(rows), *odd],
        dtypes=list(dtypes),
        path=shown,
        packed=False,
        key=key or "",
        checkpoints=len(paths),
        stored=EXACT,
        bytes=size,
        sha256=first.sha256(zip(steps, (sha256 for _, sha256 in rows), strict=True)) if whole else None,
        verified=False,
        difference_norms=norms[1:],
    )


def _in_order(paths: list[Path]) -> tuple[list[int], list[Path], list[str]]:
    """The steps (empty if they are not known), the paths in their order, and warnings about the steps."""
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = checkpoint_step(path)
        except TrajectoryError:
            return [], paths, [f"the steps are not known: {path} does not tell its own"]
    paths = sorted(paths, key=lambda path: steps[path])  # stable: natural order for equal steps
    pairs = [
        f"step {steps[later]} is there twice: {earlier} and {later}"
        for earlier, later in itertools.pairwise(paths)
        if steps[earlier] == steps[later]
    ]
    return [steps[path] for path in paths], paths, pairs


def _distance(before: Mapping[str, Tensor] | None, after: Mapping[str, Tensor] | None) -> float | None:
    """The L2 norm of the difference, in float64; ``None`` if one is missing, they do not fit, or it is not finite."""
    if before is None or after is None or shapes_of(before) != shapes_of(after):
        return None
    weights = (name for name, tensor in after.items() if tensor.is_floating_point())
    moved = (after[name].detach().to(torch.float64, copy=True).sub_(before[name].detach()) for name in weights)
    squares = (float(by.square_().sum()) for by in moved)
    return _finite(math.sqrt(sum(squares)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _gaps(steps: Sequence[int]) -> list[str]:
    """Warnings of unusual distances between steps; none if no distance is usual."""
    pairs = [(earlier, later) for earlier, later in itertools.pairwise(steps) if later > earlier]
    usual, count = (collections.Counter(later - earlier for earlier, later in pairs).most_common(1) or [(0, 0)])[0]
    if 2 * count < len(pairs):
        return []
    return [
        f"gap: {later - earlier} from step {earlier} to {later}, where {usual} is usual"
        for earlier, later in pairs
        if later - earlier != usual
    ]


def _duplicates(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Warnings of checkpoints with the same bytes; ``rows`` are names and hashes."""
    groups: dict[str, list[str]] = {}
    for name, sha256 in rows:
        groups.setdefault(sha256, []).append(name)
    return [
        f"identical weights: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for names in groups.values()
        if len(names) > 1
    ]
