"""Many small images as one picture."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

COLUMNS = 8
GAP = 2  # pixels of white between images
SMALLEST = 48  # pixels; smaller images are enlarged, each pixel to a square


def contact_sheet(images: npt.ArrayLike) -> bytes:
    """A PNG of at least one image, row by row; ``images`` are ``[n, C, H, W]`` in [-1, 1].

    What has neither one nor three channels, as measurements may, is shown in grey, by the mean of its channels.
    """
    pixels = _pixels(np.asarray(images, dtype=np.float64))
    count, height, width, _ = pixels.shape
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    missing_images = rows * columns - count
    # fills the last row, and the gaps below and to the right of each image
    white = ((0, missing_images), (0, GAP), (0, GAP), (0, 0))
    cells = np.pad(pixels, white, constant_values=255).reshape(rows, columns, height + GAP, width + GAP, 3)
    sheet = cells.swapaxes(1, 2).reshape(rows * (height + GAP), columns * (width + GAP), 3)
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(sheet[:-GAP, :-GAP])).save(content, format="PNG")
    return content.getvalue()


def rgb_levels(images: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """``[..., C, H, W]`` in [-1, 1] → ``[..., H, W, 3]`` in [0, 255].

    What has neither one nor three channels is grey, by the mean of its channels.
    """
    if images.shape[-3] != 3:
        images = images.mean(axis=-3, keepdims=True)
    levels = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
    pixels = np.moveaxis(levels, -3, -1)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))  # gray → three equal colours


def _pixels(images: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """``[n, C, H, W]`` in [-1, 1] → ``[n, H', W', 3]`` in [0, 255].

    Small images are enlarged by a whole factor, until the longer side has :data:`SMALLEST` pixels.
    """
    factor = math.ceil(SMALLEST / max(images.shape[2:]))  # at least 1
    return rgb_levels(images).repeat(factor, axis=1).repeat(factor, axis=2)
