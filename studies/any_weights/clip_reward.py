"""The CLIP score of images and their prompts, as a reward of text-to-image models, with its gradient.

    objective:
      file: latent_diffusion.py
      settings: {..., reward: "clip_reward:score", loss: {reward: -1, fid: 1}}

``FOLDER`` has a CLIP in transformers' layout, such as ``openai/clip-vit-large-patch14`` or
``yuvalkirstain/PickScore_v1`` (whose scale is ``model.logit_scale.exp()``). A search finds what a reward calls good:
guard it with a distance, and look at another reward on held-out images (``held_out_reward``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

FOLDER = "clip-vit-large-patch14"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@functools.cache
def network(device: torch.device) -> tuple[CLIPModel, Any]:
    """The CLIP on a device, and its tokenizer."""
    model = CLIPModel.from_pretrained(FOLDER).eval().requires_grad_(requires_grad=False)
    return model.to(device), AutoTokenizer.from_pretrained(FOLDER)


def score(images: Tensor, prompts: list[str]) -> Tensor:
    """``[N]``: 100 times the cosine similarity of images ``[N, 3, H, W]`` in [-1, 1] and their prompts."""
    model, tokenizer = network(images.device)
    size = model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    shape = [int(size * length / min(images.shape[-2:])) for length in images.shape[-2:]]  # the shorter side is size
    top = (shape[0] - size) // 2
    left = (shape[1] - size) // 2
    scaled = F.interpolate((images.clamp(-1, 1) + 1) / 2, shape, mode="bicubic", antialias=True).clamp(0, 1)
    pixels = scaled[..., top : top + size, left : left + size]
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    std = torch.tensor(STD, device=images.device)[:, None, None]
    found = model(**tokens.to(images.device), pixel_values=(pixels - mean) / std)
    return 100 * F.cosine_similarity(found.image_embeds, found.text_embeds)
