"""The contents of a trajectory, packed or not, and warnings about it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import progress
from lcsc_opt.checkpoints import checkpoint_series, checkpoint_step, read_checkpoint
from lcsc_opt.checkpoints.finding import Patterns, find_checkpoints, is_packed
from lcsc_opt.checkpoints.names import numbered_step
from lcsc_opt.checkpoints.weights import difference, shapes_of
from lcsc_opt.trajectory.layout import EXACT, Layout, TensorSpec, all_finite, plan, row_sha256
from lcsc_opt.trajectory.manifest import trajectory_sha256
from lcsc_opt.trajectory.trajectory import Trajectory

_AT_ONCE = 2**18  # numbers converted to float64 at once
_MOST_WARNINGS = 5  # of one kind


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a trajectory holds. All values can be written as JSON.

    Attributes:
        path: what was inspected.
        packed: whether it is one packed trajectory, or K checkpoints.
        series: the names of its checkpoints without their steps; empty for those that a training loop wrote.
        key: which state dict of each file; ``""`` if a file is one state dict.
        checkpoints: K.
        parameters: P, floating-point scalars of one checkpoint.
        tensors: how many tensors one checkpoint has.
        dtypes: the dtypes that occur, each once.
        stored: ``exact``, or what floating-point weights were rounded to when they were packed.
        bytes: size of the tensors of all checkpoints.
        first_step, last_step: ``None`` if the steps are not known.
        intervals: the distances between neighbouring steps that occur.
        sha256: of the packed trajectory, also before it is packed; ``None`` if it cannot be packed.
        verified: whether all bytes were compared with their hashes.
        steps: ``[K]``; empty if the steps are not known.
        difference_norms: ``[K−1]``, the L2 norm of each checkpoint's difference from the one before it; ``None`` if it
            is not finite or cannot be computed.
        warnings: one line each.
    """

    path: str
    packed: bool
    series: list[str]
    key: str
    checkpoints: int
    parameters: int
    tensors: int
    dtypes: list[str]
    stored: str
    bytes: int
    first_step: int | None
    last_step: int | None
    intervals: list[int]
    sha256: str | None
    verified: bool
    steps: list[int]
    difference_norms: list[float | None]
    warnings: list[str]


