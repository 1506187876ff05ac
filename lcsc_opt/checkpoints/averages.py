"""The average of the weights that a trainer kept: beside them in a checkpoint, or in a file of its own."""

from __future__ import annotations

import contextlib
import filecmp
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.folders import file_of_weights, find_weights
from lcsc_opt.checkpoints.inventory import Inventory, Role, is_average
from lcsc_opt.checkpoints.matching import counterparts, named_averages
from lcsc_opt.checkpoints.names import CHECKPOINT_SUFFIXES, OBJECTS_OF_ACCELERATE, TORCH_SUFFIXES, read_names
from lcsc_opt.checkpoints.reading import is_constant, naming, read_checkpoint
from lcsc_opt.checkpoints.torch_files import map_tensors, read_content

_COMPARED = 4096  # numbers of a tensor; the rest need not be read
_CLEARLY = 0.5  # the distance of the nearest weights is less than this times that of the second nearest


class Average(NamedTuple):
    """An average of a checkpoint's weights: the file or folder that it is in, its key there, and the weights."""

    path: Path
    key: str
    tensors: Mapping[str, Tensor]

    @property
    def place(self) -> str:
        """For messages: the name of the file, and the key in it."""
        if not self.key:
            return self.path.name
        return f"{self.path.name} ({self.key})"


def trainers_averages(checkpoint: Path, key: str, earlier: Path) -> list[Average]:
    """The running averages that the trainer kept of the weights under ``key``; none if these are an average themselves.

    One in the checkpoint itself is the only one. Else files of their own are looked for, and those of higher rates come
    later: the slowest is the last. Such a file has "ema" in its name, or inside; and the names and shapes of the
    weights, or their shapes in order. Beside a file it has the step of the checkpoint in its name.

    What is the same in ``earlier``, the checkpoint before, does not follow the weights, so it is no average of them.
    """
    if is_average(key) or is_average(checkpoint.stem):
        return []
    inside = _key_beside(checkpoint, key, earlier)
    if inside is not None:
        tensors = read_checkpoint(checkpoint, key=inside).tensors
        # where the weights have an outer key ("model" of "model.net"), their names begin with the rest of it
        names = counterparts(tensors, read_checkpoint(checkpoint, key=key).tensors) or {}
        return [Average(checkpoint, inside, {names.get(name, name): tensor for name, tensor in tensors.items()})]
    weights: Mapping[str, Tensor] | None = None
    averages: list[Average] = []
    for file in _files_of_averages(checkpoint, key):
        if _is_unchanged(file, checkpoint, earlier):
            continue
        weights = weights or read_checkpoint(checkpoint, key=key).tensors  # only where there is such a file
        try:
            averages += _averages_in(file, weights)
        except TrajectoryError as error:
            notice(f"the trainer's EMA is left out: {error}")
    return sorted(averages, key=_rate)


def _rate(average: Average) -> float:
    """The rate in the name of an average: the largest decimal below one, as others count parameters; 0 without one."""
    return max(map(float, re.findall(r"0\.[0-9]+", average.path.name)), default=0.0)


def _key_beside(checkpoint: Path, key: str, earlier: Path) -> str | None:
    """The key of the running average in the checkpoint; ``None`` if there is none, or several.

    A file that cannot be read has none: the weights alone make a trajectory.
    """
    average: str | None = None
    with contextlib.suppress(TrajectoryError), naming(checkpoint):  # which makes any error of a damaged file one
        if checkpoint.is_dir():
            raw, average = find_weights(checkpoint, None).raw_and_average
            if raw != key:  # it is that of another part
                average = None
        elif checkpoint.name.endswith(TORCH_SUFFIXES):
            average = Inventory(read_content(checkpoint)).average_of(key)
    if average is None:
        return None
    if is_constant(average, earlier, checkpoint) and not is_constant(key, earlier, checkpoint):
        return None  # the weights have moved without it
    return average


