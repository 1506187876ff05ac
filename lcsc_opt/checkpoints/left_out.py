"""The files of weights in the folder of a run that are not read, and why each is left out."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.checkpoints.folders import find_weights
from lcsc_opt.checkpoints.inventory import is_average
from lcsc_opt.checkpoints.names import OBJECTS_OF_ACCELERATE, has_weights_suffix, is_state_file

_DEEPEST = 4  # folders below that of the run
_MOST_FILES = 10_000  # that are looked at, for no more than a message
_MOST_PATTERNS = 3  # for one reason, in a message
_PIECES = ".distcp"  # of torch.distributed.checkpoint


def why_left_out(folder: Path, used: Sequence[Path], key: str | None) -> dict[Path, str]:
    """What is not read below a run's folder, each with its reason; by names alone.

    These are files of weights, and folders that are named as the checkpoints are but hold none.

    Args:
        folder: of the run.
        used: its checkpoints.
        key: which state dict of each, as the user chose it.
    """
    read = {file for checkpoint in used for file in _files_read(checkpoint, key)}
    checkpoint_folders = {path for path in used if path.is_dir()}
    places = {path.parent for path in used}
    left_out: dict[Path, str] = dict.fromkeys(_like(checkpoint_folders), "without weights")
    for file in _weights_below(folder):
        if file in read or not left_out.keys().isdisjoint(file.parents):
            continue
        if file.name.startswith(OBJECTS_OF_ACCELERATE):
            left_out[file] = "objects of the trainer, among which its average is looked for"
        elif is_state_file(file):
            left_out[file] = "states of the training"
        elif is_average(file.stem) or is_average(file.parent.name):
            left_out[file] = "averages of the weights"
        elif not checkpoint_folders.isdisjoint(file.parents):
            left_out[file] = "other parts of a checkpoint"
        elif file.parent in places:
            left_out[file] = "of other names than the checkpoints"
        else:
            left_out[file] = "in other folders"
    return left_out


def shown_left_out(folder: Path, left_out: Mapping[Path, str]) -> str:
    """Paths by reason, those that differ in their numbers as one: ``8 checkpoint-*/optimizer.bin (states of …)``."""
    alike: dict[tuple[str, str], list[str]] = {}  # reason and pattern → paths
    for path, reason in left_out.items():
        name = path.name
        if path.is_relative_to(folder):  # else the user named a file outside of it, or a glob
            name = str(path.relative_to(folder))
        alike.setdefault((reason, _pattern(name)), []).append(name)
    shown: dict[str, list[str]] = {}
    for (reason, pattern), names in alike.items():
        if len(names) > 1:
            names = [f"{len(names)} {pattern}"]
        shown.setdefault(reason, []).extend(names)
    return "; ".join(f"{_listed(texts)} ({reason})" for reason, texts in shown.items())


def _pattern(name: str) -> str:
    """A name with ``*`` for its numbers."""
    return re.sub("[0-9]+", "*", name)


def _like(checkpoint_folders: Collection[Path]) -> list[Path]:
    """The folders next to folders of checkpoints whose names differ from theirs only in numbers."""
    patterns = {path.parent / _pattern(path.name) for path in checkpoint_folders}
    siblings = [path for place in {pattern.parent for pattern in patterns} for path in place.iterdir()]
    alike = [path for path in siblings if path.parent / _pattern(path.name) in patterns and path.is_dir()]
    return sorted(set(alike) - set(checkpoint_folders))


def _listed(texts: Sequence[str]) -> str:
    """The first texts, and how many more there are."""
    further = len(texts) - _MOST_PATTERNS
    if further > 0:
        texts = [*texts[:_MOST_PATTERNS], f"{further} more"]
    return ", ".join(texts)


def _files_read(checkpoint: Path, key: str | None) -> Collection[Path]:
    """The files that the weights of a checkpoint are in; none where they are not found."""
    if not checkpoint.is_dir():
        return {checkpoint}
    weights: Path | None = None
    with contextlib.suppress(TrajectoryError, OSError):
        if key is None:  # beside an average, the raw weights are read
            key, _ = find_weights(checkpoint, None).raw_and_average
        weights = find_weights(checkpoint, key).file
    if weights is None:
        return ()
    if weights.suffix == ".json":  # an index of model-00001-of-00002.safetensors or model.fp16-00001-of-…
        stem = weights.name.partition(".")[0]
        return {file for file in weights.parent.iterdir() if file.name.startswith((f"{stem}-", f"{stem}."))}
    return {weights, *weights.parent.glob(f"*{_PIECES}")}


def _weights_below(folder: Path) -> Iterator[Path]:
    """Files with the endings of checkpoints, in no packed trajectory; those of hidden folders are left out."""
    count = 0
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        is_trajectory = MANIFEST in names and WEIGHTS in names
        # what is left in this list is walked through, in its order
        if is_trajectory or depth == _DEEPEST:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count += len(names)
        if count > _MOST_FILES:
            return
        if is_trajectory:
            continue
        for name in sorted(names):
            file = Path(place, name)
            if not name.startswith(".") and (name.endswith(_PIECES) or has_weights_suffix(file)):
                yield file
