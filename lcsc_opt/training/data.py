"""The training data: the bundled images, CIFAR-10 or a folder, held in memory; and their latents."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.descent import descend
from lcsc_opt.base.errors import MetricError, TrainingError
from lcsc_opt.base.files import replacing, write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.sampling.latents import load_autoencoder
from lcsc_opt.training.networks import initialize

AT_ONCE = 500  # images that are decoded at once
BUNDLED: tuple[Bundled, ...] = get_args(Bundled)
FINAL_STD = 0.5  # of latents: sigma_data of the recipes
KL_WEIGHT = 1e-6  # Rombach et al. 2022, Appendix G: keeps latents bounded, and hardly changes the images
BATCH = 64  # of the small autoencoder
LEARNING_RATE = 2e-3
STEPS = 1000  # at most


def load_images(name: str, *, folder: Path) -> tuple[Tensor, str | None]:
    """``digits``, ``photographs``, ``mnist``, ``cifar10``, or all images of a folder or a zip file.

    Args:
        name: one of these.
        folder: keeps findings about files, and torchvision's CIFAR-10.

    Returns:
        ``[n, C, H, W]`` uint8, or float32 in [-1, 1]; and the name of the real images in a study file, ``None`` if they
        must be written for it.

    Raises:
        TrainingError: the folder does not exist or holds no images, they differ in size, or one cannot be read.
    """
    for bundled in BUNDLED:
        if name == bundled:
            return bundled_images(bundled)[0], None
    try:
        images, reference = _image_set(name, folder)
        pixels = torch.cat([_as_bytes(batch) for batch in images.batches(AT_ONCE)])
    except MetricError as error:
        raise TrainingError(f"--data: {str(error).removeprefix('reference: ')}") from error
    return pixels, reference


def _image_set(name: str, folder: Path) -> tuple[ImageSet, str]:
    """CIFAR-10, or the images of a folder or a zip file; and their name in a study file."""
    if name == "cifar10":
        reference = "cifar10-train"
        return ImageSet.of_dataset(reference, root=folder / "datasets"), reference
    path = expanded_path(name, error=TrainingError)
    if not path.exists():
        raise TrainingError(f"--data: {name} does not exist; expected {', '.join(BUNDLED)}, cifar10 or a folder")
    return ImageSet.of_files(path, folder=folder), str(path.absolute())


def write_images(path: Path, pixels: Tensor) -> None:
    """Write ``[n, C, H, W]`` as an ``.npz`` that a study file can name. Raises TrainingError if the disk refuses."""
    content = io.BytesIO()
    np.savez_compressed(content, arr_0=_as_bytes(pixels).permute(0, 2, 3, 1).numpy())
    write_atomically(path, content.getvalue(), error=TrainingError)


def _as_bytes(images: Tensor) -> Tensor:
    """``[n, C, H, W]`` from [-1, 1] to 0 … 255; bytes stay as they are."""
    if images.dtype == torch.uint8:
        return images
    return ((images + 1) * 127.5).round().to(torch.uint8)


def as_floats(images: Tensor) -> Tensor:
    """``[n, C, H, W]`` from 0 … 255 to [-1, 1]; floats stay as they are."""
    if images.dtype != torch.uint8:
        return images
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(autoencoder: nn.Module, pixels: Tensor, *, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The latents of all images. If the autoencoder gives a distribution, its mode is used.

    Args:
        autoencoder: an autoencoder of diffusers; it is moved to the device.
        pixels: ``[n, C, H, W]``, float32 in [-1, 1] or uint8.
        device: where it is run.

    Returns:
        ``[n, c, h, w]``, each channel with mean 0 and standard deviation :data:`FINAL_STD`; and the settings
        ``decoder`` of a study file that undo it, all but ``autoencoder``.

    Raises:
        TrainingError: it encodes other images, or decodes to another size.
    """
    network = cast("Any", autoencoder.eval().to(device))
    shape = pixels.shape[1:]
    channels = network.config["in_channels"]
    if channels != shape[0]:
        raise TrainingError(f"--autoencoder: expects {channels} channels, and the images have {shape[0]}")

    def encoded(images: Tensor) -> Tensor:
        output = network.encode(as_floats(images).to(device))
        if hasattr(output, "latent_dist"):
            mode: Tensor = output.latent_dist.mode()
            return mode
        latents: Tensor = output.latents
        return latents

    decoded_shape = network.decode(encoded(pixels[:1])).sample.shape[1:]
    if decoded_shape != shape:
        raise TrainingError(
            f"--autoencoder: images {list(shape)} come back as {list(decoded_shape)}; use images whose sides can be "
            "divided by its scale factor"
        )
    raw = torch.cat([encoded(batch).cpu() for batch in torch.split(pixels, BATCH)])
    mean = raw.mean((0, 2, 3))
    std = raw.std((0, 2, 3))
    latents = (raw - mean[:, None, None]) / std[:, None, None] * FINAL_STD
    settings = {
        "raw_mean": mean.tolist(),
        "raw_std": std.tolist(),
        "final_std": FINAL_STD,
        "low": -1.0,
        "batch_size": 256,
    }
    return latents, settings


def train_autoencoder(
    pixels: Tensor,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    steps: int,
) -> nn.Module:
    """A small ``AutoencoderKL`` that halves the images' sides, trained and written into ``folder``.

    Its latents have two channels for grey images, else four.

    The loss is the squared error plus, with a small weight, the KL divergence of Kingma & Welling 2014, Eq. 10.

    Args:
        pixels: ``[n, C, H, W]``, float32 in [-1, 1] or uint8.
        folder: for diffusers' ``from_pretrained``; an autoencoder that exists there is read instead.
        seed: the seed of weights, batches and noise.
        device: where it is trained.
        steps: the number of training steps, at most :data:`STEPS`.

    Raises:
        TrainingError: a side is odd, the loss is not finite, or the disk refuses.
    """
    channels, height, width = pixels.shape[1:]
    if (folder / "config.json").is_file():
        return load_autoencoder(folder)
    if height % 2 or width % 2:
        raise TrainingError(f"the small autoencoder halves images of even sides, got {height}x{width}")
    steps = min(steps, STEPS)
    notice(f"training a small autoencoder of these images first, {steps:,} steps; --autoencoder uses one of your own")
    generator = torch.Generator().manual_seed(derive_seed(seed, "autoencoder"))
    network: Any = import_extra("diffusers").AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        latent_channels=2 if channels == 1 else 4,
        norm_num_groups=4,
        sample_size=max(height, width),
        mid_block_add_attention=False,
    )
    initialize(network, generator)
    network.to(device)

    def loss_of_step(_step: int) -> Tensor:
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        images = as_floats(pixels[chosen]).to(device)
        posterior = network.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents = posterior.mean + posterior.std * noise
        loss: Tensor = F.mse_loss(network.decode(latents).sample, images) + KL_WEIGHT * posterior.kl().mean()
        return loss

    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    descend(loss_of_step, optimizer, steps=steps, schedule=schedule, description="training a small autoencoder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as pending:
            network.save_pretrained(pending, safe_serialization=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return cast("nn.Module", network)
