"""Features with a graph back to the images, and the gradient in the images that a gradient in features makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.features import FeatureExtractor, answer, checked_features, full_precision


def features_with_graph(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """What ``extractor`` answers for ``images``, with the graph that leads back to them.

    More images than the extractor's ``images_with_graph`` go through it in parts, whose graphs are made when the
    gradient goes back through them: that takes one pass more, and the memory of one part.

    Args:
        extractor: the network.
        images: ``[B, C, H, W]`` in [−1, 1], with a graph or as a leaf that requires a gradient.

    Returns:
        ``[B, D]`` float32, or float64 where the extractor answers so.

    Raises MetricError when the images have no graph, or when the extractor cuts it, and as ``extract``.
    """
    if not images.requires_grad:
        raise MetricError("images: have no graph; sample them while gradients are enabled")
    with torch.enable_grad():
        features = checked_features(extractor, _in_parts(extractor, images), len(images))
    if not _leads_to(features, images):
        raise MetricError(
            f"extractor {extractor.name}: its features have no graph back to the images, so they have no gradient; let "
            "it compute with torch alone, without no_grad, detach or bytes, or search without gradients"
        )
    return full_precision(features)


def image_gradient(extractor: FeatureExtractor, images: Tensor, gradient: Tensor) -> Tensor:
    """The derivative in ``images`` of whatever has the derivative ``gradient`` in their features.

    Only one part of the images, of the extractor's ``images_with_graph``, has a graph at a time.

    Args:
        extractor: the network.
        images: ``[B, C, H, W]`` in [−1, 1]; their own graph is not followed.
        gradient: ``[B, D]``.

    Returns:
        ``[B, C, H, W]`` in the type and on the device of ``images``, without a graph.

    Raises MetricError as :func:`features_with_graph`.
    """
    size = _part_size(extractor, images)
    found: list[Tensor] = []
    for part, rows in zip(torch.split(images.detach(), size), torch.split(gradient, size), strict=True):
        leaf = part.clone().requires_grad_()
        features = features_with_graph(extractor, leaf)
        found += torch.autograd.grad(features, leaf, rows.to(features))
    return torch.cat(found)


def _in_parts(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    size = _part_size(extractor, images)
    if len(images) <= size:
        return answer(extractor, images)
    parts = [
        checkpoint(answer, extractor, part, use_reentrant=False, preserve_rng_state=False)
        for part in torch.split(images, size)
    ]
    return torch.cat(parts)


def _part_size(extractor: FeatureExtractor, images: Tensor) -> int:
    """The extractor's ``images_with_graph``; an extractor without takes all at once."""
    return int(getattr(extractor, "images_with_graph", len(images)))


def _leads_to(features: Tensor, images: Tensor) -> bool:
    """Whether ``images`` are in the graph of ``features``.

    That ``features`` require a gradient does not show it: the weights of a network of one's own may be what asks.
    """
    target = images.grad_fn
    waiting: list[Any] = [features.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node is target or (target is None and getattr(node, "variable", None) is images):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False
