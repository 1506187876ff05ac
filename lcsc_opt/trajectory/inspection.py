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
from lcsc_opt.trajectory.disk.layout import Layout, all_finite, plan, row_sha256
from lcsc_opt.trajectory.disk.manifest import trajectory_sha256
from lcsc_opt.trajectory.disk.saving import EXACT
from lcsc_opt.trajectory.store import Trajectory

AT_ONCE = 2**18  # numbers converted to float64 at once
MOST_WARNINGS = 5  # of one kind


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
        stored: ``exact``, or the dtype of the differences that are stored instead of the weights.
        relative_error: of merged weights, from storing differences, measured when they were packed; ``None`` if rows
            are exact or it was not measured.
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
    relative_error: float | None
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
        return _inspect_packed(Path(alone[0]).expanduser(), verify=verify)
    if verify:
        raise TrajectoryError("Only a packed trajectory has hashes to verify: name one alone, or leave out --verify.")
    return _inspect_files(" ".join(map(str, alone)), find_checkpoints(alone, key=key), key)


def _inspect_packed(path: Path, *, verify: bool) -> Inspection:
    trajectory = Trajectory.open(path)
    if verify:
        trajectory.verify()
    steps = list(trajectory.steps)
    series = _series([Path(source) for source in trajectory.sources if source])
    return Inspection(
        path=str(path),
        packed=True,
        series=series,
        key=trajectory.metadata.get("key", ""),
        checkpoints=len(trajectory),
        parameters=trajectory.parameters,
        tensors=len(trajectory.names),
        dtypes=list(trajectory.dtypes),
        stored=trajectory.stored or EXACT,
        relative_error=trajectory.relative_error,
        bytes=trajectory.nbytes,
        first_step=steps[0],
        last_step=steps[-1],
        intervals=_intervals(steps),
        sha256=trajectory.sha256,
        verified=verify,
        steps=steps,
        difference_norms=[_finite(norm) for norm in trajectory.difference_norms()],
        warnings=[
            *_mixed_series(series),
            *_gaps(steps),
            *identical_checkpoints(trajectory),
        ],
    )


@dataclasses.dataclass
class _Reading:
    """The findings while checkpoints are read one after the other."""

    layout: Layout | None = None
    key: str | None = None
    bytes: int = 0
    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (name, SHA-256) of those like the first
    dtypes: dict[str, None] = dataclasses.field(default_factory=dict)
    norms: list[float | None] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    not_finite: list[str] = dataclasses.field(default_factory=list)
    mixed: list[str] = dataclasses.field(default_factory=list)
    retyped: list[str] = dataclasses.field(default_factory=list)


def _inspect_files(shown: str, paths: list[Path], key: str | None) -> Inspection:
    steps, paths, complaints = _in_order(paths)
    names = [f"step {step} ({path.name})" for step, path in zip(steps, paths, strict=True)] if steps else []
    reading = _Reading(key=key)
    _read_all(paths, names or [path.name for path in paths], reading)
    if reading.layout is None:
        raise TrajectoryError(reading.broken[0])
    series = _series(paths)
    layout = reading.layout
    whole = len(reading.rows) == len(paths) and len(set(steps)) == len(paths)
    rows = zip(steps, (sha256 for _, sha256 in reading.rows), strict=True) if whole else None
    return Inspection(
        path=shown,
        packed=False,
        series=series,
        key=reading.key or "",
        checkpoints=len(paths),
        parameters=sum(spec.numel for spec in layout.tensors if spec.merged),
        tensors=len(layout.tensors),
        dtypes=list(reading.dtypes),
        stored=EXACT,
        relative_error=None,
        bytes=reading.bytes,
        first_step=steps[0] if steps else None,
        last_step=steps[-1] if steps else None,
        intervals=_intervals(steps),
        sha256=None if rows is None or reading.not_finite else trajectory_sha256(layout.tensors, rows),
        verified=False,
        steps=steps,
        difference_norms=reading.norms,
        warnings=[
            *complaints,
            *_at_most(reading.broken),
            *_mixed_series(series),
            *_gaps(steps),
            *_duplicates(reading.rows),
            *_at_most(reading.not_finite),
            *_at_most(reading.mixed),
            *_at_most(reading.retyped),
        ],
    )


def _in_order(paths: list[Path]) -> tuple[list[int], list[Path], list[str]]:
    """The steps (empty if they are not known), the paths in their order, and warnings about the steps."""
    steps: dict[Path, int] = {}
    for path in paths:
        step = _step(path)
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


def _step(path: Path) -> int | None:
    try:
        return checkpoint_step(path)
    except TrajectoryError:  # if the file is damaged, only its name can tell
        return numbered_step(path)


