"""The Inception network of published FIDs (Heusel et al. 2017), as torch-fidelity ports it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.metrics.extractors.network import PublishedNetwork, resized
from lcsc_opt.metrics.extractors.weights import PublishedFile, torch_fidelity_module

LAYER = "2048"  # torch-fidelity's name of the last pooling layer, and its number of features
LOGITS = "logits_unbiased"  # what torch-fidelity computes the Inception Score from
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class InceptionExtractor(PublishedNetwork):
    """2,048 features, equal to those of torch-fidelity, from its file ``weights-inception-2015-12-05-6726825d.pth``.

    Arguments, name and errors are those of :class:`PublishedNetwork`.
    """

    images_with_graph = 32  # an image's graph takes 121 MB
    label = "inception-v3"
    published = "torch-fidelity's Inception"
    module = "feature_extractor_inceptionv3"

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, 2048]`` and logits ``[B, 1008]`` without their biases, as torch-fidelity's score takes them.

        Raises:
            MetricError: for images of another shape than ``[B, 1 or 3, H, W]``.
        """
        features = self(images)
        return features, features @ self._network.fc.weight.T

    def _features(self, levels: Tensor) -> Tensor:
        """The features that torch-fidelity computes from bytes, from the same levels in floating point."""
        x = (resized(levels, self._network.INPUT_IMAGE_SIZE) - 128) / 128
        for name in LAYERS:
            x = getattr(self._network, name)(x)
        return x.flatten(1)

    @classmethod
    def published_file(cls) -> PublishedFile:
        """See :class:`PublishedNetwork`."""
        url = torch_fidelity_module(cls.module).URL_INCEPTION_V3
        name = url.rpartition("/")[2]
        return PublishedFile(
            url, name, "inception", Path(name).stem.rpartition("-")[2]
        )  # ends with its SHA-256's start

    def _build(self, state_dict: dict[str, Tensor]) -> tuple[Any, int]:
        # torch-fidelity loads with weights_only=False; it is given a copy that holds what the safe reader accepted.
        copy = io.BytesIO()
        torch.save(state_dict, copy)
        copy.seek(0)
        return self._module.FeatureExtractorInceptionV3("inception-v3-compat", [LAYER, LOGITS], copy), int(LAYER)


class RandomInception(InceptionExtractor):
    """The same network with random weights, for trying things without a download; the same weights each time.

    FID in its features falls when samples look more like real images, but compares with no published one.

    Args:
        device: where the network runs.
    """

    label = "inception-random"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        super().__init__(device=device)

    def _read(self, given: Path | None) -> tuple[Path, dict[str, Tensor]]:  # noqa: ARG002
        """He normal weights, with which signals keep their size, and normalizations that change nothing."""

        class Unloaded(self._module.FeatureExtractorInceptionV3):  # type: ignore[misc,name-defined]
            def load_state_dict(self, *_: Any, **__: Any) -> None:
                pass

        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        with torch.device("meta"):  # where layers draw nothing from the global generator
            network = Unloaded(self.label, [LAYER], nothing)
        generator = torch.Generator().manual_seed(0)
        for module in network.to_empty(device="cpu").modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(network.fc.bias)
        return Path(self.label), network.state_dict()