def inspect(patterns: Patterns, *, key: str | None = None, verify: bool = False) -> Inspection:
    """Look at a packed trajectory, or at checkpoints that :func:`find_checkpoints` finds.

    Unpacked checkpoints are read completely, once; two of them are in memory at a time.

    Args:
        patterns: as for :func:`find_checkpoints`, or one packed trajectory.
        key: which state dict of each file, as for :func:`read_checkpoint`.
        verify: compare the bytes of a packed trajectory with the hashes in its manifest.

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
            list(zip(_step_names(trajectory), trajectory.checkpoint_sha256, strict=True)),
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
    return _duplicates(list(zip(_step_names(trajectory), trajectory.checkpoint_sha256, strict=True)))


def _described(
    tensors: Sequence[TensorSpec],
    steps: list[int],
    paths: list[Path],
    rows: list[tuple[str, str]],
    *,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    dtypes: Sequence[str] | None = None,
    **known: object,
) -> Inspection:
    """The inspection of checkpoints ``rows``, names and hashes, with warnings before and after those about them."""
    series = sorted(set(map(checkpoint_series, paths)))
    mixed = [f"several series of checkpoints: {', '.join(series)}"] if len(series) > 1 else []
    return Inspection(
        series=series,
        parameters=sum(spec.numel for spec in tensors if spec.merged),
        tensors=len(tensors),
        dtypes=list(dtypes or dict.fromkeys(spec.dtype for spec in tensors)),
        first_step=steps[0] if steps else None,
        last_step=steps[-1] if steps else None,
        intervals=sorted({later - earlier for earlier, later in itertools.pairwise(steps)}),
        steps=steps,
        warnings=[*before, *mixed, *_gaps(steps), *_duplicates(rows), *after],
        **known,  # type: ignore[arg-type]
    )


def _inspect_files(shown: str, paths: list[Path], key: str | None) -> Inspection:
    steps, paths, complaints = _in_order(paths)
    names = [f"step {step} ({path.name})" for step, path in zip(steps, paths, strict=True)] if steps else []
    first: Layout | None = None
    before: Mapping[str, Tensor] | None = None
    size, rows, norms = 0, list[tuple[str, str]](), list[float | None]()
    dtypes: dict[str, None] = {}
    found: dict[str, list[str]] = {kind: [] for kind in ("broken", "not finite", "mixed", "retyped")}
    with progress("read", len(paths)) as advance:
        for path, name in zip(paths, names or [path.name for path in paths], strict=True):
            tensors: Mapping[str, Tensor] | None = None
            try:
                checkpoint = read_checkpoint(path, key=key)
                layout, tensors = plan(checkpoint.tensors), checkpoint.tensors
            except TrajectoryError as error:
                found["broken"].append(str(error))
            else:
                if first is None:
                    first, key = layout, checkpoint.key
                size += layout.row_bytes
                dtypes.update(dict.fromkeys(spec.dtype for spec in layout.tensors))
                merged = (spec.name for spec in layout.tensors if spec.merged)
                odd = next((tensor for tensor in merged if not all_finite(tensors[tensor])), None)
                if odd is not None:
                    found["not finite"].append(f"NaN or infinity: tensor {odd!r} of {name}")
                if (differs := difference(layout.shapes, first.shapes)) is not None:
                    found["mixed"].append(f"mixed architectures: {name} {differs}")
                elif layout != first:
                    found["retyped"].append(f"mixed dtypes: {name} {_retyped(first, layout)}")
                else:
                    rows.append((name, row_sha256(layout, tensors)))
            norms.append(_distance(before, tensors))
            before = tensors
            advance(note=path.name)
    if first is None:
        raise TrajectoryError(found["broken"][0])
    whole = len(rows) == len(paths) and len(set(steps)) == len(paths) and not found["not finite"]
    hashed = zip(steps, (sha256 for _, sha256 in rows), strict=True) if whole else None
    return _described(
        first.tensors,
        steps,
        paths,
        rows,
        before=[*complaints, *_at_most(found["broken"])],
        after=[line for kind in ("not finite", "mixed", "retyped") for line in _at_most(found[kind])],
        dtypes=list(dtypes),
        path=shown,
        packed=False,
        key=key or "",
        checkpoints=len(paths),
        stored=EXACT,
        bytes=size,
        sha256=None if hashed is None else trajectory_sha256(first.tensors, hashed),
        verified=False,
        difference_norms=norms[1:],
    )


def _in_order(paths: list[Path]) -> tuple[list[int], list[Path], list[str]]:
    """The steps (empty if they are not known), the paths in their order, and warnings about the steps."""
    steps: dict[Path, int] = {}
    for path in paths:
        step: int | None
        try:
            step = checkpoint_step(path)
        except TrajectoryError:  # if the file is damaged, only its name can tell
            step = numbered_step(path)
        if step is None:
            return [], paths, [f"the steps are not known: {path} does not tell its own"]
        steps[path] = step
    paths = sorted(paths, key=lambda path: steps[path])  # stable: natural order for equal steps
    pairs = [
        f"step {steps[later]} is there twice: {earlier} and {later}"
        for earlier, later in itertools.pairwise(paths)
        if steps[earlier] == steps[later]
    ]
    return [steps[path] for path in paths], paths, _at_most(pairs)


def _retyped(first: Layout, other: Layout) -> str:
    expected = {spec.name: spec.dtype for spec in first.tensors}
    spec = next(spec for spec in other.tensors if expected[spec.name] != spec.dtype)
    return f"has {spec.name!r} in {spec.dtype}, the first checkpoint in {expected[spec.name]}"


def _distance(before: Mapping[str, Tensor] | None, after: Mapping[str, Tensor] | None) -> float | None:
    """The L2 norm of the difference, in float64; ``None`` if one is missing, they do not fit, or it is not finite."""
    if before is None or after is None or shapes_of(before) != shapes_of(after):
        return None
    squares = 0.0
    for name in after:
        if after[name].is_floating_point():
            flat = (torch.split(tensor.detach().reshape(-1), _AT_ONCE) for tensor in (before[name], after[name]))
            squares += sum(float((b.double() - a.double()).square().sum()) for a, b in zip(*flat, strict=True))
    return _finite(math.sqrt(squares))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _gaps(steps: Sequence[int]) -> list[str]:
    """Warnings of unusual distances between steps.

    If no distance is usual, those above twice or below half the median are unusual.
    """
    pairs = [(earlier, later) for earlier, later in itertools.pairwise(steps) if later > earlier]
    if not pairs:
        return []
    distances = sorted(later - earlier for earlier, later in pairs)
    usual, count = collections.Counter(distances).most_common(1)[0]
    low, high = float(usual), float(usual)
    if 2 * count < len(pairs):
        usual = distances[len(distances) // 2]
        low, high = usual / 2, usual * 2
    return _at_most(
        [
            f"gap: {later - earlier} from step {earlier} to {later}, where {usual} is usual"
            for earlier, later in pairs
            if not low <= later - earlier <= high
        ]
    )


def _step_names(trajectory: Trajectory) -> list[str]:
    return [f"step {step}" for step in trajectory.steps]


def _duplicates(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Warnings of checkpoints with the same bytes; ``rows`` are names and hashes."""
    groups: dict[str, list[str]] = {}
    for name, sha256 in rows:
        groups.setdefault(sha256, []).append(name)
    return _at_most(
        [
            f"identical weights: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for names in groups.values()
            if len(names) > 1
        ]
    )


def _at_most(lines: list[str]) -> list[str]:
    more = [f"… and {len(lines) - _MOST_WARNINGS} more like this"] if len(lines) > _MOST_WARNINGS else []
    return lines[:_MOST_WARNINGS] + more
