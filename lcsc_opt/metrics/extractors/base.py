"""The contract of a feature extractor, and how images go through one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.settings import excerpt
from lcsc_opt.metrics.frechet import Array

GRAPHS_ON_CPU = 4 * 2**30  # bytes; on a device, half of the memory that is free


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images → features.

    A call moves images to the extractor's device and returns features there. It keeps the graph where the network is
    differentiable; :func:`extract` is the call without gradients. The features of an image do not depend on the other
    images of its batch. Where the graph of an image is large, an optional attribute ``graph_bytes`` says how many bytes
    it takes. An optional attribute ``unclipped`` says that it sees values as the sampler gives them;
    all others see them clipped to [−1, 1], as saved images are. Of more real images than ``enough_images``, if it has
    that attribute, a part stands for all. An optional attribute ``in_words`` says what the network is, for reports. If
    the network also tells classes apart, as the Inception Score needs, an optional method ``features_and_logits`` gives
    features ``[B, D]`` and logits ``[B, classes]`` of one pass.
    """

    @property
    def name(self) -> str:
        """Identifies the network by a hash of its weights: extractors of one name give equal features."""

    @property
    def dimension(self) -> int:
        """The number of features, D."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` float32 of images ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: the images have a shape that the network does not support.
        """


def seen_images(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """What an extractor sees of ``[B, C, H, W]``: values clipped to [−1, 1], as saved images are.

    Those that are ``unclipped``, pixels and tones, see the values as they come, so that no model gains by values that
    clipping hides.
    """
    if getattr(extractor, "unclipped", False):
        return images
    return images.clamp(-1, 1)


def extract(extractor: FeatureExtractor, images: Tensor | Iterable[Tensor], *, batch_size: int = 250) -> Array:
    """Features of all ``images``, without gradients.

    Args:
        extractor: the network.
        images: ``[N, C, H, W]`` in [−1, 1], or an iterable of such parts of any size.
        batch_size: how many images go through the network at once, at most.

    Returns:
        ``[N, D]`` float64 on the CPU.

    Raises:
        MetricError: there are no images, or the extractor answers with another shape than it promises or with features
            that are not finite.
    """
    parts = [images] if isinstance(images, Tensor) else images
    rows: list[Array] = []
    for part in filter(len, parts):  # of an empty one, split() would give one empty batch
        for batch in part.split(batch_size):
            features = features_in_parts(extractor, seen_images(extractor, batch))
            rows.append(features.to("cpu", torch.float64).numpy())
    if not rows:
        raise MetricError("images: expected at least one to extract features from")
    return np.concatenate(rows)


def features_in_parts(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features ``[B, D]`` of images that the extractor sees as they are, without a graph.

    Where memory runs out, one half of the images follows the other.

    Raises:
        MetricError: as of :func:`checked_features`.
        torch.OutOfMemoryError: one image is too many.
    """
    try:
        with torch.no_grad():  # tensors that an extractor keeps from inference mode could not be used in a graph
            return checked_features(extractor, extractor(images), len(images))
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    # outside of the except clause: the exception's traceback keeps the tensors alive
    free_memory()
    middle = len(images) // 2
    return torch.cat([features_in_parts(extractor, part) for part in (images[:middle], images[middle:])])


def checked_features(extractor: FeatureExtractor, features: Tensor, count: int) -> Tensor:
    """``features`` of ``count`` images as float32, or as float64 if they are that.

    Raises:
        MetricError: they are not ``[count, D]`` or not finite.
    """
    expected = (count, extractor.dimension)
    if not isinstance(features, Tensor):
        raise MetricError(
            f"extractor {extractor.name}: returned {excerpt(features)}; it must return a tensor {list(expected)}"
        )
    if features.shape != expected:
        raise MetricError(
            f"extractor {extractor.name}: answered with shape {list(features.shape)}, expected {list(expected)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise MetricError(f"extractor {extractor.name}: features are not finite; are the images finite and in [-1, 1]?")
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _images_with_graph(extractor: FeatureExtractor, images: Tensor) -> int:
    """How many of these images may have a graph at once, at least one; all where no graph is large."""
    graph_bytes = getattr(extractor, "graph_bytes", None)
    if graph_bytes is None:
        return len(images)
    room: float = GRAPHS_ON_CPU  # bytes
    if accelerator.measures_memory(images.device):
        room = accelerator.free_bytes(images.device) / 2
    return max(int(room / graph_bytes), 1)


def image_gradient(extractor: FeatureExtractor, images: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of any function in the images, from its gradient in their features.

    At most as many images have a graph at a time as the memory holds, by the extractor's ``graph_bytes``.

    Args:
        extractor: the network.
        images: ``[B, C, H, W]`` as the sampler gives them; their own graph is not followed.
        gradient: ``[B, D]``, in the features.

    Returns:
        ``[B, C, H, W]`` in the type and on the device of ``images``, without a graph.

    Raises:
        MetricError: the extractor cuts the graph, and as :func:`extract`.
    """
    size = _images_with_graph(extractor, images)
    gradients: list[Tensor] = []
    for part, rows in zip(torch.split(images.detach(), size), torch.split(gradient, size), strict=True):
        leaf = part.clone().requires_grad_()
        with torch.enable_grad():
            features = checked_features(extractor, extractor(seen_images(extractor, leaf)), len(part))
        if not features.requires_grad:
            raise MetricError(
                f"extractor {extractor.name}: its features have no graph back to the images, so they have no gradient; "
                "let it compute with torch alone, without no_grad, detach or bytes, or search without gradients"
            )
        gradients += torch.autograd.grad(features, leaf, rows.to(features))
    return torch.cat(gradients)
