"""Rewards by name, from weights that are on this machine: the CLIP score, PickScore, and aesthetic heads on CLIP.

All are CLIPs in transformers' layout, and have a gradient. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from lcsc_opt.base.errors import MetricError, text_of
from lcsc_opt.base.imports import import_dotted, import_extra
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.extractors.published import normalized, rgb_levels
from lcsc_opt.metrics.extractors.rewards import Reward

_Layer = tuple[Tensor, Tensor]
"""Weight ``[out, in]`` and bias ``[out]``."""
_LAYER = re.compile(r"(?:layers\.)?(?:(?P<place>\d+)\.)?(?P<kind>weight|bias)")


class NamedReward(FrozenModel):
    """A reward by name, with the places of its weights: folders, or names whose files are in the hub's cache.

    Attributes:
        clip: a CLIP, whose score of an image and its prompt is 100 times the cosine of their embeddings (Hessel et al.
            2021). With ``aesthetic``, the CLIP that the head was trained on.
        pickscore: PickScore (Kirstain et al. 2023), a CLIP whose score is the cosine times its own scale.
        aesthetic: a file of linear layers on the embedding of an image, such as LAION's
            ``sac+logos+ava1-l14-linearMSE.pth``; it needs no prompts.
        processor: a folder with the tokenizer and the normalization of images, if they are not with the network.
            PickScore's is ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
    """

    clip: str | None = None
    pickscore: str | None = None
    aesthetic: str | None = None
    processor: str | None = None

    @model_validator(mode="after")
    def _one_network(self) -> NamedReward:
        if (self.clip is None) == (self.pickscore is None) or (self.aesthetic is not None and self.clip is None):
            raise ValueError(
                "expected {clip: FOLDER}, {pickscore: FOLDER} or {aesthetic: FILE, clip: FOLDER}, each optionally with "
                "processor: FOLDER"
            )
        return self

    def found(self, place: Callable[[str], Path]) -> Callable[[torch.device | str], Reward]:
        """What loads the reward on a device.

        Args:
            place: a path of the settings → the whole path, which need not exist.

        Raises:
            MetricError: a file or a folder is not there; and later, when it is loaded: it holds other weights.
        """
        folder = _place(self.clip or self.pickscore or "", place)
        processor = folder if self.processor is None else _place(self.processor, place)
        head = None
        if self.aesthetic is not None:
            head = place(self.aesthetic)
            if not head.is_file():
                raise MetricError(f"reward: {self.aesthetic}: there is no such file of an aesthetic head")

        def load(device: torch.device | str) -> Reward:
            network = _ClipNetwork(folder, processor, device)
            if head is not None:
                layers, head_sha256 = _layers(head, network.dimension)
                scorer = _AestheticScore(network, layers)
                return Reward(f"aesthetic-{head_sha256[:12]}-{network.sha256[:12]}", scorer)
            if self.pickscore is not None:
                scale = float(network.model.logit_scale.exp())
                return Reward(f"pickscore-{network.sha256[:12]}", _PromptScore(network, processor, scale))
            return Reward(f"clip-{network.sha256[:12]}", _PromptScore(network, processor, 100.0))

        return load


def find_reward(
    setting: str | NamedReward, *, place: Callable[[str], Path] = Path
) -> Callable[[torch.device | str], Reward]:
    """What loads a reward on a device: a function of the user's, ``module:function``, or a network by name.

    Raises:
        MetricError: it cannot be imported, or its weights are not there.
    """
    if isinstance(setting, NamedReward):
        return setting.found(place)
    function = import_dotted(setting, setting="reward", error=MetricError)
    return lambda _device: Reward(setting, function)


def _place(text: str, place: Callable[[str], Path]) -> str:
    """A folder, or a name at the hub whose files are in its cache.

    Raises:
        MetricError: it is neither.
    """
    path = place(text)
    if path.is_dir():
        return str(path)
    hub = import_extra("huggingface_hub")
    try:
        return str(hub.snapshot_download(text, local_files_only=True))
    except Exception as error:  # the hub has several, also for names that none could have
        raise MetricError(
            f"reward: {text} is neither a folder nor in the hub's cache; 'hf download {text} --local-dir FOLDER' "
            "fetches it on a machine with a network"
        ) from error


class _ClipNetwork:
    """A CLIP of transformers in float32, with the scaling and the normalization of its images.

    Raises:
        MetricError: the folder holds no such network, or not all of its weights.
    """

    def __init__(self, folder: str, processor: str, device: torch.device | str) -> None:
        transformers = import_extra("transformers")
        try:
            with quiet_libraries():
                self.model, loading = transformers.CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True
                )
                of_images = transformers.CLIPImageProcessor.from_pretrained(processor)
        except Exception as error:  # torn weights and wrong configurations have exceptions of their own libraries
            raise MetricError(
                f"reward: {folder} cannot be read as a CLIP of transformers: {text_of(error)[:200]}"
            ) from (error)
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise MetricError(f"reward: {folder} lacks weights of a CLIP: transformers would draw them at random")
        self.sha256 = weights_sha256(self.model.state_dict())
        self.device = torch.device(device)
        self.model = self.model.eval().requires_grad_(requires_grad=False).to(self.device)
        self._size = int(self.model.config.vision_config.image_size)
        self._mean = tuple(of_images.image_mean)
        self._std = tuple(of_images.image_std)
        self.dimension = int(self.model.config.projection_dim)

    def image_embeddings(self, images: Tensor) -> Tensor:
        """``[N, D]`` of length one, of ``[N, 1 or 3, H, W]`` in [-1, 1], with their graph."""
        levels = rgb_levels(images, self.device)
        size = self._size
        shape = [
            int(size * length / min(levels.shape[-2:])) for length in levels.shape[-2:]
        ]  # the shorter side is size
        scaled = F.interpolate(levels, shape, mode="bicubic", antialias=True).clamp(0, 255)
        top, left = ((length - size) // 2 for length in shape)
        pixels = normalized(scaled[..., top : top + size, left : left + size], self._mean, self._std)
        features = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def text_embeddings(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """``[N, D]`` of length one."""
        longest = int(self.model.config.text_config.max_position_embeddings)
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        features = self.model.text_projection(self.model.text_model(**tokens.to(self.device)).pooler_output)
        return F.normalize(features, dim=-1)


class _PromptScore:
    """The cosine of images and their prompts, times a scale."""

    def __init__(self, network: _ClipNetwork, processor: str, scale: float) -> None:
        self._network = network
        self._scale = scale
        try:
            self._tokenizer = import_extra("transformers").AutoTokenizer.from_pretrained(processor)
        except Exception as error:
            raise MetricError(
                f"reward: {processor} has no tokenizer that can be read; name a folder that has one, as processor: "
                "FOLDER"
            ) from error
        self._embedded: dict[str, Tensor] = {}  # prompts are few, and come again in every evaluation

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]``."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        if unknown:
            embeddings = self._network.text_embeddings(self._tokenizer, unknown)
            self._embedded |= dict(zip(unknown, embeddings, strict=True))
        texts = torch.stack([self._embedded[prompt] for prompt in prompts])
        return self._scale * (self._network.image_embeddings(images) * texts).sum(dim=-1)


class _AestheticScore:
    """Linear layers, each a weight and a bias, on the embedding of an image."""

    def __init__(self, network: _ClipNetwork, layers: Sequence[_Layer]) -> None:
        self._network = network
        self._layers = [tuple(tensor.to(network.device) for tensor in layer) for layer in layers]

    def __call__(self, images: Tensor) -> Tensor:
        """``[N]``."""
        values = self._network.image_embeddings(images)
        for weight, bias in self._layers:
            values = F.linear(values, weight, bias)
        return values[:, 0]


def _layers(path: Path, dimension: int) -> tuple[list[_Layer], str]:
    """The linear layers of a head in their order, and the SHA-256 of their weights.

    LAION's first head is one layer (``weight``, ``bias``), the improved one five (``layers.0.weight`` …), between which
    only dropout stands.

    Raises:
        MetricError: the file holds anything else, or layers for another number of features.
    """
    tensors: Mapping[str, Tensor] = read_checkpoint(path, key="").tensors
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise MetricError(
                f"reward: {path}: {name} is no weight of linear layers, which an aesthetic head is made of"
            )
        found.setdefault(int(match["place"] or 0), {})[match["kind"]] = tensor.float().clone()
    layers = []
    width = dimension
    for place in sorted(found):
        weight, bias = (found[place].get(kind, torch.empty(0)) for kind in ("weight", "bias"))
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != (len(weight),):
            raise MetricError(
                f"reward: {path}: layer {place} does not fit {width} features; give the CLIP of this head"
            )
        layers.append((weight, bias))
        width = len(weight)
    if width != 1:
        raise MetricError(f"reward: {path}: its last layer gives {width} numbers for an image; expected one")
    return layers, weights_sha256(tensors)
