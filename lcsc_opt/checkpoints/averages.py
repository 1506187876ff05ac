"""The average of the weights that a trainer kept: beside them in a checkpoint, or in a file of its own."""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lcsc_opt.base.digests import stamp_of
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.records import TRAINER_EMA
from lcsc_opt.checkpoints.folders import file_of_weights
from lcsc_opt.checkpoints.inventory import COLLECTED, Inventory, Role, is_average, number_of, rate_in
from lcsc_opt.checkpoints.matching import counterparts, named_averages
from lcsc_opt.checkpoints.names import OBJECTS_OF_ACCELERATE, TORCH_SUFFIXES, has_weights_suffix, read_names
from lcsc_opt.checkpoints.pickles import shown
from lcsc_opt.checkpoints.reading import is_constant, keys_alike, keys_of_averages, naming, read_checkpoint
from lcsc_opt.checkpoints.torch_files import map_tensors, read_content
from lcsc_opt.checkpoints.weights import have_same_bits

_COMPARED = 4096  # numbers of a tensor; the rest need not be read
_CLEARLY = 0.5  # the distance of the nearest weights is less than this times that of the second nearest


class Average(NamedTuple):
    """An average of a checkpoint's weights, where it is: the file or folder, its key there, its rate, the weights.

    Attributes:
        rate: as the file or its name has it; empty without one.
        tensors: under the names of the weights.
    """

    path: Path
    key: str
    tensors: Mapping[str, Tensor]
    rate: str = ""

    @property
    def place(self) -> str:
        """For messages: the name of the file, and the key in it."""
        if not self.key:
            return self.path.name
        return f"{self.path.name} ({self.key})"

    @property
    def label(self) -> str:
        """What tells it from others: its rate, or its key, or its file."""
        return self.rate or self.key or self.path.stem


class Kept(NamedTuple):
    """The averages that a trainer kept with a checkpoint, those of higher rates later, and sentences for the user."""

    averages: list[Average]
    said: list[str]

    @property
    def names(self) -> list[str]:
        """How reports call them: ``trainer's EMA``, and of several each with its label."""
        if len(self.averages) == 1:
            return [TRAINER_EMA]
        labels = [average.label for average in self.averages]
        if len(set(labels)) < len(labels):  # of one rate in several files
            labels = [f"{average.label} {average.place}" for average in self.averages]
        return [f"{TRAINER_EMA} {label}" for label in labels]


def trainers_averages(checkpoint: Path, key: str, earlier: Path) -> Kept:
    """The averages that the trainer kept of the weights under ``key``; none if these are an average themselves.

    They are in the checkpoint, or in files of their own, which have "ema" in their names, or inside; and the names and
    shapes of the weights, or their shapes in order. Beside a file they have the step of the checkpoint in their names.
    Equal ones are one. What is the same in ``earlier``, the checkpoint before, does not follow the weights, so it is
    no average of them. One that cannot be read is said: the weights alone make a trajectory.
    """
    said: list[str] = []
    if is_average(checkpoint.stem) or (is_average(key) and not key.endswith(COLLECTED)):
        return Kept([], _raw_beside(checkpoint, key))
    said += _alike(checkpoint, key)
    averages = _inside(checkpoint, key, earlier, said)
    weights: Mapping[str, Tensor] | None = None
    beside: list[Average] = []
    for file in files_of_averages(checkpoint, key):
        if _is_unchanged(file, checkpoint, earlier):
            continue
        weights = weights or read_checkpoint(checkpoint, key=key).tensors  # only where there is such a file
        try:
            beside += _averages_in(file, weights)
        except TrajectoryError as error:
            said.append(f"the trainer's EMA is left out: {error}")
    # the usual one is the last of those inside, else the slowest
    averages = [*sorted(beside, key=lambda average: number_of(average.rate)), *averages]
    if not averages:
        return Kept([], said)
    weights = weights or read_checkpoint(checkpoint, key=key).tensors
    distinct: list[Average] = []
    for average in reversed(averages):
        equal = next((other for other in distinct if have_same_bits(other.tensors, average.tensors)), None)
        is_whole = average.tensors.keys() == weights.keys()
        if is_whole and have_same_bits(average.tensors, weights):
            if average.path != checkpoint:  # else it was said with the key of the weights
                said.append(f"{average.place} is bit for bit the weights that are combined")
        elif equal is not None:
            said.append(f"{average.place} is bit for bit {equal.place}")
        else:
            distinct.append(average)
    return Kept(distinct[::-1], said)


def stamp_of_averages(checkpoint: Path) -> str:
    """What changes when a file that may hold an average of a checkpoint comes, or is written again."""
    return " ".join(f"{file.name} {stamp_of(file)}" for file in files_of_averages(checkpoint, ""))


