"""CLIP's image encoder ViT-B/32 (Radford et al. 2021) as an extractor, as torch-fidelity runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcsc_opt.metrics.extractors.network import PublishedNetwork, normalized, resized
from lcsc_opt.metrics.extractors.weights import PublishedFile, torch_fidelity_module

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipExtractor(PublishedNetwork):
    """512 features, equal to those of torch-fidelity, from OpenAI's archive ``ViT-B-32.pt`` or a state dict out of it.

    Arguments, name and errors are those of :class:`PublishedNetwork`.
    """

    images_with_graph = 128  # an image's graph takes 27 MB
    label = "clip-vit-b-32"  # as torch-fidelity calls it, too
    published = "OpenAI's CLIP ViT-B/32"
    module = "feature_extractor_clip"

    def _features(self, levels: Tensor) -> Tensor:
        pixels = resized(levels, self._network.input_resolution)
        features: Tensor = self._network(normalized(pixels, MEAN, STD))
        return features

    @classmethod
    def published_file(cls) -> PublishedFile:
        """See :class:`PublishedNetwork`."""
        module = torch_fidelity_module(cls.module)
        digest = module.MODEL_METADATA[cls.label]["hash"]
        return PublishedFile(module.MODEL_URLS[cls.label], f"{cls.label}-{digest}.pt", "clip", digest)

    def _used(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The image encoder; torch-fidelity takes the size of its output from ``text_projection``."""
        kept = ("visual.", "text_projection")
        return {name: tensor for name, tensor in state_dict.items() if name.startswith(kept)}

    def _build(self, state_dict: dict[str, Tensor]) -> tuple[Any, int]:
        network = self._module.build_model(dict(state_dict), torch.float32).visual
        return network, int(network.output_dim)