def _read_all(paths: list[Path], names: list[str], reading: _Reading) -> None:
    before: Mapping[str, Tensor] | None = None
    with progress("read", len(paths)) as advance:
        for position, (path, name) in enumerate(zip(paths, names, strict=True)):
            tensors = _read(path, name, reading)
            if position:
                reading.norms.append(_distance(before, tensors))
            before = tensors
            advance(note=path.name)


def _read(path: Path, name: str, reading: _Reading) -> Mapping[str, Tensor] | None:
    """Read one checkpoint and note what it is; ``None`` if it cannot be read."""
    try:
        checkpoint = read_checkpoint(path, key=reading.key)
        layout = plan(checkpoint.tensors)
    except TrajectoryError as error:
        reading.broken.append(str(error))
        return None
    if reading.layout is None:
        reading.layout, reading.key = layout, checkpoint.key
    reading.bytes += layout.row_bytes
    reading.dtypes.update(dict.fromkeys(spec.dtype for spec in layout.tensors))
    odd = _first_not_finite(layout, checkpoint.tensors)
    if odd is not None:
        reading.not_finite.append(f"NaN or infinity: tensor {odd!r} of {name}")
    differs = difference(layout.shapes, reading.layout.shapes)
    if differs is None and layout != reading.layout:
        reading.retyped.append(f"mixed dtypes: {name} {_retyped(reading.layout, layout)}")
    elif differs is not None:
        reading.mixed.append(f"mixed architectures: {name} {differs}")
    else:
        reading.rows.append((name, row_sha256(layout, checkpoint.tensors)))
    return checkpoint.tensors


def _first_not_finite(layout: Layout, tensors: Mapping[str, Tensor]) -> str | None:
    merged = (spec.name for spec in layout.tensors if spec.merged and spec.numel)
    return next((name for name in merged if not all_finite(tensors[name])), None)


def _retyped(first: Layout, other: Layout) -> str:
    expected = {spec.name: spec.dtype for spec in first.tensors}
    spec = next(spec for spec in other.tensors if expected[spec.name] != spec.dtype)
    return f"has {spec.name!r} in {spec.dtype}, the first checkpoint in {expected[spec.name]}"


def _distance(before: Mapping[str, Tensor] | None, after: Mapping[str, Tensor] | None) -> float | None:
    """The L2 norm of the difference, in float64; ``None`` if one is missing, they do not fit, or it is not finite."""
    if before is None or after is None or shapes_of(before) != shapes_of(after):
        return None
    squares = sum(_squared(before[name], after[name]) for name in after if after[name].is_floating_point())
    return _finite(math.sqrt(squares))


def _squared(before: Tensor, after: Tensor) -> float:
    flat = (tensor.detach().reshape(-1) for tensor in (before, after))
    pairs = zip(*(torch.split(tensor, AT_ONCE) for tensor in flat), strict=True)
    return sum(float((a.to(torch.float64) - b.to(torch.float64)).square().sum()) for b, a in pairs)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _series(paths: Sequence[Path]) -> list[str]:
    return sorted(set(map(checkpoint_series, paths)))


def _mixed_series(series: Sequence[str]) -> list[str]:
    return [f"several series of checkpoints: {', '.join(series)}"] if len(series) > 1 else []


def _intervals(steps: Sequence[int]) -> list[int]:
    return sorted({later - earlier for earlier, later in itertools.pairwise(steps)})


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
    odd = [
        f"{later - earlier} from step {earlier} to {later}"
        for earlier, later in pairs
        if not low <= later - earlier <= high
    ]
    return [f"gap: {text}, where {usual} is usual" for text in odd[:MOST_WARNINGS]] + _more(odd)


def identical_checkpoints(trajectory: Trajectory) -> list[str]:
    """Warnings of checkpoints with the same bytes."""
    names = [f"step {step}" for step in trajectory.steps]
    return _duplicates(list(zip(names, trajectory.checkpoint_sha256, strict=True)))


def _duplicates(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Warnings of checkpoints with the same bytes; ``rows`` are names and hashes."""
    groups: dict[str, list[str]] = {}
    for name, sha256 in rows:
        groups.setdefault(sha256, []).append(name)
    same = [names for names in groups.values() if len(names) > 1]
    return _at_most([f"identical weights: {', '.join(names[:3])}{_rest(names)}" for names in same])


def _rest(names: Sequence[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _at_most(lines: list[str]) -> list[str]:
    return lines[:MOST_WARNINGS] + _more(lines)


def _more(lines: list[str]) -> list[str]:
    return [f"… and {len(lines) - MOST_WARNINGS} more like this"] if len(lines) > MOST_WARNINGS else []
