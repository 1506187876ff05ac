"""The contents of a trajectory, packed or not, and warnings about it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.checkpoints.finding import Patterns, find_checkpoints, is_packed
from lcsc_opt.checkpoints.names import read_names
from lcsc_opt.checkpoints.reading import read_checkpoint, searched_key
from lcsc_opt.trajectory.cached import as_patterns
from lcsc_opt.trajectory.layout import EXACT, Layout, TensorSpec
from lcsc_opt.trajectory.sources import find_sources
from lcsc_opt.trajectory.trajectory import Trajectory


def inspect(patterns: Patterns, *, key: str | None = None, verify: bool = False) -> dict[str, Any]:
    """Describe a packed trajectory, or checkpoints that :func:`find_checkpoints` finds.

    Of unpacked checkpoints only the first one is read; packing refuses those that do not fit it or are not finite.

    Args:
        patterns: as for :func:`find_checkpoints`, or one packed trajectory.
        key: which state dict of each file, as for :func:`read_checkpoint`; a packed trajectory has one already.
        verify: compare the bytes of a packed trajectory with the hashes in its manifest.

    Returns:
        A mapping that can be written as JSON:

        * ``path`` (what was inspected), ``packed`` (true for a packed trajectory);
        * ``series``: the names of its checkpoints without their steps; empty for those that a training loop wrote;
        * ``key``: which state dict of each file; ``""`` if a file is one state dict;
        * ``checkpoints`` (K), ``parameters`` (P, floating-point scalars of one), ``tensors`` (how many one has);
        * ``dtypes`` that occur, each once; ``stored``: ``exact``, or what floating-point weights were rounded to;
        * ``bytes``: size of the tensors of all checkpoints;
        * ``first_step``, ``last_step``: ``None`` if the steps are not known; ``intervals`` between steps that occur;
        * ``sha256``: of the packed trajectory, else ``None``;
        * ``verified``: whether all bytes were compared with their hashes;
        * ``steps``: ``[K]``; empty if they are not known;
        * ``difference_norms``: ``[K−1]``, the L2 norm of each checkpoint's difference from the one before it; empty if
          they are not packed;
        * ``warnings``: one line each.

    Raises:
        TrajectoryError: there is nothing; the first cannot be read; ``verify`` for unpacked ones, which have no
            hashes; or a packed one is damaged.
    """
    patterns = as_patterns(patterns)
    if len(patterns) == 1:
        path = expanded_path(patterns[0], error=TrajectoryError)
        if verify or is_packed(path):  # with verify, opening refuses a path that is not packed
            return _inspect_packed(path, verify)
    if verify:
        raise TrajectoryError("Only a packed trajectory has hashes to verify: name one alone, or leave out --verify.")
    return _inspect_files(" ".join(map(str, patterns)), find_checkpoints(patterns, key=key), key)


def _inspect_packed(path: Path, verify: bool) -> dict[str, Any]:
    trajectory = Trajectory.open(path)
    if verify:
        trajectory.verify()
    sources = [Path(source) for source in trajectory.sources if source]
    return {
        "path": str(trajectory.path),
        "packed": True,
        "key": trajectory.metadata.get("key", ""),
        "checkpoints": len(trajectory),
        "stored": trajectory.stored or EXACT,
        "bytes": trajectory.nbytes,
        "sha256": trajectory.sha256,
        "verified": verify,
        "difference_norms": trajectory.difference_norms().tolist(),
        **_described(trajectory.tensors, list(trajectory.steps), sources, trajectory.identical()),
    }


def _inspect_files(shown: str, paths: list[Path], key: str | None) -> dict[str, Any]:
    steps: list[int] = []
    warnings: list[str] = []
    try:
        sources = find_sources(paths)
    except TrajectoryError as error:  # which packing would raise
        warnings.append(str(error))
    else:
        steps = list(sources)
        paths = list(sources.values())
    first = read_checkpoint(paths[0], key=key or searched_key(*paths))
    layout = Layout.of(first.tensors)
    return {
        "path": shown,
        "packed": False,
        "key": first.key,
        "checkpoints": len(paths),
        "stored": EXACT,
        "bytes": layout.row_bytes * len(paths),
        "sha256": None,
        "verified": False,
        "difference_norms": [],
        **_described(layout.tensors, steps, paths, warnings),
    }


def _described(
    tensors: Sequence[TensorSpec],
    steps: list[int],
    paths: list[Path],
    warnings: list[str],
) -> dict[str, Any]:
    """The part of :func:`inspect`'s answer that packed and unpacked checkpoints have in common."""
    series = sorted({named.series for named in read_names(paths)})
    if len(series) > 1:
        warnings = [f"several series of checkpoints: {', '.join(series)}", *warnings]
    return {
        "dtypes": list(dict.fromkeys(spec.dtype for spec in tensors)),
        "series": series,
        "parameters": sum(spec.numel for spec in tensors if spec.merged),
        "tensors": len(tensors),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "intervals": sorted({later - earlier for earlier, later in itertools.pairwise(steps)}),
        "steps": steps,
        "warnings": warnings,
    }
