"""Which checkpoints are packed, and how: files and folders by their training steps, and the request of a user."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import KnownCheckpoints, expanded_path
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.finding import Selection, find_checkpoints, is_packed
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.watched import size_and_time
from lcsc_opt.trajectory.layout import EXACT, stored_dtype

Sources = Mapping[int, Path]
"""Training step → checkpoint that is not packed yet, in this order."""


@dataclasses.dataclass(frozen=True)
class PackRequest:
    """Which checkpoints a user wants, and how to pack them: :func:`~lcsc_opt.trajectory.packing.open_request`.

    Attributes:
        patterns: files, globs, folders, or one packed trajectory, which has its own key, steps and dtype.
        folder: where checkpoints are packed: for studies that beside the database, of
            :class:`lcsc_opt.base.paths.BuildContext`.
        key: which state dict of each file.
        selection: which of the checkpoints are used.
        steps: the training step of each checkpoint; ``None`` reads them from names and contents.
        dtype: how rows are stored; ``None`` if the user did not choose.
        study_checkpoints: the checkpoints that a study began with, if this continues one.
    """

    patterns: Sequence[str | Path]
    folder: Path
    key: str | None = None
    selection: Selection = dataclasses.field(default_factory=Selection)
    steps: Sequence[int] | None = None
    dtype: str | None = None
    study_checkpoints: KnownCheckpoints | None = None

    @property
    def stored(self) -> str | None:
        """What weights are rounded to where they are packed now; ``None`` keeps every bit."""
        return stored_dtype(self.dtype or EXACT)

    @property
    def packed_path(self) -> Path | None:
        """The packed trajectory that the patterns name, or ``None``."""
        if len(self.patterns) == 1:
            path = expanded_path(self.patterns[0], error=TrajectoryError)
            if is_packed(path):
                return path
        return None

    def sources(self) -> dict[int, Path]:
        """All checkpoints that match the patterns, by their steps.

        Raises:
            TrajectoryError: there are none, or their steps are unknown.
        """
        return find_sources(find_checkpoints(self.patterns, key=self.key, has_steps=self.steps is not None), self.steps)

    def sources_if_any(self) -> dict[int, Path]:
        """As :meth:`sources`, but empty if the checkpoints are gone or no longer form a trajectory."""
        try:
            return self.sources()
        except TrajectoryError:
            return {}

    def selected_sources(self) -> dict[int, Path]:
        """The selected checkpoints of :meth:`sources`, two or more; a notice says which.

        Raises:
            TrajectoryError: as :meth:`sources`, or fewer than two are selected.
        """
        sources = self.sources()
        steps = self.selection.chosen(list(sources))
        if self.selection.given:
            intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
            apart = " to ".join(str(interval) for interval in sorted({min(intervals), max(intervals)}))
            span = f"steps {steps[0]} to {steps[-1]}, {apart} apart"
            notice(f"of {len(sources)} checkpoints, selected {len(steps)}: {span}")
        return {step: sources[step] for step in steps}

    def fingerprint(self, sources: Sources) -> str:
        """What tells two packed trajectories apart: SHA-256, in hex, of the paths, sizes, times and steps of the
        checkpoints, the key and the dtype.

        Raises:
            TrajectoryError: a checkpoint cannot be read.
        """
        described = [(step, str(path.resolve()), *size_and_time(path)) for step, path in sources.items()]
        content: list[object] = [described, self.key]
        if self.stored is not None:
            content.append(self.stored)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path_of(self, sources: Sources) -> Path:
        """The path of the trajectory packed from these sources, which is named by what they are; it need not exist."""
        return path_of_packed(self.folder, self.fingerprint(sources))


def path_of_packed(folder: Path, fingerprint: str) -> Path:
    """The path of a packed trajectory in the folder; 24 hex digits of the fingerprint tell more than enough apart."""
    return folder / f"{fingerprint[:24]}.trajectory"


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
