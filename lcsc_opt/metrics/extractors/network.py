"""Shared by the extractors of published networks: reading weights, rounding images to levels, and the name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.extractors.weights import PublishedFile, read_weights, torch_fidelity_module


class PublishedNetwork(ABC):
    """An extractor around a published network, for RGB or grey images of any size.

    The network was made for bytes, so images are rounded to 256 levels as if they had been written to a PNG; a gradient
    goes straight through the rounding.

    Args:
        weights: a file with its state dict; None is the published file in torch's hub folder, which is downloaded where
            it is missing.
        device: where the network runs.

    Attributes:
        name: ``<label>-<dimension>-<hash of the weights>``.
        dimension: the number of features, D.
        images_with_graph: how many images may have a graph at once.

    Raises:
        MetricError: torch-fidelity cannot be imported, or the weights cannot be found, cannot be downloaded, would
            run code on loading, or belong to another network.
    """

    images_with_graph: ClassVar[int]
    label: ClassVar[str]  # in the extractor's name
    published: ClassVar[str]  # what the weights are, for messages
    module: ClassVar[str]  # of torch-fidelity, which it needs

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        self._module = torch_fidelity_module(self.module)
        path, state_dict = self._read(weights)
        try:
            with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
                network, self.dimension = self._build(state_dict)
        except (LookupError, RuntimeError, AttributeError, ValueError, ZeroDivisionError) as error:
            raise MetricError(f"{path}: belongs to another network; give the weights of {self.published}") from error
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self.name = f"{self.label}-{self.dimension}-{weights_hash(state_dict)}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, 1 or 3, H, W]`` in [−1, 1].

        Raises:
            MetricError: for another shape.
        """
        return self._features(rgb_levels(images, self._device))

    def _read(self, given: Path | None) -> tuple[Path, dict[str, Tensor]]:
        """Where the weights are from, and those of them that the features depend on."""
        path = self.published_file().path() if given is None else given
        return path, self._used(read_weights(path, what=self.published))

    @classmethod
    @abstractmethod
    def published_file(cls) -> PublishedFile:
        """The published weights.

        Raises:
            MetricError: torch-fidelity cannot be imported.
        """

    def _used(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the features depend on."""
        return state_dict

    @abstractmethod
    def _build(self, state_dict: dict[str, Tensor]) -> tuple[Any, int]:
        """The network and its number of features. Weights that do not fit may raise any error of torch."""

    @abstractmethod
    def _features(self, levels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 255] → ``[B, D]``."""


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """The first 12 hexadecimal digits of :func:`~lcsc_opt.checkpoints.weights.weights_sha256`."""
    return weights_sha256(weights)[:12]


def to_bytes(images: Tensor) -> Tensor:
    """[−1, 1] → 0 to 255 uint8, to the nearest level, clipped (as EDM does, Karras et al. 2022)."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_levels(images: Tensor) -> Tensor:
    """:func:`to_bytes` in floating point, with a gradient that goes straight through the rounding.

    The derivative is that of the levels before rounding: 127.5 for pixels in [−1, 1], and 0 outside, since a clipped
    pixel can move without changing its level.
    """
    levels = (images.detach() * 127.5 + 128).clamp(0, 255).floor()
    if not images.requires_grad:
        return levels
    exact = 127.5 * torch.where(images.abs() <= 1, images, images.detach())
    return levels + (exact - exact.detach())  # adds zero: the levels stay what they are, bit for bit


def rgb_levels(images: Tensor, device: torch.device) -> Tensor:
    """``[B, 1 or 3, H, W]`` in [−1, 1] → ``[B, 3, H, W]`` float32 levels on ``device``; grey becomes RGB.

    Raises:
        MetricError: for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise MetricError(f"images: expected [B, 1 or 3, H, W] for this extractor, got {list(images.shape)}")
    # Half-precision samples become float32 first: sums with 128 would lose levels.
    return to_levels(images.to(device, torch.float32)).expand(-1, 3, -1, -1).contiguous()


def resized(levels: Tensor, size: int) -> Tensor:
    """``[B, 3, H, W]`` → ``[B, 3, size, size]``, as torch-fidelity's networks scale all images."""
    module = torch_fidelity_module("interpolate_compat_tensorflow")
    scaled: Tensor = module.interpolate_bilinear_2d_like_tensorflow1x(levels, size=(size, size), align_corners=False)
    return scaled


def normalized(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels → what a network was trained on: the mean and standard deviation ``[3]`` are those of pixels in [0, 1]."""
    shift, scale = (levels.new_tensor([255 * value for value in values])[:, None, None] for values in (mean, std))
    return (levels - shift) / scale
