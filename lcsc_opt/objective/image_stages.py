"""The stages between merged weights and features. They keep nothing but the weights in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import Noise
from lcsc_opt.metrics import MetricSuite
from lcsc_opt.metrics.image_metrics import ImageMetrics
from lcsc_opt.sampling import Sampler
from lcsc_opt.sampling.base import prompts_of
from lcsc_opt.sampling.batch_norm import BatchNormStatistics

FeatureGradients = dict[str, npt.NDArray[np.floating[Any]]]
"""Extractor's name → the derivative of the loss in the features of some images, ``[n, D]``."""


@dataclasses.dataclass(frozen=True)
class ImageStages:
    """Load weights, sample images, add their features to the metrics; and the way back to the images.

    Attributes:
        sampler: holds the model.
        scores: features and metrics of images.
        batch_norm: estimates the statistics of batch normalization after new weights; ``None`` leaves them as merged.
    """

    sampler: Sampler
    scores: MetricSuite
    batch_norm: BatchNormStatistics | None

    def load(self, weights: Mapping[str, Tensor], *, as_saved: bool) -> None:
        """Put merged weights, name → tensor, into the model; ``as_saved`` ones with their own statistics."""
        self.sampler.load(weights)
        if self.batch_norm is not None and not as_saved:
            self.batch_norm.estimate()

    # not inference mode: networks may keep tensors, and a later graph could not use those
    @torch.no_grad()
    def sample(self, noise: Noise, first: int, last: int) -> Tensor:
        """The images ``[first, last)`` of a group of noise: ``[last - first, C, H, W]``, not clipped.

        Raises:
            MetricError: an image is not finite.
        """
        return self.sample_with_graph(noise, first, last)

    def sample_with_graph(self, noise: Noise, first: int, last: int) -> Tensor:
        """The same images. In grad mode they have a graph back to the weights."""
        images = self.sampler.sample(noise, first, last)
        if not bool(torch.isfinite(images).all()):
            raise MetricError("the merged model samples values that are not finite")
        return images

    def add_features(
        self,
        metrics: ImageMetrics,
        images: Tensor,
        noise: Noise,
        first: int,
    ) -> None:
        """Add the images ``first``, ``first + 1``, … of a group of noise, ``[n, C, H, W]``, to ``metrics``.

        Group and index tell the prompts, if the sampler has some.

        Raises:
            MetricError: their features are not finite.
        """
        prompts = prompts_of(self.sampler, noise, first, first + len(images))
        metrics.update(images, prompts=prompts)
        self.scores.warn_of_range(images, self.sampler)  # as long as a model is poor, each batch is looked at

    def image_gradient(
        self, images: Tensor, noise: Noise, first: int, feature_gradients: Mapping[str, Tensor]
    ) -> Tensor:
        """The derivative of the loss in the images, ``[n, C, H, W]``, from that in their features.

        The features are computed again, with a graph of their own; that of ``images`` back to the weights is not used.

        Args:
            images: ``first``, ``first + 1``, … of a group of noise, ``[n, C, H, W]``.
            noise: the group.
            first: the index of the first image.
            feature_gradients: extractor's name → the derivative of the loss in these images' features, ``[n, D]``.
        """
        prompts = prompts_of(self.sampler, noise, first, first + len(images))
        return self.scores.image_gradient(images, feature_gradients, prompts)
