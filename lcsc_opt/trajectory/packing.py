"""Checkpoints as users name them → a packed trajectory: packed, or opened where it is packed already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.checkpoints.finding import Patterns, Selection, as_patterns
from lcsc_opt.trajectory.continuing import open_again
from lcsc_opt.trajectory.filling import is_trajectory, pack_once, pack_sources
from lcsc_opt.trajectory.layout import EXACT, stored_dtype
from lcsc_opt.trajectory.sources import PackRequest
from lcsc_opt.trajectory.trajectory import Trajectory

_EVERYTHING = Selection()


def pack(
    patterns: Patterns,
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    key: str | None = None,
    selection: Selection = _EVERYTHING,
    overwrite: bool = False,
    dtype: str = EXACT,
) -> Trajectory:
    """Pack checkpoints into the trajectory ``out``, in the order of their steps.

    Steps are found and selected before any weights are read. One checkpoint is in memory at a time. The trajectory
    grows in ``OUT.partial`` and gets its name when it is complete. After an interruption, the same call continues where
    it stopped.

    ``out`` is the new folder, by convention ``NAME.trajectory``; with ``overwrite`` it may replace a trajectory. The
    other arguments are those of :class:`~lcsc_opt.trajectory.sources.PackRequest`.

    Raises:
        TrajectoryError: a file cannot be read as weights, or does not tell its step; fewer than two checkpoints, a step
            twice, other models, too little disk space, ``out`` exists, or another process packs to it.
    """
    stored_dtype(dtype)  # refuses an unknown one before anything is read
    out = expanded_path(out, error=TrajectoryError)
    if out.is_symlink():  # what it leads to is replaced, and the link stays
        out = Path(os.path.realpath(out))
    request = PackRequest(as_patterns(patterns), out.parent, key=key, selection=selection, steps=steps, dtype=dtype)
    if request.packed_path is not None:
        raise TrajectoryError(f"{request.packed_path} is packed already: name the checkpoints that it was packed from.")
    # locked before anything is looked at: another process may finish ``out`` meanwhile
    with only_process(out, busy=TrajectoryError(f"Another process packs to {out}: wait until it is done.")):
        if out.exists() and not is_trajectory(out):
            raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
        if out.exists() and not overwrite:
            raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")
        return pack_sources(request, request.selected_sources(), out)


def open_request(request: PackRequest) -> Trajectory:
    """Open a packed trajectory, or pack checkpoints once and open the result from then on.

    It stays in the request's folder until it is deleted. A second process that asks for the same waits for the first.
    After an interruption the next call continues where it stopped. A study that continues gets the checkpoints that it
    began with.

    Raises:
        TrajectoryError: as :func:`pack`; or a packed trajectory was named with options that it does not have.
    """
    if request.study_checkpoints is not None:
        return open_again(request, request.study_checkpoints)
    path = request.packed_path
    if path is not None:
        return _open_packed(request, path)
    return pack_once(request, request.selected_sources())


def _open_packed(request: PackRequest, path: Path) -> Trajectory:
    """Open the packed trajectory that was named, and select from it.

    Raises:
        TrajectoryError: it was packed with another key or dtype than the request has, or the request names steps.
    """
    trajectory = Trajectory.open(path)
    packed_with = {"key": trajectory.metadata.get("key", ""), "stored": trajectory.stored or EXACT}
    for option, asked in (("key", request.key), ("stored", request.dtype)):
        if asked not in (None, packed_with[option]):
            raise TrajectoryError(
                f"{path} was packed with {option} {packed_with[option]!r}, not {asked!r}: leave it out, or pack again."
            )
    if request.steps is not None:
        raise TrajectoryError(f"{path} is packed: leave out steps, which it has.")
    if not request.selection.given:
        return trajectory
    return Trajectory.open(path, steps=request.selection.chosen(trajectory.steps))
