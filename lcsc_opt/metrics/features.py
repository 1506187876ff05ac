"""The contract of a feature extractor, and how images go through one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics._arrays import Array


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images → features.

    A call keeps the graph where its network is differentiable, so it disables no gradients itself; whoever
    needs none calls :func:`extract`. It moves images to its own device, and answers there. Features of an
    image do not depend on the other images of its batch. Where the graph of an image is large, the attribute
    ``images_with_graph`` (not required) says of how many images it is kept at once.
    """

    @property
    def name(self) -> str:
        """Identifies the network by a hash of its weights: extractors of one name give equal features."""
        ...

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` float32 of images ``[B, C, H, W]`` in [−1, 1].

        Raises MetricError when the images have a shape that the network does not take.
        """
        ...


@runtime_checkable
class ClassifyingExtractor(FeatureExtractor, Protocol):
    """An extractor whose network also tells classes apart, as the Inception Score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` and logits ``[B, classes]``, from one pass through the network.

        Raises MetricError when the images have a shape that the network does not take.
        """
        ...


def extract(extractor: FeatureExtractor, images: Tensor | Iterable[Tensor], *, batch_size: int = 250) -> Array:
    """Features of all ``images``, without gradients.

    Args:
        extractor: the network.
        images: ``[N, C, H, W]`` in [−1, 1], or an iterable of such parts of any size.
        batch_size: how many images go through the network at once, at most.

    Returns:
        ``[N, D]`` float64 on the CPU.

    Raises MetricError when there are no images, when they are not ``[N, C, H, W]``, or when the extractor
    answers with another shape than it promises or with features that are not finite.
    """
    if batch_size < 1:
        raise MetricError(f"batch_size: expected at least 1, got {batch_size}")
    with torch.no_grad():  # not inference mode: what an extractor keeps from it would fit into no graph
        parts = [_features_of(extractor, batch) for batch in _batches(images, batch_size)]
    if not parts:
        raise MetricError("images: there are none to extract features from")
    return np.concatenate(parts)


def _batches(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    for part in [images] if isinstance(images, Tensor) else images:
        if part.ndim != 4:
            raise MetricError(f"images: expected [N, C, H, W], got the shape {list(part.shape)}")
        if len(part):
            yield from part.split(batch_size)


def checked_features(extractor: FeatureExtractor, features: Tensor, count: int) -> Tensor:
    """``features`` as they are.

    Raises MetricError when they are not ``[count, D]`` or not finite.
    """
    expected = (count, extractor.dimension)
    if features.shape != expected:
        raise MetricError(
            f"extractor {extractor.name}: answered with shape {list(features.shape)}, expected {list(expected)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise MetricError(f"extractor {extractor.name}: features are not finite; are the images finite and in [-1, 1]?")
    return features


def checked_logits(extractor: FeatureExtractor, logits: Tensor) -> Tensor:
    """``logits`` as they are. Raises MetricError when they are not ``[B, classes]`` or not finite."""
    if logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
        raise MetricError(f"extractor {extractor.name}: answered with logits that are not finite or not [B, classes]")
    return logits


def full_precision(features: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return features if features.dtype == torch.float64 else features.float()


def _features_of(extractor: FeatureExtractor, batch: Tensor) -> Array:
    features = checked_features(extractor, answer(extractor, batch), len(batch))
    array: Array = features.to("cpu", torch.float64).numpy()
    return array


def answer(extractor: FeatureExtractor, batch: Tensor) -> Tensor:
    """What the network answers; what it cannot take is said with its name, whoever wrote it."""
    try:
        return extractor(batch)
    except (MetricError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MetricError(f"extractor {extractor.name}: refuses images {list(batch.shape)}: {reason}") from error
