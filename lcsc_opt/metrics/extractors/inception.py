"""The Inception network of published FIDs (Heusel et al. 2017), as torch-fidelity ports it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.metrics.extractors.network import resized, rgb_levels, weights_hash
from lcsc_opt.metrics.extractors.weights import (
    belongs_to_another_network,
    published_file,
    read_weights,
    torch_fidelity_module,
)

LAYER = "2048"  # torch-fidelity's name of the last pooling layer, and its number of features
LOGITS = "logits_unbiased"  # what torch-fidelity computes the Inception Score from
WEIGHTS = "torch-fidelity's Inception"
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class InceptionExtractor:
    """2,048 features of RGB or grey images of any size, equal to those of torch-fidelity.

    The network was made for bytes, so images are rounded to 256 levels as if they had been written to a PNG; a gradient
    goes straight through the rounding.

    Args:
        weights: a file with torch-fidelity's state dict, ``weights-inception-2015-12-05-6726825d.pth``;
            None takes the one in torch's hub folder, downloaded there when it is missing.
        device: where the network runs.

    Raises MetricError when torch-fidelity cannot be imported, or when the weights cannot be found, cannot be
    downloaded, would execute code on loading, or belong to another network.
    """

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        module = torch_fidelity_module("feature_extractor_inceptionv3")
        path = _hub_file(module.URL_INCEPTION_V3) if weights is None else weights
        state_dict = read_weights(path, what=WEIGHTS)
        self._network = _build(module, state_dict, path).to(device)
        self._device = torch.device(device)
        self._name = f"inception-v3-{LAYER}-{weights_hash(state_dict)}"

    @property
    def name(self) -> str:
        """``inception-v3-2048-<hash of the weights>``."""
        return self._name

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return int(LAYER)

    @property
    def images_with_graph(self) -> int:
        """At once: an image's graph takes 121 MB."""
        return 32

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of ``[B, 1 or 3, H, W]`` in [−1, 1].

        Raises MetricError for another shape.
        """
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, 2048]`` and logits ``[B, 1008]`` without their biases, as torch-fidelity's score takes them.

        Raises MetricError for images of another shape than ``[B, 1 or 3, H, W]``.
        """
        return self._of_levels(rgb_levels(images, self._device))

    def _of_levels(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """What torch-fidelity computes from bytes, from the same levels as floating-point numbers."""
        x = (resized(levels, self._network.INPUT_IMAGE_SIZE) - 128) / 128
        for name in LAYERS:
            x = getattr(self._network, name)(x)
        features = x.flatten(1)
        return features, features @ self._network.fc.weight.T


def _hub_file(url: str) -> Path:
    name = url.rpartition("/")[2]
    prefix = Path(name).stem.rpartition("-")[2]  # the start of the file's SHA-256
    return published_file(url, name, setting="inception", hash_prefix=prefix)


def _build(module: Any, state_dict: dict[str, Tensor], path: Path) -> Any:
    # torch-fidelity loads with weights_only=False; it is given a copy that holds what the safe load accepted.
    copy = io.BytesIO()
    torch.save(state_dict, copy)
    copy.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their first weights from the global generator
            return module.FeatureExtractorInceptionV3("inception-v3-compat", [LAYER, LOGITS], copy)
    except RuntimeError as error:
        raise belongs_to_another_network(path, WEIGHTS) from error
