from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.unet_examples  # noqa: F401  # prepares torchvision for diffusers
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH
from lcsc_opt.sampling import (
    DecoderSettings,
    DiffusersSampler,
    EdmDenoiser,
    HeunSampler,
    HeunSchedule,
    ImageNoise,
    LatentDecoder,
    NetworkSettings,
    SchedulerSettings,
    build_scheduler,
)
from lcsc_opt.sampling.latents import load_autoencoder

SHAPE = (2, 4, 4)


class Doubling(nn.Module):
    """Latents are images of half the brightness and half the size."""

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=2 * latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Pointed(nn.Module):
    """A denoiser and a noise prediction that lead to latents of 0.25, whatever the noise."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return torch.full_like(x, 0.25)


def decoding(autoencoder: nn.Module, mean: list[float], scale: list[float], **changes: Any) -> LatentDecoder:
    settings = {"autoencoder": "", "raw_mean": mean, "raw_std": scale, "final_std": 1.0, "low": -1.0, **changes}
    return LatentDecoder(autoencoder, DecoderSettings(**settings))


def test_latents_are_scaled_back_by_channel_and_images_to_their_range() -> None:
    latents = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    decoder = decoding(Doubling(), [0.1, 0.2], [2.0, 3.0], low=0.0, batch_size=2)
    raw = torch.stack([latents[:, 0] * 2.0 + 0.1, latents[:, 1] * 3.0 + 0.2], 1)
    expected = 2 * Doubling().decode(raw).sample - 1  # [0, 1] → [-1, 1]
    assert torch.allclose(decoder(latents), expected, atol=1e-5)
    plain = decoding(Doubling(), [0.0, 0.0], [1.0, 1.0])
    assert torch.allclose(plain(latents), Doubling().decode(latents).sample, atol=1e-5)


@pytest.mark.parametrize("kind", ["heun", "ddim"])
def test_samplers_decode_and_leave_clipping_to_what_sees_the_images(kind: str) -> None:
    decoder = decoding(Doubling(), [0.0, 0.0], [8.0, -1.0])
    settings = NetworkSettings(device="cpu")
    parts: Any = {"noise": ImageNoise(0, SHAPE), "decoder": decoder, "settings": settings}
    if kind == "heun":
        sampler: Any = HeunSampler(EdmDenoiser(Pointed()), schedule=HeunSchedule(steps=4), **parts)
    else:
        scheduler = build_scheduler("ddim", {"prediction_type": "sample", "clip_sample": False})
        sampler = DiffusersSampler(Pointed(), scheduler, SchedulerSettings(steps=4), **parts)
    images = sampler.sample(SEARCH, 0, 3)
    assert images.shape == (3, 2, 8, 8)
    assert torch.allclose(images[:, 0], torch.full((3, 8, 8), 4.0))  # 0.25 · 8 · 2
    assert torch.allclose(images[:, 1], torch.full((3, 8, 8), -0.5), atol=0.02)
    assert "autoencoder" in sampler.describe()["decoder"]


def test_an_autoencoder_comes_from_a_folder_of_diffusers(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4,), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    made.save_pretrained(tmp_path / "vae")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoder = decoding(load_autoencoder(tmp_path / "vae"), [0.0] * 4, [1.0] * 4)
    with torch.inference_mode():
        assert torch.allclose(decoder(latents), made.eval().decode(latents).sample, atol=1e-6)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ObjectiveError, match=r"decoder: .* cannot be loaded"):
        load_autoencoder(tmp_path / "vae")
    with pytest.raises(ObjectiveError, match=r"cannot be loaded: .*config\.json'; expected the folder of an Auto"):
        load_autoencoder(tmp_path)
