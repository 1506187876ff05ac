"""Weights in memory: writing them as safetensors, their digest, and how two models differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError

_MOST_PREFIXES = 16  # that are tried: a large network has many names that end alike
_SAMPLED_TENSORS = 512
_SAMPLED_OF_TENSOR = 1024
# spectral norm's singular vectors, and the end of the name beside them that tells so: of torch, old and new, and BigGAN
_DERIVED = (
    (re.compile(r"_[uv]$"), "_orig"),
    (re.compile(r"\.[0-9]+\._[uv]$"), ".original"),
    (re.compile(r"(?<![^.])(u|sv)[0-9]+$"), "sv0"),
)

_RUNNING_MEAN = re.compile(r"(?<![^.])(running|stored)_mean$")


def write_safetensors(tensors: dict[str, Tensor], path: Path, texts: Mapping[str, str]) -> None:
    """Write tensors, with texts in the header.

    Raises:
        TrajectoryError: a tensor has a dtype that safetensors does not have.
        OSError, safetensors.SafetensorError: the disk refuses.
    """
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors would write a file that only its owner may read
    try:
        save_file(tensors, path, metadata=dict(texts))
        path.chmod(mode)
    except KeyError as error:  # in its table of dtypes
        unknown = next((name for name, tensor in tensors.items() if tensor.dtype in error.args), "")
        raise TrajectoryError(
            f"Tensor {unknown!r} is {error.args[0]}, which safetensors cannot hold: write a .pt file (--as pt)."
        ) from error


def check_weights(tensors: Mapping[str, Any]) -> None:
    """Refuse what has no linear combinations that are weights.

    Raises:
        TrajectoryError: something else than a tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            advice = f"; if it is the state dict itself, give state[{name!r}]" if isinstance(tensor, Mapping) else ""
            raise TrajectoryError(f"{name} is a {type(tensor).__name__}, not a tensor{advice}.")


def derived_buffers(names: Collection[str]) -> set[str]:
    """The buffers that were computed from the weights beside them: their linear combination belongs to no weights."""
    derived = set()
    for name in names:
        for ending, of_source in _DERIVED:
            if ending.search(name) and ending.sub(of_source, name) in names:
                derived.add(name)
    return derived


def sampled(tensors: Mapping[str, Tensor]) -> Tensor:
    """Some numbers of a model, at the same places of each checkpoint, by which two are compared: ``[n]`` float64.

    The first of each tensor, since little of a mapped file is read then.
    """
    floating = [tensor for _, tensor in sorted(tensors.items()) if tensor.is_floating_point()]
    parts = [tensor.detach().reshape(-1)[:_SAMPLED_OF_TENSOR].double() for tensor in floating[:_SAMPLED_TENSORS]]
    none = torch.zeros(0, dtype=torch.float64, device="cpu")  # since an empty list cannot be joined
    return torch.cat([none, *parts])


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, dtypes, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def have_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same names and values; a sample is compared first, since files are large."""
    if one.keys() != other.keys() or not torch.equal(sampled(one), sampled(other)):
        return False
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def completed(averages: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trainer's averages, with what they lack of the model that they are of, such as buffers.

    They keep every bit: mixed precision has averages in float32 of weights in bfloat16.

    Raises:
        TrajectoryError: they are of another model.
    """
    differs = difference({**model, **averages}, model)
    if differs is not None:
        raise TrajectoryError(f"the trainer's average does not fit the checkpoints: its model {differs}.")
    weights: dict[str, Tensor] = {}
    for name, tensor in model.items():
        average = averages.get(name, tensor)
        weights[name] = average.to(_dtype_of_both(average.dtype, tensor.dtype))
    return weights


def _dtype_of_both(average: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """The dtype in which an average loses nothing and is not narrower than the weights; other numbers have theirs."""
    # torch widens no float8
    if all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (average, weights)):
        return torch.promote_types(average, weights)
    return weights


class RunningStatistics(NamedTuple):
    """The names of what a normalization keeps of the data that it saw in training.

    Attributes:
        mean, variance: of the data, by channel.
        calls: how often it was called; not every network has such a tensor.
    """

    mean: str
    variance: str
    calls: str


