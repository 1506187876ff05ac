"""Rewards: functions that score single images, each as an extractor with one feature. Its mean is the metric."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrajectoryError
from lcsc_opt.base.imports import import_dotted, import_extra, quiet_libraries
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.extractors.published import ClipExtractor, normalized, pretrained, rgb_levels

PUBLISHED: Mapping[str, str] = {
    "clip_score": "openai/clip-vit-large-patch14 or another CLIP",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, with HPS_v2.1_compressed.pt of xswu/HPSv2 in it",
}  # names of rewards → the folder with their weights
THUMBNAIL = 8  # pixels: height and width


class Reward:
    """A function that scores images, as an extractor with one feature.

    Args:
        name: for messages and the fingerprint of a study.
        function: images ``[N, C, H, W]``, nominally in [−1, 1] and on their device as the sampler gives them → scores
            ``[N]``, higher is better. It also gets ``prompts``, a list of N texts, if it has a parameter of this name.
            MetricSuite with a graph back to the images have a gradient.
        prompts: of the images, N texts.
    """

    dimension = 1

    def __init__(self, name: str, function: Callable[..., Any], prompts: Sequence[str] | None = None) -> None:
        self.name, self.function, self.prompts = name, function, prompts
        self._asks = "prompts" in inspect.signature(function).parameters

    def about(self, prompts: Sequence[str] | None) -> Reward:
        """The same reward for images of these prompts."""
        return Reward(self.name, self.function, prompts)

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 1]`` scores of ``[N, C, H, W]``.

        Raises:
            MetricError: it asks for prompts and there are none, or returns no finite scores ``[N]``.
        """
        if self._asks and self.prompts is None:
            raise MetricError(f"reward {self.name}: it takes prompts, and the sampler has none")
        found = self.function(images, **({"prompts": list(self.prompts or ())} if self._asks else {}))
        try:
            scores = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            scores = None
        if scores is None or scores.shape != (len(images),) or scores.is_complex():
            shown = repr(found)[:40] if scores is None else f"the shape {list(scores.shape)}"
            raise MetricError(f"reward {self.name}: returned {shown}, expected {len(images)} scores, [{len(images)}]")
        if not bool(torch.isfinite(scores).all()):
            raise MetricError(f"reward {self.name}: returned a score that is not finite")
        return scores[:, None].to(torch.promote_types(scores.dtype, torch.float32))


class _ClipReward:
    """The similarity of images to their prompts, by a CLIP: the CLIP score, PickScore or HPSv2.

    Args:
        name: a key of :data:`PUBLISHED`.
        folder: its weights, configuration and tokenizer in transformers' layout.
        device: where the network runs.

    Raises:
        MetricError: the folder does not hold such a network.
    """

    def __init__(self, name: str, folder: Path, *, device: torch.device | str = "cpu") -> None:
        expected = f"{PUBLISHED[name]}, in transformers' layout"
        transformers = import_extra("transformers")
        try:
            with torch.random.fork_rng(devices=[]), quiet_libraries():
                own = sorted(folder.glob("HPS*.pt")) if name == "hpsv2" else []
                if own:
                    network: Any = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
                    network.load_state_dict(of_open_clip(read_checkpoint(own[-1]).tensors))
                else:
                    network = pretrained(transformers.CLIPModel, folder, name, expected)
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, TrajectoryError) as error:
            reason = str(error).partition("\n")[0]
            raise MetricError(f"{folder}: holds no {name} ({reason}); give the folder of {expected}") from error
        network.eval().requires_grad_(requires_grad=False)
        self.name = f"{name}-{weights_sha256(network.state_dict())[:12]}"
        self._network, self._device = network.to(device), torch.device(device)
        scale = {"clip_score": 100.0, "hpsv2": 1.0}  # as torchmetrics and hpsv2 report them; PickScore has its own
        self._scale = scale.get(name) or float(network.logit_scale.exp())

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` scores, with a graph if the images ``[N, 1 or 3, H, W]`` have one."""
        functional = import_extra("torchvision.transforms.functional")
        config = self._network.config
        size, longest = config.vision_config.image_size, config.text_config.max_position_embeddings
        bicubic = functional.InterpolationMode.BICUBIC
        levels = functional.resize(rgb_levels(images, self._device), [size], bicubic).clamp(0, 255)
        top, left = (levels.shape[-2] - size) // 2, (levels.shape[-1] - size) // 2  # torchvision rounds these up
        crop = levels[..., top : top + size, left : left + size]
        pixels = normalized(crop, ClipExtractor.mean, ClipExtractor.std)
        tokens = self._tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        found = self._network(**tokens.to(self._device), pixel_values=pixels)
        scores: Tensor = self._scale * F.cosine_similarity(found.image_embeds, found.text_embeds)
        return scores


class Thumbnails:
    """The pixels of 8×8 thumbnails as features, for ``spread``: they need no network and no real images."""

    name, dimension = f"pixels-{THUMBNAIL}", 3 * THUMBNAIL**2

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 1 or 3, H, W]`` → ``[B, 192]``."""
        return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).expand(-1, 3, -1, -1).flatten(1)


def find_reward(name: str, *, weights: Path | None) -> Callable[[torch.device | str], Reward]:
    """What makes the reward on a device: one of :data:`PUBLISHED`, or the user's own function as ``module:function``.

    Args:
        name: as in the settings ``reward`` and ``held_out_reward``.
        weights: the folder of a published one.

    Raises:
        MetricError: the folder does not exist, or the function cannot be imported; and later, when it is made: the
            weights cannot be used.
    """
    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        own = import_dotted(name, setting=f"reward (one of one's own, or {known})", error=MetricError)
        return lambda _: Reward(name, own)
    if weights is None or not weights.exists():
        what = "is missing" if weights is None else f"{weights} does not exist"
        raise MetricError(f"weights: {{{name}: FOLDER}} {what}; give the folder of {PUBLISHED[name]}")

    def make(device: torch.device | str) -> Reward:
        published = _ClipReward(name, weights, device=device)
        return Reward(published.name, published)

    return make


_NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    *((".attn.out_proj.", ".self_attn.out_proj."), (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2.")),
    *((".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."), ("visual.proj", "visual_projection.weight")),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    *(("visual.ln_pre.", "vision_model.pre_layrnorm."), ("visual.ln_post.", "vision_model.post_layernorm.")),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *(("ln_final.", "text_model.final_layer_norm."), ("text_projection", "text_projection.weight")),
)  # of open_clip → of transformers' CLIPModel, replaced in this order


def of_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP of open_clip → the state dict of transformers' ``CLIPModel``, in float32."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours, 1)
        value = tensor.float()
        if ".attn.in_proj_" in name:  # query, key and value in one
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = third
        else:
            found[name] = value.T if name.endswith("_projection.weight") else value
    return found
