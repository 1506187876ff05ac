"""Checkpoints as users name them → a packed trajectory: packed, or opened where it is packed already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import KnownCheckpoints, expanded_path
from lcsc_opt.checkpoints.finding import Patterns, Selection, find_checkpoints, is_packed
from lcsc_opt.trajectory.cached import PackRequest, as_patterns
from lcsc_opt.trajectory.continuing import open_again
from lcsc_opt.trajectory.filling import is_trajectory, pack_sources
from lcsc_opt.trajectory.layout import EXACT, stored_dtype
from lcsc_opt.trajectory.sources import find_sources, select_sources, sources_fingerprint
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

    Args:
        patterns: files, globs or folders, as for :func:`find_checkpoints`; or one packed trajectory.
        out: the new folder, by convention ``NAME.trajectory``.
        steps: the training step of each checkpoint that is found, ``[K]``; ``None`` reads them from metadata, names
            and contents. Checkpoints that hold their step must agree.
        key: which state dict of each file; ``None`` finds it in the first one, raw weights before their average, and
            uses the same for all.
        selection: which checkpoints are used.
        overwrite: replace a trajectory at ``out``.
        dtype: ``exact`` stores every bit; ``float16`` and ``bfloat16`` round floating-point weights.

    Raises:
        TrajectoryError: a file cannot be read as weights, does not tell its step, or holds another one than ``steps``
            says; fewer than two checkpoints, a step twice, checkpoints of different models, too little disk space,
            ``out`` exists, or another process packs to it.
    """
    stored_dtype(dtype)  # refuses an unknown one before anything is read
    out = Path(out)
    if out.exists() and not is_trajectory(out):
        raise TrajectoryError(f"{out} exists and is not a trajectory: name another output.")
    if out.exists() and not overwrite:
        raise TrajectoryError(f"{out} exists: name another output, or pass --overwrite.")
    packed = _packed_checkpoints(patterns, out, key, steps)
    if packed is None:
        paths = find_checkpoints(patterns, key=key, has_steps=steps is not None)
        sources = select_sources(find_sources(paths, steps), selection)
    else:
        sources = select_sources(dict.fromkeys(packed.steps, packed.path), selection)
    with only_process(out, busy=TrajectoryError(f"Another process packs to {out}: wait until it is done.")):
        fingerprint = sources_fingerprint(sources, key, dtype)
        return pack_sources(
            sources, out, key=key, dtype=dtype, fingerprint=fingerprint, packed=packed, steps_given=steps is not None
        )


def _packed_checkpoints(
    patterns: Patterns,
    out: Path,
    key: str | None,
    steps: Sequence[int] | None,
) -> Trajectory | None:
    """The trajectory that the patterns name, to be packed again; ``None`` if they name files."""
    named = as_patterns(patterns)
    if len(named) != 1:
        return None
    path = expanded_path(named[0], error=TrajectoryError)
    if not is_packed(path):
        return None
    if path.resolve() == out.resolve():
        raise TrajectoryError(f"{path} cannot be packed into itself: name another output.")
    if key is not None or steps is not None:
        raise TrajectoryError(f"{path} is packed: leave out --key and --steps.")
    return Trajectory.open(path)


def open_or_pack(
    patterns: Patterns,
    *,
    folder: Path,
    key: str | None = None,
    selection: Selection = _EVERYTHING,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
    study_checkpoints: KnownCheckpoints | None = None,
) -> Trajectory:
    """Open a packed trajectory, or pack checkpoints once and open the result from then on.

    A packed trajectory is named by the hash of the sources' paths, sizes and times, their steps, the key and the dtype.
    It stays in ``folder`` until it is deleted. A second process that asks for the same waits for the first. After an
    interruption the next call continues where it stopped.

    Args:
        patterns: one packed trajectory, or patterns as for :func:`pack`.
        folder: for packed checkpoints, as ``context.files`` of an objective.
        key: as for :func:`pack`; for a packed trajectory it must be the one it was packed with.
        selection: as for :func:`pack`; for a packed trajectory none, since its checkpoints were selected already.
        steps: as for :func:`pack`.
        dtype: as for :func:`pack`, ``None`` is ``exact``; for a packed trajectory it must be the one it stores.
        study_checkpoints: the ones that a study was begun with, which are opened instead when it continues.

    Raises:
        TrajectoryError: as :func:`pack`; or a packed trajectory was named with options that it does not have.
    """
    request = PackRequest(
        patterns=as_patterns(patterns),
        folder=folder,
        key=key,
        selection=selection,
        steps=steps,
        dtype=dtype,
        study_checkpoints=study_checkpoints,
    )
    return open_request(request)


def open_request(request: PackRequest) -> Trajectory:
    """As :func:`open_or_pack`."""
    if request.study_checkpoints is not None:
        return open_again(request, request.study_checkpoints)
    path = request.packed_path
    if path is not None:
        return _open_packed(request, path)
    return request.pack_once(request.selected_sources())


def _open_packed(request: PackRequest, path: Path) -> Trajectory:
    """Open the packed trajectory that was named, and refuse options that it was not packed with."""
    trajectory = Trajectory.open(path)
    options = list(request.selection.given)
    if request.steps is not None:
        options.append("steps")
    if options:
        raise TrajectoryError(
            f"{path} is packed: leave out {', '.join(options)}, or pack a selection of it (lcsc trajectory pack "
            "--select)."
        )
    packed_key = trajectory.metadata.get("key", "")
    if request.key not in (None, packed_key):
        raise TrajectoryError(
            f"{path} was packed with the key {packed_key!r}, not {request.key!r}: leave it out, or pack again."
        )
    stored = trajectory.stored or EXACT
    if request.dtype not in (None, stored):
        raise TrajectoryError(
            f"{path} stores {stored}, not {request.dtype}: leave stored out, or pack a copy (lcsc trajectory pack "
            f"--stored {request.dtype})."
        )
    return trajectory
