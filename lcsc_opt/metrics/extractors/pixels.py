"""Features of the pixels as the model gives them, before anything is clipped: no network, nothing to train.

Whoever saves images clips them to [−1, 1]. A search that sees clipped images only can learn to overshoot, and let the
clipping make contrast. These features see where the values really are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.metrics.frechet import Array, FrechetReference
from lcsc_opt.metrics.reference.reference import Reference

LEVEL = 2 / 255  # of grey, in images of 8 bits, in the range [−1, 1]
SIDE = 16  # pixels: height and width of the thumbnails whose principal components are the features
MOST_COMPONENTS = 60
VARIANCE = 0.95  # of the real thumbnails, that the components hold


class Thumbnails:
    """All pixels of small thumbnails as features, not clipped."""

    name = f"thumbnails-{SIDE}"
    dimension = 3 * SIDE**2
    unclipped = True

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 1 or 3, H, W]`` → ``[B, 3 · 16²]``; a grey image counts as three equal channels."""
        return F.adaptive_avg_pool2d(images.float(), SIDE).expand(-1, 3, -1, -1).flatten(1)


class PixelComponents:
    """The leading principal components of real thumbnails, for ``fid@pixels``.

    They hold 95 % of the variance, or are the first 60. All pixels would be too many: of a few hundred samples, FID in
    many features rewards samples that vary more than real images do.

    Args:
        mean: ``[3 · 16²]`` of real :class:`Thumbnails`.
        cov: ``[3 · 16², 3 · 16²]``, their covariance.
    """

    unclipped = True

    def __init__(self, mean: Array, cov: Array) -> None:
        from scipy.linalg import eigh  # SciPy is slow to import; the leading ones alone take half the time of all

        ascending, vectors = eigh(cov, subset_by_index=(max(0, len(cov) - MOST_COMPONENTS), len(cov) - 1))
        values = np.maximum(ascending[::-1], 0.0)
        total = max(float(np.trace(cov)), float(np.finfo(np.float64).tiny))  # zero for copies of one image
        enough = int(np.searchsorted(np.cumsum(values) / total, VARIANCE)) + 1
        self.dimension = min(enough, len(values))
        leading = vectors[:, ::-1][:, : self.dimension]
        # An eigenvector's sign is arbitrary; machines that share the images of one evaluation have to choose the same.
        # That of the product with one fixed vector decides: cosines, to which hardly an eigenvector is orthogonal.
        signs = np.sign(np.cos(np.arange(len(mean))) @ leading)
        self.name = f"pixels-{self.dimension}"
        self._thumbnails = Thumbnails()
        self._mean = mean
        self._basis = leading * signs

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 1 or 3, H, W]`` → ``[B, D]``."""
        thumbnails = self._thumbnails(images)
        mean = torch.from_numpy(self._mean).to(thumbnails)
        return (thumbnails - mean) @ torch.from_numpy(self._basis).to(thumbnails)

    def reference(self, thumbnails: Reference) -> Reference:
        """The reference in these features of one in those of :class:`Thumbnails`, with its unseen images."""
        frechet = thumbnails.frechet
        gaussian = FrechetReference(
            (frechet.mean - self._mean) @ self._basis, self._basis.T @ frechet.cov @ self._basis
        )
        features = None
        if thumbnails.features is not None:
            features = ((thumbnails.features - self._mean) @ self._basis).astype(np.float32)
        return dataclasses.replace(
            thumbnails,
            extractor=self,
            gaussian=gaussian,
            features=features,
            held_out=None if thumbnails.held_out is None else self.reference(thumbnails.held_out),
            selection=None if thumbnails.selection is None else self.reference(thumbnails.selection),
        )


def pixel_reference(thumbnails: Reference) -> Reference:
    """The reference for ``fid@pixels`` of one in the features of :class:`Thumbnails`.

    Components depend on the images, so it is thumbnails whose statistics are kept on the disk, never components.
    """
    return PixelComponents(thumbnails.frechet.mean, thumbnails.frechet.cov).reference(thumbnails)


class Outside:
    """How much clipping to [−1, 1] changes an image: the mean absolute change of its values, in levels of 255."""

    name = "outside"
    dimension = 1
    unclipped = True

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` → ``[B, 1]``."""
        change = (images - images.clamp(-1, 1)).abs() / LEVEL
        return change.flatten(1).float().mean(dim=1, keepdim=True)
