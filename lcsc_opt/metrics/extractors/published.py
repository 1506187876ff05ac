"""Published networks as extractors: Inception and CLIP as in torch-fidelity, DINOv2 from transformers."""

from __future__ import annotations

import contextlib
import io
import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lcsc_opt.base.errors import MetricError, TrajectoryError, text_of
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import weights_sha256

_ANSWER_SECONDS = 15.0  # after which a host that does not answer is given up


class _PublishedNetwork(ABC):
    """An extractor around a published network, for RGB or grey images of any size.

    The network was made for bytes, so images are rounded to 256 levels as if they had been written to a PNG; a gradient
    goes straight through the rounding.

    Args:
        weights: a file with its weights; by default the published ones, which are downloaded if they are missing.
        device: where the network runs.

    Attributes:
        network: the network itself, in evaluation mode; Inception has its batch normalization folded in.
        name: ``<label>-<dimension>-<hash of the weights>``.
        dimension: the number of features, D.
        graph_bytes: how many bytes the graph of an image takes, with something to spare.

    Raises:
        MetricError: a package is missing, or the weights cannot be found, cannot be downloaded, would run code on
            loading, or belong to another network.
    """

    graph_bytes: ClassVar[float]
    label: ClassVar[str]  # begins the extractor's name
    published: ClassVar[str]  # describes the weights in messages

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        try:
            with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
                network, self.dimension, used_weights = self._build(weights)
        except MetricError:  # it is a ValueError, too
            raise
        except (LookupError, RuntimeError, AttributeError, ValueError, TypeError, ZeroDivisionError) as error:
            raise MetricError(
                f"{weights or self.label}: belongs to another network; give the weights of {self.published}"
            ) from error
        self.network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self.name = f"{self.label}-{self.dimension}-{weights_sha256(used_weights)[:12]}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, 1 or 3, H, W]`` in [−1, 1]. Raises MetricError for another shape."""
        return self._features(rgb_levels(images, self._device))

    @classmethod
    @abstractmethod
    def fetch(cls) -> Path:
        """The path of the published weights, which are downloaded if necessary. Raises MetricError if that fails."""

    @abstractmethod
    def _build(self, weights: Path | None) -> tuple[Any, int, Mapping[str, Tensor]]:
        """The network, its number of features, and the weights that determine the features.

        Weights of another network may raise any error of torch.
        """

    @abstractmethod
    def _features(self, levels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 255] → ``[B, D]``."""

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The state dict in a file of any checkpoint format. No code in it is run."""
        try:
            tensors = read_checkpoint(path, key="").tensors  # "": it is the state dict itself, not one under a key
        except TrajectoryError as error:
            raise MetricError(f"{str(error).rstrip('.')}; give the weights of {self.published}") from error
        return {name: tensor.clone() for name, tensor in tensors.items()}  # not mapped: the file may be replaced


class InceptionExtractor(_PublishedNetwork):
    """The Inception network of published FIDs (Heusel et al. 2017), with torch-fidelity's 2,048 features.

    The weights are its file ``weights-inception-2015-12-05-6726825d.pth``.
    """

    graph_bytes = 134e6  # measured: 121 MB
    label = "inception-v3"
    published = "torch-fidelity's Inception"

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        super().__init__(weights, device=device)
        self._fold_normalization()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, 2048]`` and logits ``[B, 1008]`` without biases, as torch-fidelity's score uses them."""
        features = self(images)
        return features, features @ self.network.fc.weight.T

    @classmethod
    def fetch(cls) -> Path:
        """The file, in torch's hub folder."""
        url = import_extra("torch_fidelity.feature_extractor_inceptionv3").URL_INCEPTION_V3
        name = url.rpartition("/")[2]  # weights-inception-2015-12-05-<begin of its SHA-256>.pth
        digest = Path(name).stem.rpartition("-")[2]
        return _downloaded(url, name, "inception", digest)

    def _features(self, levels: Tensor) -> Tensor:
        """The features that torch-fidelity computes from bytes, from the same levels in floating point.

        The network's own call takes bytes only, and has no gradient.
        """
        x = (_resized(levels, self.network.INPUT_IMAGE_SIZE) - 128) / 128
        *layers, _ = self.network.children()  # one after the other, the classifier last
        for layer in layers:
            x = layer(x)
        return x.flatten(1)

    def _fold_normalization(self) -> None:
        """Make batch normalization, which is linear in evaluation, a part of the convolutions: the same features."""
        block_class = import_extra("torch_fidelity.feature_extractor_inceptionv3").BasicConv2d
        for block in self.network.modules():
            if isinstance(block, block_class):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        if self._device.type == "cpu":  # where this layout takes .6 to .8 of the time
            self.network.to(memory_format=torch.channels_last)

    def _build(self, weights: Path | None) -> tuple[Any, int, Mapping[str, Tensor]]:
        module = import_extra("torch_fidelity.feature_extractor_inceptionv3")
        tensors = self._read(weights or self.fetch())
        copy = io.BytesIO()  # torch-fidelity loads with weights_only=False; it gets what the safe reader accepted
        torch.save(tensors, copy)
        copy.seek(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], copy)
        return network, 2048, tensors


