"""The digest of weights, and how the weights of two models differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, dtypes, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def difference(given: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str | None:
    """How names and shapes differ from those that are expected, in words; ``None`` where they are the same.

    Args:
        given: name → shape.
        expected: name → shape.

    Returns:
        The rest of a sentence after "it": ``lacks 'a' and 3 more, has besides 'b', has 'c' as [2] and not [3]``.
    """
    lacks, adds = sorted(expected.keys() - given), sorted(given.keys() - expected)
    reshaped = [name for name in sorted(expected.keys() & given) if tuple(given[name]) != tuple(expected[name])]
    parts = [
        *_first([f"lacks {name!r}" for name in lacks]),
        *_first([f"has besides {name!r}" for name in adds]),
        *_first([f"has {name!r} as {list(given[name])} and not {list(expected[name])}" for name in reshaped]),
    ]
    return ", ".join(parts) or None


def _first(found: list[str]) -> Iterator[str]:
    if found:
        yield found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