def _alike(checkpoint: Path, key: str) -> list[str]:
    """What the checkpoint holds besides of the model's names and shapes, called no average: a target, the best."""
    said = []
    with contextlib.suppress(TrajectoryError), naming(checkpoint):
        others = keys_alike(checkpoint, key)
        if others:
            weights = read_checkpoint(checkpoint, key=key).tensors
            said += [
                f"{checkpoint.name}: {shown(other)!r} has names and shapes of the weights, and is called no average; "
                f"for a row of the report: trainer_ema: {shown(other)} in a study file"
                for other in others
                if not have_same_bits(read_checkpoint(checkpoint, key=other).tensors, weights)
            ]
    return said


def _raw_beside(checkpoint: Path, average: str) -> list[str]:
    """Where the raw weights lie of a checkpoint that is an average: a file beside it of its step, as EDM's states."""
    step = read_names([checkpoint])[0].numbers
    said: list[str] = []
    if checkpoint.is_dir() or not step:
        return said
    with contextlib.suppress(TrajectoryError, OSError):
        averages = read_checkpoint(checkpoint, key=average).tensors
        for file in sorted(checkpoint.parent.iterdir()):
            is_other = file != checkpoint and not is_average(file.stem) and file.name.endswith(TORCH_SUFFIXES)
            if not is_other or read_names([file])[0].numbers != step:
                continue
            with contextlib.suppress(TrajectoryError), naming(file):
                said += [
                    f"{checkpoint.name} is an average; weights of its names and shapes are in "
                    f"{Average(file, container.key, {}).place}: name those files to combine them"
                    for container in Inventory(read_content(file)).containers
                    if container.role is not Role.AVERAGE and counterparts(container.named, averages)
                ]
    return said


def _inside(checkpoint: Path, key: str, earlier: Path, said: list[str]) -> list[Average]:
    """The averages in the checkpoint itself; none where it cannot be read, which is said elsewhere.

    ``said`` gets a sentence for each that has stayed the same while the weights moved.
    """
    averages: list[Average] = []
    with contextlib.suppress(TrajectoryError), naming(checkpoint):  # which makes any error of a damaged file one
        weights: Mapping[str, Tensor] | None = None
        for inside, rate in keys_of_averages(checkpoint, key):
            if is_constant(inside, earlier, checkpoint) and not is_constant(key, earlier, checkpoint):
                said.append(
                    f"{checkpoint.name}: {shown(inside)!r} is the same as in {earlier.name} though the weights have "
                    "moved, so it is no average of them"
                )
                continue
            tensors = read_checkpoint(checkpoint, key=inside).tensors
            weights = weights or read_checkpoint(checkpoint, key=key).tensors
            # where the weights have an outer key ("model" of "model.net"), their names begin with the rest of it
            names = counterparts(tensors, weights) or {}
            renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
            averages.append(Average(checkpoint, inside, renamed, rate))
    return averages


def files_of_averages(checkpoint: Path, key: str) -> Iterator[Path]:
    """Files that may hold an average of a checkpoint: in its folder; or beside its file, of the same step.

    Objects that a trainer registered with Accelerate are such files, too: among them is diffusers' ``EMAModel``.
    """
    with contextlib.suppress(OSError):
        if checkpoint.is_dir():
            weights = file_of_weights(checkpoint, key)
            for file in sorted(checkpoint.iterdir()):
                is_candidate = is_average(file.stem) or file.name.startswith(OBJECTS_OF_ACCELERATE)
                if file != weights and is_candidate and has_weights_suffix(file):
                    yield file
            return
        step = read_names([checkpoint])[0].numbers
        if not step:  # names without a step would all match
            return
        for file in sorted(checkpoint.parent.iterdir()):
            is_candidate = is_average(file.stem) and has_weights_suffix(file)
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
        candidates = [Average(file, "", read_checkpoint(file).tensors)]
    averages = []
    for candidate in candidates:
        names = counterparts(candidate.tensors, weights)
        if names is not None:
            renamed = {names[name]: tensor for name, tensor in candidate.tensors.items()}
            averages.append(candidate._replace(tensors=renamed, rate=rate_in(file.name) or candidate.rate))
    return averages


def _candidates_in(file: Path, weights: Mapping[str, Tensor]) -> list[Average]:
    """Each container in a torch file that is called an average, by its key or the file's name."""
    candidates: list[Average] = []
    for container in Inventory(read_content(file)).containers:
        if not (container.is_shadow or container.role is Role.AVERAGE or is_average(file.stem)):
            continue
        if container.has_no_names:
            listed = map_tensors(file, {str(number): tensor for number, tensor in container.tensors.items()})
            tensors = _named([*listed.values()], weights)
        else:
            tensors = map_tensors(file, container.named)
        candidates.append(Average(file, container.key, tensors, container.rate))
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
