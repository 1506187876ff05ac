"""Extractors by the names that metrics give them; a user's own under a name that changes with its weights and code."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.code import local_code, module_file
from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.imports import has_parameter, import_dotted
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.extractors.published import ClipExtractor, DinoV2Extractor, InceptionExtractor
from lcsc_opt.metrics.names import MADE, TRAINED

PUBLISHED = {"inception": InceptionExtractor, "clip": ClipExtractor, "dinov2": DinoV2Extractor}


def find_extractor(name: str, *, weights: Path | None) -> Callable[[torch.device | str], FeatureExtractor]:
    """What makes the extractor of this name on a device: a published network, one of :data:`MADE`, or a user's own.

    Published weights that are missing are downloaded, so that this fails before checkpoints are packed. A user's
    factory gets the device if it has an argument ``device``.

    Args:
        name: as it stands behind the ``@`` of a metric; a user's own is ``module:factory``.
        weights: a file; ``None`` uses the published weights.

    Raises:
        MetricError: the file does not exist, weights cannot be downloaded, or a factory cannot be imported; and later,
            when it is made: the weights cannot be used, or it is no extractor.
    """
    if name in PUBLISHED:
        if weights is None:
            PUBLISHED[name].fetch()
        elif not weights.exists():
            raise MetricError(f"weights: {name}: {weights} does not exist")
        published: Callable[..., FeatureExtractor] = PUBLISHED[name]
        return lambda device: published(weights, device=device)
    if weights is not None:
        raise MetricError(f"weights: {name} needs no file: its factory loads its weights")
    factory, module = _factory(name)

    def make(device: torch.device | str) -> FeatureExtractor:
        options = {"device": device} if has_parameter(factory, "device") else {}
        extractor = factory(**options)
        if not isinstance(extractor, FeatureExtractor):
            raise MetricError(
                f"extractor {name}: made {type(extractor).__name__}, which lacks name, dimension or the call images → "
                "features"
            )
        file = module_file(module)  # None for a module without a file
        sources = {} if file is None else {module: file}
        return _FactoryExtractor(extractor, sources)

    return make


def _factory(name: str) -> tuple[Callable[..., Any], str]:
    """What makes an extractor that is not published, and the name of its module."""
    dotted = MADE.get(name, name)
    factory = import_dotted(dotted, setting="extractor", error=MetricError)
    if name.removesuffix("2") in TRAINED:  # digits2 is the second network of digits
        factory = functools.partial(factory, name.removesuffix("2"), second=name.endswith("2"))
    return factory, dotted.partition(":")[0]


class _FactoryExtractor:
    """A factory's extractor, named so that references from other weights or code are refused.

    Args:
        extractor: the factory's result.
        sources: name → file of the factory's module; the local modules that it imports count, too.

    Attributes:
        name: that of ``extractor``, with a hash of its weights and its code.
        made_name: that of ``extractor``, which a user's own file of statistics may state.
        dimension: the number of features, D.
    """

    def __init__(self, extractor: FeatureExtractor, sources: Mapping[str, Path]) -> None:
        self.made_name = extractor.name
        self.dimension = extractor.dimension
        self._extractor = extractor
        digest = hashlib.sha256(repr(local_code(sources)).encode())
        for tensors in _weights_of(extractor):
            digest.update(weights_sha256(tensors).encode())
        self.name = f"{extractor.name}-{digest.hexdigest()[:16]}"
        for optional in ("graph_bytes", "unclipped", "enough_images", "in_words"):
            if hasattr(extractor, optional):
                setattr(self, optional, getattr(extractor, optional))
        if hasattr(extractor, "features_and_logits"):
            self.features_and_logits = extractor.features_and_logits

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] → ``[B, D]``."""
        return self._extractor(images)


def _weights_of(extractor: FeatureExtractor) -> list[Mapping[str, Tensor]]:
    """First all single tensors and arrays that an extractor holds, then the state dict of each module."""
    tensors = {}
    state_dicts = []
    for name, value in _held_by(extractor).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":  # numbers, and not names of classes
            # a copy in native byte order: torch takes no reversed, read-only or byte-swapped array
            tensors[name] = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
        elif isinstance(value, nn.Module):
            state = value.state_dict()  # beside its weights there may be a module's own extra state
            state_dicts.append({key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)})
    return [tensors, *state_dicts]


def _held_by(extractor: FeatureExtractor) -> dict[str, object]:
    """Name → what an extractor is, or has as an attribute, or in a list or a mapping there."""
    values: dict[str, object] = {"": extractor}  # which may be a module itself
    for name, attribute in getattr(extractor, "__dict__", {}).items():  # one with __slots__ has none
        members: Iterable[object] = (attribute,)
        if isinstance(attribute, Mapping):
            members = attribute.values()
        elif isinstance(attribute, (list, tuple)):
            members = attribute
        for index, member in enumerate(members):
            values[f"{name}.{index}"] = member
    return values