def running_statistics(names: Collection[str]) -> list[RunningStatistics]:
    """The running statistics of normalizations among the names of a model: as torch names them, or as BigGAN does."""
    found = []
    for name in names:
        match = _RUNNING_MEAN.search(name)
        if match is not None:
            before = name.removesuffix("mean")
            statistics = RunningStatistics(name, f"{before}var", f"{name[: match.start()]}num_batches_tracked")
            if statistics.variance in names:
                found.append(statistics)
    return found


def varying_statistics(names: Collection[str], varying: Collection[str]) -> list[RunningStatistics]:
    """The running statistics among ``names`` of which one is in ``varying``: not the same in all checkpoints."""
    return [found for found in running_statistics(names) if found.mean in varying or found.variance in varying]


class Renaming(NamedTuple):
    """How the names of weights become those of a network: a prefix that is removed, and one that is put before."""

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """The name in the network."""
        return self.added + name.removeprefix(self.removed)

    def undone(self, name: str) -> str:
        """The name in the files, of one in the network."""
        return self.removed + name.removeprefix(self.added)


def possible_renamings(name: str, others: Sequence[str]) -> Iterator[Renaming]:
    """What turns ``name`` into one of ``others``: none, a prefix that is put before, one that is removed.

    The shortest prefixes of either kind come first.
    """
    longer = [Renaming(added=other.removesuffix(name)) for other in others if other.endswith(f".{name}")]
    if name in others:
        yield Renaming()
    yield from sorted(longer, key=lambda rename: len(rename.added))[:_MOST_PREFIXES]
    parts = name.split(".")
    for count in range(1, len(parts)):
        if ".".join(parts[count:]) in others:
            yield Renaming(removed=".".join([*parts[:count], ""]))  # with the dot behind it


def renaming(names: Mapping[str, Any], network: Mapping[str, Tensor]) -> Renaming | None:
    """How weights get the names of a network; ``None`` where one has its name already, or no prefix fits.

    Args:
        names: name → tensor or shape, of the weights.
        network: the network's state dict.

    Raises:
        TrajectoryError: more than one prefix fits: there are several such models.
    """
    if not network or any(name in names for name in network):
        return None
    fitting = []
    # from the network's names to those of the weights, of which the way back is wanted
    for reverse in possible_renamings(next(iter(network)), list(names)):
        rename = Renaming(removed=reverse.added, added=reverse.removed)
        shapes = {rename(name): _shape_of(shape) for name, shape in names.items() if name.startswith(rename.removed)}
        found = {id(tensor) for name, tensor in network.items() if shapes.get(name) == _shape_of(tensor)}
        if found == {id(tensor) for tensor in network.values()}:  # of tied weights one name is enough
            fitting.append(rename)
    if len(fitting) > 1:
        several = ", ".join(rename.removed.rstrip(".") for rename in fitting)
        raise TrajectoryError(f"The checkpoints hold several models that fit the network: choose by key ({several}).")
    return fitting[0] if fitting else None


def difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """How names and shapes differ from those that are expected, in words, or ``None`` if they are the same.

    Args:
        given: name → tensor or shape.
        expected: name → tensor or shape.

    Returns:
        The rest of a sentence after "it": ``lacks 'a' and 3 more, has also 'b', has 'c' as [2] and not [3]``.
    """
    missing = [f"lacks {name!r}" for name in sorted(expected.keys() - given)]
    additional = [f"has also {name!r}" for name in sorted(given.keys() - expected)]
    reshaped = []
    for name in sorted(given.keys() & expected):
        shape = _shape_of(given[name])
        expected_shape = _shape_of(expected[name])
        if shape != expected_shape:
            reshaped.append(f"has {name!r} as {shape} and not {expected_shape}")
    clauses = [_first_and_count(differences) for differences in (missing, additional, reshaped) if differences]
    return ", ".join(clauses) or None


def _shape_of(tensor_or_shape: Any) -> list[int]:
    return list(getattr(tensor_or_shape, "shape", tensor_or_shape))


def _first_and_count(differences: list[str]) -> str:
    """``lacks 'a' and 3 more``."""
    if len(differences) == 1:
        return differences[0]
    return f"{differences[0]} and {len(differences) - 1} more"