class ClipExtractor(_PublishedNetwork):
    """CLIP's image encoder ViT-B/32 (Radford et al. 2021), with torch-fidelity's 512 features.

    The weights are OpenAI's archive ``ViT-B-32.pt`` or a state dict from it.
    """

    graph_bytes = 33.5e6  # measured: 27 MB
    label = "clip-vit-b-32"  # as torch-fidelity calls it, too
    published = "OpenAI's CLIP ViT-B/32"
    mean = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images
    std = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def fetch(cls) -> Path:
        """The archive, in torch's hub folder."""
        module = import_extra("torch_fidelity.feature_extractor_clip")
        digest = module.MODEL_METADATA[cls.label]["hash"]
        return _downloaded(module.MODEL_URLS[cls.label], f"{cls.label}-{digest}.pt", "clip", digest)

    def _features(self, levels: Tensor) -> Tensor:
        pixels = _resized(levels, self.network.input_resolution)
        features: Tensor = self.network(normalized(pixels, self.mean, self.std))
        return features

    def _build(self, weights: Path | None) -> tuple[Any, int, Mapping[str, Tensor]]:
        module = import_extra("torch_fidelity.feature_extractor_clip")
        tensors = self._read(weights or self.fetch())
        prefixes = ("visual.", "text_projection")  # torch-fidelity reads the size of its output from the second
        image_weights = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        # of a copy: text_projection is deleted from it, and the extractor's name is made of all image_weights
        network = module.build_model(dict(image_weights), torch.float32).visual
        return network, int(network.output_dim), image_weights


