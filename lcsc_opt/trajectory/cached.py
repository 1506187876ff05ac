"""Packed trajectories in the cache folder, and what is asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.checkpoints.finding import Patterns, Selection, find_checkpoints, is_packed
from lcsc_opt.trajectory.filling import pack_sources
from lcsc_opt.trajectory.layout import EXACT
from lcsc_opt.trajectory.sources import Sources, find_sources, select_sources, sources_fingerprint
from lcsc_opt.trajectory.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class PackRequest:
    """Checkpoints as a user names them, and how they are packed; see :func:`~lcsc_opt.trajectory.packing.open_or_pack`.

    Attributes:
        patterns: files, globs, folders, or one packed trajectory.
        cache: the folder for files that can be made again.
        key: which state dict of each file.
        selection: which checkpoints to take.
        steps: of each checkpoint, or ``None``.
        dtype: how rows are stored; ``None`` if nobody said.
        study_checkpoints: those that a study began with, if one continues.
    """

    patterns: Sequence[str | Path]
    cache: Path
    key: str | None
    selection: Selection
    steps: Sequence[int] | None
    dtype: str | None
    study_checkpoints: KnownCheckpoints | None

    @property
    def stored(self) -> str:
        """How rows are stored."""
        return self.dtype or EXACT

    @property
    def packed_path(self) -> Path | None:
        """The packed trajectory that the patterns name, or ``None``."""
        if len(self.patterns) != 1:
            return None
        path = Path(self.patterns[0]).expanduser()
        return path if is_packed(path) else None

    def sources(self) -> dict[int, Path]:
        """All checkpoints that the patterns stand for, by their steps.

        Raises:
            TrajectoryError: there are none, or they do not tell their steps.
        """
        return find_sources(find_checkpoints(self.patterns, key=self.key), self.steps)

    def sources_if_any(self) -> dict[int, Path]:
        """As :meth:`sources`; empty if the checkpoints are gone or no longer form a trajectory."""
        try:
            return self.sources()
        except TrajectoryError:
            return {}

    def selected_sources(self) -> dict[int, Path]:
        """The selected ones of :meth:`sources`.

        Raises:
            TrajectoryError: as :meth:`sources`, or fewer than two are selected.
        """
        return select_sources(self.sources(), self.selection)

    def cached_path(self, sources: Sources) -> Path:
        """Where the trajectory of these sources is in the cache, or will be."""
        return self._place(sources_fingerprint(sources, self.key, self.stored))

    def _place(self, fingerprint: str) -> Path:
        return self.cache / "trajectories" / f"{fingerprint[:24]}.trajectory"

    def pack_once(self, sources: Sources) -> Trajectory:
        """Pack these sources into the cache, unless they are there. A second process waits for the first.

        Raises:
            TrajectoryError: as :func:`pack_sources`.
        """
        fingerprint = sources_fingerprint(sources, self.key, self.stored)
        out = self._place(fingerprint)
        if not out.exists():
            with only_process(out, busy=f"another process packs the same checkpoints to {out}: waiting"):
                if not out.exists():  # another process may have made it meanwhile
                    return pack_sources(sources, out, key=self.key, dtype=self.stored, fingerprint=fingerprint)
        return Trajectory.open(out)


def as_patterns(patterns: Patterns) -> Sequence[str | Path]:
    """Several patterns, also if one was given."""
    return [patterns] if isinstance(patterns, (str, Path)) else patterns


def find_in_cache(cache: Path, checkpoints: KnownCheckpoints) -> Trajectory | None:
    """A study's checkpoints in the cache, from whatever files they were packed."""
    for path in sorted((cache / "trajectories").glob("*.trajectory")):
        if is_packed(path):
            trajectory = Trajectory.holding(path, checkpoints)
            if trajectory is not None:
                return trajectory
    return None
