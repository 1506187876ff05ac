"""Rewards: functions that score single images, each as an extractor with one feature. Its mean is the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrajectoryError
from lcsc_opt.base.imports import has_parameter, import_dotted, import_extra, quiet_libraries
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.extractors.published import ClipExtractor, normalized, pretrained, rgb_levels

# Names of rewards → the folder with their weights.
PUBLISHED: Mapping[str, str] = {
    "clip_score": "openai/clip-vit-large-patch14 or another CLIP",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, with HPS_v2.1_compressed.pt of xswu/HPSv2 in it",
}

# The factor of the cosine similarity, as torchmetrics and hpsv2 report it; PickScore's is one of its weights.
_SCALES = {"clip_score": 100.0, "hpsv2": 1.0}


class Reward:
    """A function that scores images, as an extractor with one feature.

    Args:
        name: for messages and the fingerprint of a study.
        function: images ``[N, C, H, W]``, nominally in [−1, 1] and on their device as the sampler gives them → scores
            ``[N]``, higher is better. It also gets ``prompts``, a list of N texts, if it has a parameter of this name.
            Scores with a graph back to the images have a gradient.
        prompts: the prompts of the images, N texts.
    """

    dimension = 1

    def __init__(self, name: str, function: Callable[..., Any], prompts: Sequence[str] | None = None) -> None:
        self.name = name
        self.function = function
        self.prompts = prompts
        self._needs_prompts = has_parameter(function, "prompts")

    def about(self, prompts: Sequence[str] | None) -> Reward:
        """The same reward for images of these prompts."""
        return Reward(self.name, self.function, prompts)

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 1]`` scores of ``[N, C, H, W]``.

        Raises:
            MetricError: it asks for prompts and there are none, or returns no finite scores ``[N]``.
        """
        if not self._needs_prompts:
            result = self.function(images)
        elif self.prompts is not None:
            result = self.function(images, prompts=list(self.prompts))
        else:
            raise MetricError(f"reward {self.name}: it needs prompts, and the sampler has none")
        scores = self._checked(result, len(images))
        return scores[:, None].to(torch.promote_types(scores.dtype, torch.float32))

    def _checked(self, result: Any, count: int) -> Tensor:
        """The result of the function as finite scores ``[count]``."""
        try:
            scores = torch.as_tensor(result)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"reward {self.name}: returned {repr(result)[:40]}, expected {count} scores, [{count}]"
            ) from error
        if scores.is_complex():
            raise MetricError(f"reward {self.name}: returned complex numbers, expected {count} real scores, [{count}]")
        if scores.shape != (count,):
            raise MetricError(
                f"reward {self.name}: returned the shape {list(scores.shape)}, expected {count} scores, [{count}]"
            )
        if not bool(torch.isfinite(scores).all()):
            raise MetricError(f"reward {self.name}: returned a score that is not finite")
        return scores


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
                network = _clip_network(transformers, name, folder, expected)
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, TrajectoryError) as error:
            reason = str(error).partition("\n")[0]
            raise MetricError(f"{folder}: holds no {name} ({reason}); give the folder of {expected}") from error
        network.eval().requires_grad_(requires_grad=False)
        self.name = f"{name}-{weights_sha256(network.state_dict())[:12]}"
        self._device = torch.device(device)
        self._network = network.to(device)
        self._scale = _SCALES.get(name) or float(network.logit_scale.exp())

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` scaled cosine similarities, with a graph if the images ``[N, 1 or 3, H, W]`` have one."""
        config = self._network.config
        tokens = self._tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = self._pixels(images, config.vision_config.image_size)
        embeddings = self._network(**tokens.to(self._device), pixel_values=pixels)
        scores: Tensor = self._scale * F.cosine_similarity(embeddings.image_embeds, embeddings.text_embeds)
        return scores

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        """``[N, 3, size, size]``: the centre of the images, scaled by their shorter side, as CLIP was trained on."""
        functional = import_extra("torchvision.transforms.functional")
        bicubic = functional.InterpolationMode.BICUBIC
        levels = functional.resize(rgb_levels(images, self._device), [size], bicubic).clamp(0, 255)
        height, width = levels.shape[-2:]
        # torchvision's own crop would round these up.
        top = (height - size) // 2
        left = (width - size) // 2
        crop = levels[..., top : top + size, left : left + size]
        return normalized(crop, ClipExtractor.mean, ClipExtractor.std)


def _clip_network(transformers: Any, name: str, folder: Path, expected: str) -> Any:
    """The CLIP of a folder: for HPSv2 the latest file of HPS weights in it, if there is one."""
    hps_files = sorted(folder.glob("HPS*.pt")) if name == "hpsv2" else []
    if not hps_files:
        return pretrained(transformers.CLIPModel, folder, name, expected)
    network: Any = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
    network.load_state_dict(clip_from_open_clip(read_checkpoint(hps_files[-1]).tensors))
    return network


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
        setting = f"reward (a function of your own, or {', '.join(PUBLISHED)})"
        function = import_dotted(name, setting=setting, error=MetricError)
        return lambda _: Reward(name, function)
    if weights is None:
        raise MetricError(f"weights: {{{name}: FOLDER}} is missing; give the folder of {PUBLISHED[name]}")
    if not weights.exists():
        raise MetricError(f"weights: {{{name}: FOLDER}} {weights} does not exist; give the folder of {PUBLISHED[name]}")

    def make(device: torch.device | str) -> Reward:
        published = _ClipReward(name, weights, device=device)
        return Reward(published.name, published)

    return make


# Parts of open_clip's names → those of transformers' CLIPModel, replaced in this order.
_NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("visual.proj", "visual_projection.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)


def clip_from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP of open_clip, as HPSv2's own file has it → the state dict of transformers' ``CLIPModel``, in float32."""
    converted: dict[str, Tensor] = {}
    for open_clip_name, tensor in weights.items():
        name = open_clip_name
        for open_clip_part, transformers_part in _NAMES:
            name = name.replace(open_clip_part, transformers_part, 1)
        value = tensor.float()
        if ".attn.in_proj_" in name:  # query, key and value in one tensor
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = third
        elif name.endswith("_projection.weight"):
            converted[name] = value.T  # open_clip multiplies by it from the right, [in, out]; a Linear has [out, in]
        else:
            converted[name] = value
    return converted
