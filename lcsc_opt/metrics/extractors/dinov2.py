"""DINOv2 (Oquab et al. 2023) as an extractor: the class token of ViT-L/14, as FD-DINOv2 takes it (Stein et al. 2023).

torch-fidelity loads the network through torch's hub, which downloads and runs the authors' repository. The network is a
plain vision transformer, so it is written here, with the names of the published weights. Bytes are scaled and
normalized as in torch-fidelity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.metrics.extractors.network import PublishedNetwork, normalized, resized
from lcsc_opt.metrics.extractors.weights import PublishedFile

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SIZE = 224  # of images, as torch-fidelity and FD-DINOv2 take them
PATCH = 14
HEAD = 64  # channels of one attention head in all published sizes
OFFSET = 0.1  # of the interpolation of positions, as the authors' repository has it
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)


class DinoV2Extractor(PublishedNetwork):
    """The class token: 1,024 features for the published ViT-L/14. The size (S, B, L, g) follows from the weights.

    Arguments, name and errors are those of :class:`PublishedNetwork`.
    """

    images_with_graph = 16  # an image's graph takes 255 MB in ViT-L/14
    label = "dinov2"
    published = "DINOv2 without registers, dinov2_vitl14_pretrain.pth (S, B and g are known too)"
    module = "interpolate_compat_tensorflow"

    def _features(self, levels: Tensor) -> Tensor:
        features: Tensor = self._network(normalized(resized(levels, SIZE), MEAN, STD))
        return features

    @classmethod
    def published_file(cls) -> PublishedFile:
        """See :class:`PublishedNetwork`."""
        return PublishedFile(URL, URL.rpartition("/")[2], "dinov2")

    def _build(self, state_dict: dict[str, Tensor]) -> tuple[VisionTransformer, int]:
        """The network whose size the tensors show."""
        positions, width = state_dict["pos_embed"].shape[1:]
        depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
        gated = "blocks.0.mlp.w12.weight" in state_dict
        with torch.device("meta"):
            network = VisionTransformer(width, depth, math.isqrt(positions - 1), gated=gated)
        network.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()}, assign=True)
        return network, width


class VisionTransformer(nn.Module):
    """DINOv2's network, with the names of its published weights.

    Args:
        width: D, channels of a token.
        depth: blocks.
        positions: patches along a side of the images that the position embedding was trained on.
        gated: whether the layers between attentions are SwiGLU, as in the giant model.
    """

    def __init__(self, width: int, depth: int, positions: int, *, gated: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # for training; in the file, not used here
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(Block(width, gated=gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, 14 h, 14 w]`` → the class token ``[B, D]``."""
        patches = self.patch_embed["proj"](images)  # [B, D, h, w]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, h w, D]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1)
        tokens = tokens + self._positions(patches.shape[2], patches.shape[3])
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding for ``height`` × ``width`` patches: bicubic, by factors that the offset shifts."""
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(of_patches.shape[1])
        if height == width == side:
            return self.pos_embed
        grid = of_patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((height + OFFSET) / side, (width + OFFSET) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and two layers, each behind a normalization and scaled by channel before it is added."""

    def __init__(self, width: int, *, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))
        self.mlp: nn.Module = GatedLayers(width) if gated else Layers(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` → ``[B, T, D]``."""
        tokens = tokens + self.ls1["gamma"] * self._attend(self.norm1(tokens))
        added: Tensor = tokens + self.ls2["gamma"] * self.mlp(self.norm2(tokens))
        return added

    def _attend(self, tokens: Tensor) -> Tensor:
        queries, keys, values = self.attn["qkv"](tokens).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)  # [B, heads, T, 64]
        projected: Tensor = self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return projected


class Layers(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` → ``[B, T, D]``."""
        result: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return result


class GatedLayers(nn.Module):
    """SwiGLU (Shazeer 2020), with two thirds of the width in multiples of eight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` → ``[B, T, D]``."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        result: Tensor = self.w3(F.silu(gate) * value)
        return result
