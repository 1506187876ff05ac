"""Many small images as one picture."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

COLUMNS = 8
GAP = 2  # pixels of white between images
SMALLEST = 48  # pixels; smaller images are enlarged, each pixel to a square


def contact_sheet(images: npt.ArrayLike, *, columns: int = COLUMNS) -> bytes:
    """A PNG of ``images``, row by row.

    Args:
        images: ``[n, C, H, W]`` in [-1, 1], with one channel or three; n at least 1.
        columns: how many the sheet has at most.
    """
    levels = np.clip(np.rint((np.asarray(images, dtype=np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    factor = max(1, -(-SMALLEST // max(levels.shape[2:])))
    pixels = levels.transpose(0, 2, 3, 1).repeat(factor, axis=1).repeat(factor, axis=2)  # [n, H, W, C]
    count, height, width = pixels.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="PNG")
    return content.getvalue()
