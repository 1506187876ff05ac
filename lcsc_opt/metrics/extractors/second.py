"""Features for the cross-check of images that no published network suits; nothing is downloaded, no search sees them.

Small grey images are seen by the bundled second classifier of MNIST's digits, whatever they show; all others by three
convolutions with fixed random weights, which respond to edges and colours and know no classes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.metrics.bundled_images import SIDE
from lcsc_opt.metrics.extractors.bundled import SECOND_DIMENSION, feature_network

SMALL = 32  # pixels: the sides of the largest images that the bundled network sees, and those of all others here
WIDTHS = (16, 32, SECOND_DIMENSION)  # channels of the convolutions


class SecondFeatures:
    """Bundled features of small grey images, and random ones of all others.

    Args:
        image_shape: ``[C, H, W]`` of the real images, which decides. Samples are seen by the same network, whether
            they have one channel or three.
        device: where they are computed.

    Attributes:
        name: of the network.
        in_words: what the network is, for reports.
        knows_content: whether it was trained; random convolutions see edges and colours alone.
    """

    dimension = SECOND_DIMENSION

    def __init__(self, image_shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        channels, height, width = image_shape
        self._is_bundled = channels == 1 and max(height, width) <= SMALL
        self.knows_content = self._is_bundled
        if self._is_bundled:
            self._bundled = feature_network("mnist", second=True).to(self._device)
            self.name = f"second-{self._bundled.name}"
            self.in_words = self._bundled.in_words
        else:
            self.name = f"random-convolutions-{SECOND_DIMENSION}"
            self.in_words = "convolutions with random weights, since no bundled network is trained on such images"

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 1 or 3, H, W]`` in [−1, 1] → ``[B, 48]``."""
        images = images.to(self._device, torch.float32)
        if self._is_bundled:
            grey = images.mean(dim=1, keepdim=True)
            resized = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)
            features: Tensor = self._bundled(resized)
            return features
        x = F.interpolate(images.expand(-1, 3, -1, -1), (SMALL, SMALL), mode="bilinear", antialias=True)
        for weight in self._kernels:
            x = F.silu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean(dim=(2, 3))

    @functools.cached_property
    def _kernels(self) -> list[Tensor]:
        """The weights ``[out, in, 3, 3]`` of the random convolutions, He normal, the same in every process."""
        generator = torch.Generator().manual_seed(derive_seed(0, "second-features", "weights"))
        kernels = []
        for channels, width in itertools.pairwise((3, *WIDTHS)):
            scale = (2 / (channels * 9)) ** 0.5
            kernels.append((torch.randn(width, channels, 3, 3, generator=generator) * scale).to(self._device))
        return kernels
