"""The contract of a feature extractor."""

from __future__ import annotations

import torch
from torch import Tensor

from lcsc_opt.metrics.extractors.base import ClassifyingExtractor, FeatureExtractor
from lcsc_opt.testing.requiring import require


def check_extractor(
    extractor: FeatureExtractor, images: Tensor, *, differentiable: bool = True, tolerance: float = 1e-4
) -> None:
    """Send images through an extractor, together and one by one.

    * ``name`` is a text that does not change, ``dimension`` the number of features of an image.
    * Features are ``[B, D]`` float32 and finite, the same every time.
    * Features of an image do not depend on the other images of its batch.
    * If ``differentiable``, features have a graph that leads back to the images.
    * If the extractor gives logits, they come with the same features.

    Args:
        extractor: what to check.
        images: ``[B, C, H, W]`` in [−1, 1], at least two, all different.
        differentiable: whether a graph is expected; only searches that follow gradients need one.
        tolerance: of differences between batches, relative to the largest feature.

    Raises:
        AssertionError: one of these is not kept.
    """
    require(isinstance(extractor.name, str) and extractor.name == extractor.name, "name: is not one text")
    count = len(images)
    with torch.no_grad():
        features, again = extractor(images), extractor(images)
        alone = torch.cat([extractor(images[i : i + 1]) for i in range(count)])
    expected = (count, extractor.dimension)
    require(tuple(features.shape) == expected, f"features: have the shape {tuple(features.shape)}, expected {expected}")
    require(features.dtype == torch.float32, f"features: are {features.dtype}, expected float32")
    require(bool(torch.isfinite(features).all()), "features: are not finite")
    require(torch.equal(features, again), "features: of the same images differ the second time")
    apart = float((features - alone).abs().max() / features.abs().max().clamp(min=1e-12))
    require(apart <= tolerance, f"features: of an image alone differ by {apart:.2g} from those in a batch")
    if differentiable:
        _check_graph(extractor, images)
    if isinstance(extractor, ClassifyingExtractor):
        with torch.no_grad():
            beside, logits = extractor.features_and_logits(images)
        require(torch.equal(beside, features), "features_and_logits: other features than a call")
        require(logits.ndim == 2 and len(logits) == count, f"logits: have the shape {tuple(logits.shape)}")


def _check_graph(extractor: FeatureExtractor, images: Tensor) -> None:
    leaf = images.detach().clone().requires_grad_()
    features = extractor(leaf)
    require(features.requires_grad, "features: have no graph; pass differentiable=False where none is wanted")
    (gradient,) = torch.autograd.grad(features.sum(), leaf)
    kept = bool(torch.isfinite(gradient).all()) and bool(gradient.abs().sum() > 0)
    require(kept, "features: their gradient in the images is zero or not finite")
