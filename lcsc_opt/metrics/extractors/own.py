"""A user's own extractor, under a name that changes with its weights and its code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.code import local_code
from lcsc_opt.metrics.extractors.base import ClassifyingExtractor, FeatureExtractor


class OwnExtractor:
    """A user's extractor under a name of its own: references from other weights or code do not fit it.

    Args:
        made: what the factory returned.
        sources: name → file of the factory's module.

    Attributes:
        name: that of ``made``, with a hash of its parameters, its buffers and its code.
        dimension: the number of features, D.
    """

    def __init__(self, made: FeatureExtractor, sources: Mapping[str, Path]) -> None:
        self.made = made
        self.name = f"{made.name}-{_digest(made, sources)[:16]}"
        self.dimension = made.dimension

    @property
    def images_with_graph(self) -> int:
        """How many images may have a graph at once."""
        return int(getattr(self.made, "images_with_graph", 2**31))

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] → ``[B, D]``."""
        return self.made(images)


class OwnClassifyingExtractor(OwnExtractor):
    """A user's extractor with logits, too."""

    made: ClassifyingExtractor

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` → features ``[B, D]`` and logits ``[B, classes]``."""
        return self.made.features_and_logits(images)


def own_extractor(made: FeatureExtractor, sources: Mapping[str, Path]) -> FeatureExtractor:
    """Wrap what a user's factory returned."""
    kind = OwnClassifyingExtractor if isinstance(made, ClassifyingExtractor) else OwnExtractor
    return kind(made, sources)


def _digest(made: Any, sources: Mapping[str, Path]) -> str:
    digest = hashlib.sha256(repr(local_code(sources)).encode())
    for name, values in _numbers(made):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _numbers(made: Any) -> Iterator[tuple[str, Any]]:
    """All tensors and arrays of a module, or among the attributes of an object, as arrays."""
    held = made.state_dict() if isinstance(made, nn.Module) else getattr(made, "__dict__", {})
    for name, value in sorted(held.items()):
        if isinstance(value, nn.Module):
            yield from ((f"{name}.{inner}", values) for inner, values in _numbers(value))
        elif isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            yield f"{name} {value.dtype} {list(value.shape)}", flat.view(torch.uint8).numpy()
        elif isinstance(value, np.ndarray):
            yield name, value
