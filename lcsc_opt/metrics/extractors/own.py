"""A user's own extractor, under a name that changes with its weights and its code."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.code import local_code
from lcsc_opt.metrics.extractors.base import FeatureExtractor

PLAIN = (type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, int, float, types.NoneType)


class OwnExtractor:
    """A user's extractor under a name of its own: references from other weights or code do not fit it.

    Weights are the tensors, arrays and modules in its attributes, also in lists, dicts and other objects. What only a
    closure or a global variable holds is not seen, and neither is what a module's state dict leaves out.

    Args:
        made: what the factory returned.
        sources: name → file of the factory's module.

    Attributes:
        name: that of ``made``, with a hash of its weights and its code.
        dimension: the number of features, D.
    """

    def __init__(self, made: FeatureExtractor, sources: Mapping[str, Path]) -> None:
        self.made, self.dimension = made, made.dimension
        digest = hashlib.sha256(repr(local_code(sources)).encode())
        for values in _numbers(made, set()):
            tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values.detach().cpu()
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self.name = f"{made.name}-{digest.hexdigest()[:16]}"
        for optional in ("images_with_graph", "features_and_logits"):
            if hasattr(made, optional):
                setattr(self, optional, getattr(made, optional))

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] → ``[B, D]``."""
        return self.made(images)


def _numbers(holder: Any, seen: set[int]) -> Iterator[Any]:
    """All tensors and arrays in an object."""
    if isinstance(holder, (Tensor, np.ndarray)):
        yield holder
    elif not isinstance(holder, PLAIN) and id(holder) not in seen:
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            parts = [*holder.state_dict().values()]
        elif isinstance(holder, (list, tuple)):
            parts = [*holder]
        elif isinstance(holder, dict):
            parts = [*holder.values()]
        else:
            slots = [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
            parts = [getattr(holder, name, None) for name in slots] + [*getattr(holder, "__dict__", {}).values()]
        for part in parts:
            yield from _numbers(part, seen)
