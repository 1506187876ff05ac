"""CLIP's image encoder ViT-B/32 (Radford et al. 2021) as an extractor, as torch-fidelity runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.metrics.extractors.network import normalized, resized, rgb_levels, weights_hash
from lcsc_opt.metrics.extractors.weights import (
    belongs_to_another_network,
    published_file,
    read_weights,
    torch_fidelity_module,
)

MODEL = "clip-vit-b-32"  # torch-fidelity's name
WEIGHTS = "OpenAI's CLIP ViT-B/32"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipExtractor:
    """512 features of RGB or grey images of any size, equal to those of torch-fidelity.

    Images are rounded to 256 levels first, and a gradient goes straight through that, as for Inception.

    Args:
        weights: OpenAI's ``ViT-B-32.pt`` (of this archive only the tensors are read), or its state dict in a file of
            its own; None takes the one in torch's hub folder, downloaded there when it is missing.
        device: where the network runs.

    Raises MetricError when torch-fidelity cannot be imported, or when the weights cannot be found, cannot be
    downloaded, would execute code on loading, or belong to another network.
    """

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        module = torch_fidelity_module("feature_extractor_clip")
        path = _hub_file(module) if weights is None else weights
        state_dict = _image_encoder(read_weights(path, what=WEIGHTS))
        self._network = _build(module, state_dict, path).to(device)
        self._dimension = int(self._network.output_dim)
        self._device = torch.device(device)
        self._name = f"{MODEL}-{self._dimension}-{weights_hash(state_dict)}"

    @property
    def name(self) -> str:
        """``clip-vit-b-32-512-<hash of the image encoder's weights>``."""
        return self._name

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return self._dimension

    @property
    def images_with_graph(self) -> int:
        """At once: an image's graph takes 27 MB."""
        return 128

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, 512]`` of ``[B, 1 or 3, H, W]`` in [−1, 1]. Raises MetricError for another shape."""
        pixels = resized(rgb_levels(images, self._device), self._network.input_resolution)
        features: Tensor = self._network(normalized(pixels, MEAN, STD))
        return features


def _hub_file(module: Any) -> Path:
    digest = module.MODEL_METADATA[MODEL]["hash"]
    return published_file(module.MODEL_URLS[MODEL], f"{MODEL}-{digest}.pt", setting="clip", hash_prefix=digest)


def _image_encoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the image encoder needs; torch-fidelity takes the size of its output from ``text_projection``."""
    kept = ("visual.", "text_projection")
    return {name: tensor for name, tensor in state_dict.items() if name.startswith(kept)}


def _build(module: Any, state_dict: dict[str, Tensor], path: Path) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their first weights from the global generator
            return module.build_model(dict(state_dict), torch.float32).visual.eval().requires_grad_(False)
    except (KeyError, RuntimeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise belongs_to_another_network(path, WEIGHTS) from error
