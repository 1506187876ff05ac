"""Checkpoints as a study file names them → a packed trajectory: opened, or packed once into the cache.

A study knows its checkpoints by their steps and their hash. When it continues, it gets exactly these again: from the
folder, which may have grown, or from the cache if the folder is gone.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import KnownCheckpoints, known_checkpoints
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints import read_checkpoint
from lcsc_opt.checkpoints.finding import Patterns, Selection, find_checkpoints, is_packed
from lcsc_opt.trajectory.layout import EXACT, check_same, row_sha256
from lcsc_opt.trajectory.manifest import load_manifest, trajectory_sha256
from lcsc_opt.trajectory.matrix import checked_dtype
from lcsc_opt.trajectory.packing import (
    EVERYTHING,
    PLAN,
    Source,
    check_room,
    find_sources,
    fingerprint,
    pack_sources,
    partial_of,
    selected,
)
from lcsc_opt.trajectory.trajectory import Trajectory


def open_or_pack(
    patterns: Patterns,
    *,
    cache: Path,
    key: str | None = None,
    selection: Selection = EVERYTHING,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
) -> Trajectory:
    """Open a packed trajectory, or pack checkpoints once and open the result from then on.

    When a study continues (:func:`lcsc_opt.base.paths.known_checkpoints`), its own trajectory is opened instead.

    Packed trajectories are in ``CACHE/trajectories``, under the hash of the sources' paths, sizes and times, their
    steps, the key and the dtype. They stay there until somebody deletes them. A second process that asks for the same
    waits for the first. After an interruption the next call continues where it stopped.

    Args:
        patterns: one packed trajectory, or what :func:`pack` takes.
        cache: the folder for files that can be made again.
        key: as for :func:`pack`; for a packed trajectory it must be the one it was packed with.
        selection: as for :func:`pack`; for a packed trajectory none, since its checkpoints were selected already.
        steps: as for :func:`pack`.
        dtype: as for :func:`pack`, ``None`` is ``exact``; for a packed trajectory it must be the one it stores.

    Raises:
        TrajectoryError: as :func:`pack`; or a packed trajectory does not take these options.
    """
    checked_dtype(dtype)
    alone = [patterns] if isinstance(patterns, (str, Path)) else patterns
    if (known := known_checkpoints()) is not None:
        return _open_known(known, alone, cache, key, steps, dtype or EXACT)
    if len(alone) == 1 and is_packed(Path(alone[0]).expanduser()):
        return _open_packed(Path(alone[0]).expanduser(), key, selection, steps, dtype)
    return _packed_once(selected(find_sources(find_checkpoints(alone, key=key), steps), selection), cache, key, dtype)


def check_checkpoints(
    patterns: Patterns, *, cache: Path, key: str | None, selection: Selection, dtype: str | None
) -> None:
    """Refuse what :func:`open_or_pack` would refuse before it packs; of weights only the first checkpoint's are read.

    Raises:
        TrajectoryError: as :func:`open_or_pack`.
    """
    alone = [patterns] if isinstance(patterns, (str, Path)) else patterns
    packed = len(alone) == 1 and is_packed(Path(alone[0]).expanduser())
    if (known := known_checkpoints()) is not None:
        if known.packed is not None:
            return
        own = [source for source in _sources(alone, key, None) if source.step in known.steps]
        if packed or len(own) == len(known.steps) or (not known.moved and _in_cache(cache, known) is not None):
            return
        raise _not_there(alone, known)
    if packed:
        _open_packed(Path(alone[0]).expanduser(), key, selection, None, dtype)
        return
    sources = selected(find_sources(find_checkpoints(alone, key=key)), selection)
    out = _place(cache, fingerprint(sources, key, dtype or EXACT))
    if not out.exists() and not is_packed(partial_of(out)):
        check_room(out, read_checkpoint(sources[0].path, key=key), len(sources), dtype or EXACT)


def _packed_once(sources: list[Source], cache: Path, key: str | None, dtype: str | None) -> Trajectory:
    dtype = dtype or EXACT
    identity = fingerprint(sources, key, dtype)
    out = _place(cache, identity)
    if not out.exists():
        with only_process(out, busy=lambda: notice(f"another process packs the same checkpoints to {out}: waiting")):
            if not out.exists():  # another process may have made it meanwhile
                return pack_sources(sources, out, key, identity, dtype)
    return Trajectory.open(out)


def _open_packed(
    path: Path, key: str | None, selection: Selection, steps: Sequence[int] | None, dtype: str | None
) -> Trajectory:
    trajectory = Trajectory.open(path)
    if selection.given or steps is not None:
        asked = ", ".join([*selection.given, *(["steps"] if steps is not None else [])])
        raise TrajectoryError(f"{path} is packed already: leave out {asked}, or name the checkpoints it was made from.")
    packed = trajectory.metadata.get("key", "")
    if key is not None and key != packed:
        raise TrajectoryError(f"{path} was packed with the key {packed!r}, not {key!r}: leave it out, or pack again.")
    there = trajectory.stored or EXACT
    if dtype not in (None, there):
        raise TrajectoryError(
            f"{path} stores {there}, not {dtype}: leave {dtype} out, or name the checkpoints it was made from."
        )
    return trajectory


def _open_known(
    known: KnownCheckpoints,
    patterns: Sequence[str | Path],
    cache: Path,
    key: str | None,
    steps: Sequence[int] | None,
    dtype: str,
) -> Trajectory:
    """Exactly the checkpoints that a study knows: from its packed trajectory or the cache, else packed again."""
    if known.packed is not None and (found := part_of(known.packed, known)) is not None:
        return found
    named = ", ".join(map(str, patterns))
    alone = Path(patterns[0]).expanduser() if len(patterns) == 1 else None
    if alone is not None and is_packed(alone) and (found := part_of(alone, known)) is not None:
        if len(there := load_manifest(alone).checkpoints) > len(found):
            notice(_grown(named, len(there), known))
        return found
    sources = _sources(patterns, key, steps)
    own = [source for source in sources if source.step in known.steps]
    identity = fingerprint(own, key, dtype)
    if not known.moved and (found := _in_cache(cache, known, identity)) is not None:
        if not own:
            notice(f"{named}: the study's checkpoints are gone; it goes on with their packed copy")
        elif found.metadata.get(PLAN) != identity and not _holds(found, own, key):
            notice(f"{named}: was written to since the study began; it goes on with the packed copy of what was there")
        elif len(sources) > len(own) and not known.selected:
            notice(_grown(named, len(sources), known))
        return found
    if len(own) == len(known.steps):
        made = _packed_once(own, cache, key, dtype)
        if made.sha256 == known.sha256:
            return made
    raise _not_there(patterns, known)


def _not_there(patterns: Sequence[str | Path], known: KnownCheckpoints) -> TrajectoryError:
    named = ", ".join(map(str, patterns))
    begun_with = f"the {len(known.steps)} checkpoints that the study was begun with"
    span = f"(steps {known.steps[0]} to {known.steps[-1]})"
    there = any(glob.has_magic(str(pattern)) or Path(pattern).expanduser().exists() for pattern in patterns)
    found = f"does not hold {begun_with} {span}, or not with these weights" if there else f"is gone, with {begun_with}"
    return TrajectoryError(
        f"{named}: {found}, and the cache has no packed copy of them: put them back, or say where they are now (lcsc "
        "run FILE objective.settings.checkpoints=PLACE), or give the study another name"
    )


def _sources(patterns: Sequence[str | Path], key: str | None, steps: Sequence[int] | None) -> list[Source]:
    """The sources that exist now; empty if they are gone or no longer form a trajectory."""
    try:
        return find_sources(find_checkpoints(patterns, key=key), steps)
    except TrajectoryError:
        return []


def _grown(named: str, there: int, known: KnownCheckpoints) -> str:
    return (
        f"{named}: holds {there} checkpoints now, and the study goes on with its own {len(known.steps)}; to begin on "
        f"all of them: lcsc fork STUDY NAME --checkpoints {named}"
    )


def _holds(packed: Trajectory, own: Sequence[Source], key: str | None) -> bool:
    """Whether the files, which were touched or copied, still hold the packed weights; they are read for that."""
    manifest, key = load_manifest(packed.path), key or packed.metadata.get("key")
    with contextlib.suppress(TrajectoryError):  # one is no checkpoint of this model any more
        for source, step, sha256 in zip(own, packed.steps, packed.checkpoint_sha256, strict=False):
            tensors = read_checkpoint(source.path, key=key).tensors
            check_same(manifest.layout, tensors, manifest.stored)
            if (source.step, row_sha256(manifest.layout, tensors)) != (step, sha256):
                return False
        return len(own) == len(packed)
    return False


def _in_cache(cache: Path, known: KnownCheckpoints, made_from: str | None = None) -> Trajectory | None:
    """The known checkpoints in the cache; of several packed copies the one made from these sources, else the newest."""
    folders = [path for path in (cache / "trajectories").glob("*.trajectory") if is_packed(path)]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found = [packed for path in folders if (packed := part_of(path, known)) is not None]
    return min(found, key=lambda packed: packed.metadata.get(PLAN) != made_from, default=None)


def _place(cache: Path, identity: str) -> Path:
    return cache / "trajectories" / f"{identity[:24]}.trajectory"


def part_of(path: Path, known: KnownCheckpoints) -> Trajectory | None:
    """The known checkpoints out of the packed ones at ``path``; ``None`` if they are not there."""
    try:
        manifest = load_manifest(path)
        rows = [(saved.step, saved.sha256) for saved in manifest.checkpoints if saved.step in known.steps]
        if trajectory_sha256(manifest.tensors, rows) != known.sha256:
            return None
        return Trajectory.open(path, steps=known.steps)
    except TrajectoryError:  # being written, broken, or gone
        return None