def _files_of_averages(checkpoint: Path, key: str) -> Iterator[Path]:
    """Files that may hold an average of a checkpoint: in its folder; or beside its file, of the same step.

    Objects that a trainer registered with Accelerate are such files, too: among them is diffusers' ``EMAModel``.
    """
    with contextlib.suppress(OSError):
        if checkpoint.is_dir():
            weights = file_of_weights(checkpoint, key)
            for file in sorted(checkpoint.iterdir()):
                is_candidate = is_average(file.stem) or file.name.startswith(OBJECTS_OF_ACCELERATE)
                if file != weights and is_candidate and file.name.endswith(CHECKPOINT_SUFFIXES):
                    yield file
            return
        step = read_names([checkpoint])[0].numbers
        if not step:  # names without a step would all match
            return
        for file in sorted(checkpoint.parent.iterdir()):
            is_candidate = is_average(file.stem) and file.name.endswith(CHECKPOINT_SUFFIXES)
            if file != checkpoint and is_candidate and read_names([file])[0].numbers == step:
                yield file


def _is_unchanged(file: Path, checkpoint: Path, earlier: Path) -> bool:
    """Whether an average in a checkpoint's folder is the same, byte by byte, in that of an earlier one.

    Beside a checkpoint that is a file, the average's name has the step, so an earlier one has another name.
    """
    before = earlier / file.name
    return checkpoint.is_dir() and before.is_file() and filecmp.cmp(file, before, shallow=False)


def _averages_in(file: Path, weights: Mapping[str, Tensor]) -> list[Average]:
    """The averages of these weights in a file of their own, under the names of the weights.

    Raises:
        TrajectoryError: the file cannot be read, or holds averages that cannot be told apart.
    """
    if file.name.endswith(TORCH_SUFFIXES):
        with naming(file):
            candidates = _candidates_in(file, weights)
    else:
        candidates = {"": read_checkpoint(file).tensors}
    averages = []
    for key, tensors in candidates.items():
        names = counterparts(tensors, weights)
        if names is not None:
            averages.append(Average(file, key, {names[name]: tensor for name, tensor in tensors.items()}))
    return averages


def _candidates_in(file: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Key → the tensors of each container in a torch file that is called an average, by its key or the file's name."""
    candidates: dict[str, dict[str, Tensor]] = {}
    for container in Inventory(read_content(file)).containers:
        if not (container.is_shadow or container.role is Role.AVERAGE or is_average(file.stem)):
            continue
        if container.has_no_names:
            listed = map_tensors(file, {str(number): tensor for number, tensor in container.tensors.items()})
            candidates[container.key] = _named([*listed.values()], weights)
        else:
            candidates[container.key] = map_tensors(file, container.named)
    return candidates


def _named(averages: Sequence[Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → average, of a list without names in the order of the network's parameters; empty for another network's.

    Weights out of a safetensors file are in the order of their names instead. Then an average is that of the weights of
    its shape that are by far the nearest to it.

    Raises:
        TrajectoryError: weights of one shape are too near to each other.
    """
    with contextlib.suppress(TrajectoryError):
        return named_averages(averages, weights)
    of_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in weights.items():
        of_shape.setdefault(tuple(tensor.shape), []).append(name)
    named: dict[str, Tensor] = {}
    for average in averages:
        candidates = of_shape.get(tuple(average.shape))
        if candidates is None:
            return {}  # of another network
        distances = sorted((_distance(average, weights[name]), name) for name in candidates)
        is_clear = len(distances) == 1 or distances[0][0] < _CLEARLY * distances[1][0]
        if not is_clear or distances[0][1] in named:
            raise TrajectoryError(
                f"holds {len(averages)} averages without names, which cannot be told apart: give a state dict of them "
                "in the setting trainer_ema."
            )
        named[distances[0][1]] = average
    return named


def _distance(average: Tensor, weights: Tensor) -> float:
    """The Euclidean distance between the first numbers of two tensors of one shape."""
    difference = average.reshape(-1)[:_COMPARED].double() - weights.reshape(-1)[:_COMPARED].double()
    return float(difference.norm())
