"""The checkpoints of a study that continues: exactly those that it began with, wherever they are now.

A study knows its checkpoints by their steps and their hash. They are opened where they were packed, or found beside
the database, or packed again; the folder that the study file names may have grown meanwhile, or be gone.
"""

from __future__ import annotations

import contextlib
import glob
from pathlib import Path
from typing import NamedTuple

from lcsc_opt.base.digests import Digests
from lcsc_opt.base.errors import LcscError, TrajectoryError
from lcsc_opt.base.paths import MANIFEST, KnownCheckpoints, expanded_path
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.trajectory.filling import pack_once, read_row
from lcsc_opt.trajectory.manifest import Manifest
from lcsc_opt.trajectory.sources import PackRequest, Sources
from lcsc_opt.trajectory.trajectory import Trajectory


def open_again(request: PackRequest, checkpoints: KnownCheckpoints) -> Trajectory:
    """Open a study's checkpoints: what is packed is looked for first, and packed again only if it is nowhere.

    A notice says if what the study file names has changed.

    Raises:
        TrajectoryError: they are neither where the study file says nor beside the database.
    """
    trajectory: Trajectory | None = None
    if checkpoints.packed is not None:  # in a worker; the search has found it there, and said what changed
        trajectory = Trajectory.holding(checkpoints.packed, checkpoints)
        if trajectory is not None:
            return trajectory
    if request.packed_path is not None:
        trajectory = Trajectory.holding(request.packed_path, checkpoints)
    if trajectory is None and not checkpoints.moved:  # else they have to be at the new place
        trajectory = find_packed(request.folder, checkpoints)
    if trajectory is None:
        trajectory = _packed_again(request, checkpoints)
    place = ", ".join(map(str, request.patterns))
    continuing = f"continuing with the {len(checkpoints.steps)} packed checkpoints"
    if not any(map(_exists, request.patterns)):
        notice(f"{place}: is gone; {continuing}")
    elif changes_at(request, checkpoints) != Changes():
        notice(f"{place}: has changed; {continuing}; to search what is there now: lcsc run FILE name=NEW")
    return trajectory


def find_packed(folder: Path, checkpoints: KnownCheckpoints) -> Trajectory | None:
    """The packed trajectory of a study's checkpoints in the folder, whatever files it was packed from."""
    for path in sorted(folder.glob("*.trajectory")):
        trajectory = Trajectory.holding(path, checkpoints)
        if trajectory is not None:
            return trajectory
    return None


def _packed_again(request: PackRequest, checkpoints: KnownCheckpoints) -> Trajectory:
    """The study's checkpoints, packed from the files that are there."""
    study_sources = _of_study(checkpoints, request.sources_if_any())
    if len(study_sources) == len(checkpoints.steps):
        trajectory = pack_once(request, study_sources)
        if trajectory.sha256 == checkpoints.sha256:
            return trajectory
    place = ", ".join(map(str, request.patterns))
    raise TrajectoryError(
        f"{place}: does not hold the {len(checkpoints.steps)} checkpoints that the study was begun with (steps "
        f"{checkpoints.steps[0]} to {checkpoints.steps[-1]}), or not with these weights, and "
        f"{request.folder} has no packed copy of them: put them back, or say where they are now (lcsc run FILE "
        "objective.settings.checkpoints=PLACE), or give the study another name"
    )


class Changes(NamedTuple):
    """What has changed at the place of a study's checkpoints since it began.

    Attributes:
        written_again: whether their files hold other weights than when they were packed.
        has_later_steps: whether there are newer checkpoints that the setting ``last_step`` does not leave out.
    """

    written_again: bool = False
    has_later_steps: bool = False


def changes_at(request: PackRequest, checkpoints: KnownCheckpoints) -> Changes:
    """What has changed; weights are read only of files that have another time, and steps if there are newer files."""
    steps: list[int] = []
    path = request.packed_path
    if path is not None:
        with contextlib.suppress(TrajectoryError):  # a broken one holds no checkpoint
            steps = [checkpoint.step for checkpoint in Manifest.load(path).checkpoints]
        is_other = Trajectory.holding(path, checkpoints) is None
    else:
        packed = find_packed(request.folder, checkpoints)
        if packed is None or not _came_after(request, packed.path):
            return Changes()
        sources = request.sources_if_any()
        steps = list(sources)
        study_sources = _of_study(checkpoints, sources)
        is_complete = len(study_sources) == len(checkpoints.steps)
        # files that are gone were not written again
        is_other = is_complete and not _have_same_bytes(request, study_sources, packed)
    last_step = request.selection.last_step or max(steps, default=0)
    return Changes(is_other, any(checkpoints.steps[-1] < step <= last_step for step in steps))


def _have_same_bytes(request: PackRequest, sources: Sources, packed: Trajectory) -> bool:
    """Whether files hold the weights that were packed. Those with another time, as of a copy, are read again, once."""
    if request.path_of(sources) == packed.path:  # none has another size or time
        return True
    key = packed.metadata.get("key", "")
    stored = packed.stored
    digests = Digests(request.folder)

    def digest_of_row(path: Path) -> str:
        return read_row(path, key, stored).sha256

    expected = dict(zip(packed.steps, packed.checkpoint_sha256, strict=True))
    try:
        return all(
            digests.of(path, digest_of_row, kind=f"row {key} {stored}") == expected[step]
            for step, path in sources.items()
        )
    except (OSError, LcscError):  # one cannot be read any more
        return False


def _came_after(request: PackRequest, packed: Path) -> bool:
    """Whether there are files of weights that were not here when the trajectory ``packed`` was made."""
    try:
        paths = find_checkpoints(request.patterns, key=request.key)
        # the time of change, since a copy may keep the original's time of modification
        packed_at = (packed / MANIFEST).stat().st_ctime
        return any(path.stat().st_ctime > packed_at for path in paths)
    except (TrajectoryError, OSError):
        return False


def _of_study(checkpoints: KnownCheckpoints, sources: Sources) -> Sources:
    """The sources of a study's checkpoints, among all that are there now."""
    return {step: path for step, path in sources.items() if step in checkpoints.steps}


def _exists(pattern: str | Path) -> bool:
    """Whether something is at a path. A glob always counts: nobody can tell that it is gone."""
    return glob.has_magic(str(pattern)) or expanded_path(pattern, error=TrajectoryError).exists()
