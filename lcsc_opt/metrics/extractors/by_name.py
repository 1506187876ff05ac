"""Extractors by the names that metrics give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.code import module_file
from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.imports import import_dotted
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.extractors.own import OwnExtractor
from lcsc_opt.metrics.extractors.published import ClipExtractor, DinoV2Extractor, InceptionExtractor, PublishedNetwork
from lcsc_opt.metrics.names import MADE

PUBLISHED: dict[str, type[PublishedNetwork]] = {
    "inception": InceptionExtractor,
    "clip": ClipExtractor,
    "dinov2": DinoV2Extractor,
}


def build_extractor(name: str, *, weights: Path | None, device: torch.device | str) -> FeatureExtractor:
    """The extractor ``inception``, ``clip``, ``dinov2``, one of :data:`MADE`, or a user's own as ``module:factory``.

    Args:
        name: as it stands behind the ``@`` of a metric.
        weights: a file; ``None`` downloads the published weights if they are missing.
        device: where the network runs; a user's factory gets it if it has an argument ``device``.

    Raises:
        MetricError: the weights cannot be used, or a factory cannot be imported or makes no extractor.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](weights, device=device)
    factory = _own_factory(name, weights)
    made = factory(device=device) if "device" in inspect.signature(factory).parameters else factory()
    if not isinstance(made, FeatureExtractor):
        raise MetricError(
            f"extractor {name}: made {type(made).__name__}, which lacks name, dimension or the call images → features"
        )
    module = MADE.get(name, name).partition(":")[0]
    file = module_file(module)
    return OwnExtractor(made, {} if file is None else {module: file})


def check_extractor(name: str, *, weights: Path | None) -> None:
    """Refuse an extractor that :func:`build_extractor` would refuse, without reading or downloading weights.

    Raises:
        MetricError: a file of weights does not exist, or a factory cannot be imported.
    """
    if name not in PUBLISHED:
        _own_factory(name, weights)
    elif weights is not None and not weights.exists():
        raise MetricError(f"weights: {weights} of {name} does not exist")


def _own_factory(name: str, weights: Path | None) -> Callable[..., Any]:
    if weights is not None:
        raise MetricError(f"weights: {name} takes no file: it is made by a factory, with its weights")
    return import_dotted(MADE.get(name, name), setting="extractor", error=MetricError)
