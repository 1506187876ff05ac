"""Training images: the bundled ones, CIFAR-10, or a folder. All have one size, and are held in memory."""

from __future__ import annotations

import dataclasses
import io
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrainingError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.metrics.reference.images import ImageSet, image_files
from lcsc_opt.metrics.reference.setting import dataset_images, dataset_settings
from lcsc_opt.training.images import Bundled, bundled_images

AT_ONCE = 500  # images that are decoded at once
BUNDLED: tuple[Bundled, ...] = ("digits", "photographs")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Images to train on, and how samples are compared with them.

    Attributes:
        name: as it was given.
        pixels: ``[n, C, H, W]`` uint8, or float32 in [-1, 1].
        features: the name of features that suit the images, and with a 2 behind it of others, for held-out reports;
            ``None`` for Inception's.
        reference: the name of the real images in a study file; ``None`` if they must be written beside it.
    """

    name: str
    pixels: Tensor
    features: str | None = None
    reference: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[C, H, W]``."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """The number of images and a checksum of their pixels, as a training's description has them."""
        return f"{len(self.pixels):,} images, CRC-32 {zlib.crc32(self.pixels.contiguous().numpy().data):08x}"

    def write_reference(self, path: Path) -> None:
        """Write the images as an ``.npz`` that a study file can name.

        Raises:
            TrainingError: the disk refuses.
        """
        content = io.BytesIO()
        np.savez_compressed(content, arr_0=as_bytes(self.pixels).permute(0, 2, 3, 1).numpy())
        write_atomically(path, content.getvalue(), error=TrainingError)


def load_images(name: str, *, cache: Path) -> TrainingData:
    """``digits``, ``photographs``, ``cifar10``, or all images of a folder or a zip file.

    Args:
        name: one of these.
        cache: a folder that keeps findings about files; torchvision's CIFAR-10 is looked for there.

    Raises:
        TrainingError: the folder is not there or holds no images, they differ in size, or one cannot be read.
    """
    for bundled in BUNDLED:
        if name == bundled:
            return TrainingData(name, bundled_images(bundled)[0], features=name)
    path = Path(name).expanduser()
    try:
        if name == "cifar10":
            settings = dataset_settings("cifar10-train")
            assert settings is not None  # a known data set
            images: ImageSet = dataset_images(settings, root=cache / "datasets")
            reference = "cifar10-train"
        elif path.exists():
            images, reference = image_files(path, cache=cache / "references"), str(path.absolute())
        else:
            raise TrainingError(f"--data: {name} does not exist; expected {', '.join(BUNDLED)}, cifar10 or a folder")
        pixels = torch.cat([as_bytes(batch) for batch in images.batches(AT_ONCE)])
    except MetricError as error:
        raise TrainingError(f"--data: {str(error).removeprefix('reference: ')}") from error
    return TrainingData(name, pixels, reference=reference)


def as_bytes(images: Tensor) -> Tensor:
    """``[n, C, H, W]`` from [-1, 1] to 0 … 255; bytes stay as they are."""
    return images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round().to(torch.uint8)


def as_floats(images: Tensor) -> Tensor:
    """``[n, C, H, W]`` from 0 … 255 to [-1, 1]; floats stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
