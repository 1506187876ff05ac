"""The training data: the bundled images, CIFAR-10 or a folder, held in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrainingError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.reference.images import ImageSet

AT_ONCE = 500  # images that are decoded at once
BUNDLED: tuple[Bundled, ...] = get_args(Bundled)


def load_images(name: str, *, folder: Path) -> tuple[Tensor, str | None]:
    """``digits``, ``photographs``, ``mnist``, ``cifar10``, or all images of a folder or a zip file.

    Args:
        name: one of these.
        folder: keeps findings about files, and torchvision's CIFAR-10.

    Returns:
        The bundled images as ``[n, C, H, W]`` float32 in [-1, 1], others as uint8; and the name of the real images in a
        study file, ``None`` if they must be written for it.

    Raises:
        TrainingError: the folder does not exist or holds no images, they differ in size, or one cannot be read.
    """
    for bundled in BUNDLED:  # a loop, since mypy does not narrow a text by ``in``
        if name == bundled:
            return bundled_images(bundled)[0], None
    path = expanded_path(name, error=TrainingError)
    if name != "cifar10" and not path.exists():
        raise TrainingError(f"--data: {name} does not exist; expected {', '.join(BUNDLED)}, cifar10 or a folder")
    try:
        if name == "cifar10":
            reference = "cifar10-train"
            images = ImageSet.of_dataset(reference, root=folder / "datasets")
        else:
            reference = str(path.absolute())
            images = ImageSet.of_files(path, folder=folder)
        pixels = torch.cat([_as_bytes(batch) for batch in images.batches(AT_ONCE)])
    except MetricError as error:
        # in a study file, images are given by the setting ``reference``
        raise TrainingError(f"--data: {str(error).removeprefix('reference: ')}") from error
    return pixels, reference


def write_images(path: Path, pixels: Tensor) -> None:
    """Write ``[n, C, H, W]`` as an ``.npz`` that a study file can name, whose images are ``[n, H, W, C]`` bytes.

    Raises:
        TrainingError: the disk refuses.
    """
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
