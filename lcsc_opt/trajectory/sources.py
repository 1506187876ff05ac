"""Which checkpoints are packed: files and folders by their training steps, selected ones, and their fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.watched import size_and_time
from lcsc_opt.trajectory.layout import EXACT

Sources = Mapping[int, Path]
"""Training step → checkpoint that is not packed yet, in this order."""


def find_sources(paths: Sequence[Path], steps: Sequence[int] | None = None) -> dict[int, Path]:
    """The checkpoints by their steps, in this order. No weights are read.

    Args:
        paths: the checkpoints.
        steps: the step of each checkpoint; ``None`` reads them from metadata, names and contents.

    Raises:
        TrajectoryError: the step of a checkpoint is unknown; the numbers of steps and checkpoints differ; or two
            checkpoints have the same step.
    """
    if steps is None:
        steps = checkpoint_steps(paths)
    elif len(steps) != len(paths):
        raise TrajectoryError(f"--steps: expected {len(paths)}, one for each checkpoint, got {len(steps)}.")
    sources: dict[int, Path] = {}
    for step, path in sorted(zip(map(int, steps), paths, strict=True)):
        earlier = sources.get(step)
        if earlier is not None:
            raise TrajectoryError(
                f"Step {step} appears twice: {earlier} and {path}. Leave one out, or name the files of one series."
            )
        sources[step] = path
    return sources


def select_sources(sources: Sources, selection: Selection) -> dict[int, Path]:
    """The sources that ``selection`` chooses, two or more; a notice says which.

    Raises:
        TrajectoryError: fewer than two are left.
    """
    steps = selection.chosen(list(sources))
    selected = {step: sources[step] for step in steps}
    if selection.given:
        intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
        apart = " to ".join(str(interval) for interval in sorted({min(intervals), max(intervals)}))
        span = f"steps {steps[0]} to {steps[-1]}, {apart} apart"
        notice(f"of {len(sources)} checkpoints, selected {len(selected)}: {span}")
    return selected


def sources_fingerprint(sources: Sources, key: str | None, dtype: str) -> str:
    """SHA-256, in hex, of the paths, sizes, times and steps of the checkpoints, the key and the dtype.

    Raises:
        TrajectoryError: a checkpoint cannot be read.
    """
    described: list[tuple[int | str, ...]] = []
    for step, path in sources.items():
        size, newest = size_and_time(path)
        described.append((step, str(path.resolve()), size, newest))
    content: list[object] = [described, key]
    if dtype != EXACT:
        content.append(dtype)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