class DinoV2Extractor(_PublishedNetwork):
    """DINOv2 (Oquab et al. 2023): the class token of ViT-L/14, as FD-DINOv2 uses it (Stein et al. 2023).

    The weights are a folder in transformers' layout, such as that of ``facebook/dinov2-large``: 1,024 features; the
    sizes S, B and g serve as well. Bytes are scaled and normalized as in torch-fidelity, and the position embedding is
    scaled to 16 × 16 patches as in the authors' repository.
    """

    graph_bytes = 268e6  # measured in ViT-L/14: 255 MB
    label = "dinov2"
    published = "DINOv2 without registers, a folder in transformers' layout such as that of facebook/dinov2-large"
    size = 224  # of images, as torch-fidelity and FD-DINOv2 scale them
    mean = (0.485, 0.456, 0.406)  # of ImageNet
    std = (0.229, 0.224, 0.225)

    @classmethod
    def fetch(cls) -> Path:
        """The folder, in the cache of the hub."""
        notice("dinov2: its weights are downloaded unless they are in the hub's cache")
        try:
            files = ["config.json", "model.safetensors"]
            hub = import_extra("huggingface_hub")
            return Path(hub.snapshot_download("facebook/dinov2-large", allow_patterns=files))
        except OSError as error:
            raise MetricError(
                f"the weights of dinov2 cannot be downloaded ({text_of(error)[:200]}); give the folder in weights: "
                f"{{dinov2: PATH}}, {cls.published}"
            ) from error

    def _features(self, levels: Tensor) -> Tensor:
        pixels = normalized(_resized(levels, self.size), self.mean, self.std)
        features: Tensor = self.network(pixel_values=pixels).pooler_output
        return features

    def _build(self, weights: Path | None) -> tuple[Any, int, Mapping[str, Tensor]]:
        kind = import_extra("transformers").Dinov2Model
        network = self._pretrained(kind, weights or self.fetch())
        # the extractor is named after the weights of the file, before positions are scaled
        original_weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        embeddings = network.embeddings
        patches = self.size // int(embeddings.patch_embeddings.patch_size[0])
        scaled = _scaled_positions(embeddings.position_embeddings.data, patches)
        embeddings.position_embeddings = nn.Parameter(scaled)
        return network, int(network.config.hidden_size), original_weights

    def _pretrained(self, kind: Any, folder: Path) -> Any:
        """A network of transformers of the class ``kind`` in float32, with all weights from a folder of safetensors.

        Raises:
            MetricError: it cannot be read.
            ValueError: transformers would draw some of its weights at random.
        """
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
        try:
            with quiet_libraries():
                network, loading = kind.from_pretrained(str(folder), dtype=torch.float32, **options)
        except Exception as error:  # torn weights and wrong configurations have exceptions of their own libraries
            raise MetricError(
                f"{folder}: cannot be read ({text_of(error)[:200]}); give the folder in weights: "
                f"{{dinov2: PATH}}, {self.published}"
            ) from error
        if any(loading[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ValueError("transformers would draw the rest at random")
        return network


def _downloaded(url: str, name: str, setting: str, digest: str) -> Path:
    """The file at ``url``, downloaded once, and kept as ``name`` in torch's hub folder.

    Args:
        url: of the published weights.
        name: of the file.
        setting: the extractor's name in the setting ``weights``, for messages.
        digest: the begin of the file's SHA-256, in hexadecimal.

    Raises:
        MetricError: it cannot be downloaded, or has another SHA-256.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        notice(f"{setting}: downloading its weights from {url}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _impatient_sockets():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of the download is wrong
            raise MetricError(
                f"the weights of {setting} cannot be downloaded ({error}); fetch {url} and put it at {path}, give its "
                f"path in the setting weights: {{{setting}: PATH}}, or use a network that is here: "
                "loss: fdr@features:mine for one of yours; to try things out also those of the bundled data sets, "
                "fdr@digits (8×8), fdr@mnist (16×16) and fdr@photographs (32×32)"
            ) from None  # urllib's own three tracebacks say no more
    return path


@contextlib.contextmanager
def _impatient_sockets() -> Iterator[None]:
    """While this is open, a host that does not answer is given up in seconds; torch would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_ANSWER_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _scaled_positions(positions: Tensor, patches: int) -> Tensor:
    """A position embedding ``[1, 1 + side², D]``, scaled bicubically to ``patches`` × ``patches`` patches.

    The size is 0.1 of a patch larger before it is divided, as in the authors' repository: rounding loses no patch.
    """
    class_position = positions[:, :1]
    patch_positions = positions[:, 1:]
    side = math.isqrt(patch_positions.shape[1])
    if patches == side:
        return positions
    grid = patch_positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (patches + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1)


def rgb_levels(images: Tensor, device: torch.device) -> Tensor:
    """``[B, 1 or 3, H, W]`` in [−1, 1] → ``[B, 3, H, W]`` float32 levels 0 to 255 on ``device``; grey becomes RGB.

    Levels are the nearest, clipped (as EDM does, Karras et al. 2022). The gradient goes straight through the rounding:
    127.5 for pixels in [−1, 1], and 0 outside, since a clipped pixel can move without changing its level.

    Raises:
        MetricError: for another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise MetricError(f"images: expected [B, 1 or 3, H, W] for this extractor, got {list(images.shape)}")
    images = images.to(device, torch.float32)  # in half precision, sums with 128 would lose levels
    levels = (images.detach() * 127.5 + 128).clamp(0, 255).floor()
    if images.requires_grad:
        exact = 127.5 * torch.where(images.abs() <= 1, images, images.detach())
        levels = levels + (exact - exact.detach())  # adds zero with a graph: levels stay the same, bit for bit
    return levels.expand(-1, 3, -1, -1).contiguous()


def _resized(levels: Tensor, size: int) -> Tensor:
    """``[B, 3, H, W]`` → ``[B, 3, size, size]``, as torch-fidelity's networks scale all images."""
    module = import_extra("torch_fidelity.interpolate_compat_tensorflow")
    scaled: Tensor = module.interpolate_bilinear_2d_like_tensorflow1x(levels, size=(size, size), align_corners=False)
    return scaled


def normalized(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels 0 to 255, normalized by the mean and standard deviation ``[3]`` of pixels in [0, 1]."""
    shift = levels.new_tensor([255 * value for value in mean])[:, None, None]
    scale = levels.new_tensor([255 * value for value in std])[:, None, None]
    return (levels - shift) / scale
