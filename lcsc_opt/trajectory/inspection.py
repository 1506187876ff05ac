"""The contents of a packed trajectory, and warnings about it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from lcsc_opt.checkpoints.names import read_names
from lcsc_opt.trajectory.layout import EXACT
from lcsc_opt.trajectory.trajectory import Trajectory


def inspect(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a packed trajectory.

    Args:
        path: of the trajectory.
        verify: compare its bytes with the hashes in its manifest.

    Returns:
        A mapping that can be written as JSON:

        * ``path``, ``sha256``, and ``key``: which state dict of each file; ``""`` if a file is one state dict;
        * ``series``: the names of its checkpoints without their steps; empty for those that a training loop wrote;
        * ``checkpoints`` (K), ``parameters`` (P, floating-point scalars of one), ``tensors`` (how many one has);
        * ``dtypes`` that occur, each once; ``stored``: ``exact``, or what floating-point weights were rounded to;
        * ``bytes``: size of the tensors of all checkpoints; ``verified``: whether all were compared with their hashes;
        * ``first_step``, ``last_step``, and ``intervals`` between steps that occur; ``steps``: ``[K]``;
        * ``warnings``: one line each.

    Raises:
        TrajectoryError: there is none, or it is damaged.
    """
    trajectory = Trajectory.open(path)
    if verify:
        trajectory.verify()
    steps = trajectory.steps
    sources = [Path(source) for source in trajectory.sources if source]
    return {
        "path": str(trajectory.path),
        "key": trajectory.metadata.get("key", ""),
        "checkpoints": len(trajectory),
        "stored": trajectory.stored or EXACT,
        "bytes": trajectory.nbytes,
        "sha256": trajectory.sha256,
        "verified": verify,
        "dtypes": list(dict.fromkeys(spec.dtype for spec in trajectory.tensors)),
        "series": sorted({named.series for named in read_names(sources)}),
        "parameters": trajectory.parameters,
        "tensors": len(trajectory.tensors),
        "first_step": steps[0],
        "last_step": steps[-1],
        "intervals": sorted({later - earlier for earlier, later in itertools.pairwise(steps)}),
        "steps": list(steps),
        "warnings": trajectory.identical(),
    }
