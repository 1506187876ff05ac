"""Trajectories that are packed once into a folder, and the request that names one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import KnownCheckpoints, expanded_path
from lcsc_opt.checkpoints.finding import Selection, find_checkpoints, is_packed
from lcsc_opt.trajectory.filling import pack_sources
from lcsc_opt.trajectory.layout import EXACT
from lcsc_opt.trajectory.sources import Sources, find_sources, select_sources, sources_fingerprint
from lcsc_opt.trajectory.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class PackRequest:
    """Which checkpoints a user wants, and how to pack them: :func:`~lcsc_opt.trajectory.packing.open_or_pack`.

    Attributes:
        patterns: files, globs, folders, or one packed trajectory, which has its own key, steps and dtype.
        folder: where checkpoints are packed: that beside the database, of :class:`lcsc_opt.base.paths.BuildContext`.
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
    def stored(self) -> str:
        """How rows are stored."""
        return self.dtype or EXACT

    @property
    def packed_path(self) -> Path | None:
        """The packed trajectory that the patterns name, or ``None``."""
        if len(self.patterns) != 1:
            return None
        path = expanded_path(self.patterns[0], error=TrajectoryError)
        return path if is_packed(path) else None

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
        """The selected checkpoints of :meth:`sources`.

        Raises:
            TrajectoryError: as :meth:`sources`, or fewer than two are selected.
        """
        return select_sources(self.sources(), self.selection)

    def path_of(self, sources: Sources) -> Path:
        """The path of the trajectory packed from these sources, which is named by what they are; it need not exist."""
        return packed_path(self.folder, sources_fingerprint(sources, self.key, self.stored))

    def pack_once(self, sources: Sources) -> Trajectory:
        """Pack these sources unless that is done. A second process waits for the first.

        Raises:
            TrajectoryError: as :func:`pack_sources`.
        """
        out = self.path_of(sources)
        if not out.exists():
            with only_process(out, busy=f"another process packs the same checkpoints to {out}: waiting"):
                if not out.exists():  # another process may have made it meanwhile
                    return self.pack_to(out, sources)
        return Trajectory.open(out)

    def pack_to(self, out: Path, sources: Sources) -> Trajectory:
        """Pack these sources into ``out``, as :func:`pack_sources` does."""
        return pack_sources(
            sources,
            out,
            key=self.key,
            dtype=self.stored,
            fingerprint=sources_fingerprint(sources, self.key, self.stored),
            steps_given=self.steps is not None,
        )


def packed_path(folder: Path, fingerprint: str) -> Path:
    """The path of a packed trajectory with this fingerprint in the folder."""
    return folder / f"{fingerprint[:24]}.trajectory"


def find_packed(folder: Path, checkpoints: KnownCheckpoints) -> Trajectory | None:
    """The packed trajectory of a study's checkpoints in the folder, whatever files it was packed from."""
    for path in sorted(folder.glob("*.trajectory")):
        if is_packed(path):
            trajectory = Trajectory.holding(path, checkpoints)
            if trajectory is not None:
                return trajectory
    return None
