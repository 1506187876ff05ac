"""Many small images as one picture."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

COLUMNS = 8
GAP = 2  # pixels of white between images
SMALLEST = 48  # pixels; smaller images are enlarged, each pixel to a square


def contact_sheet(images: npt.ArrayLike) -> bytes:
    """A PNG of at least one image, row by row; ``images`` are ``[n, C, H, W]`` in [-1, 1] with C = 1 or 3."""
    levels = np.clip(np.rint((np.asarray(images, dtype=np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    factor = max(1, -(-SMALLEST // max(levels.shape[2:])))
    pixels = levels.transpose(0, 2, 3, 1).repeat(factor, axis=1).repeat(factor, axis=2)  # [n, H, W, C]
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    white = ((0, rows * columns - len(pixels)), (0, GAP), (0, GAP), (0, 0))
    cells = np.pad(np.broadcast_to(pixels, (*pixels.shape[:3], 3)), white, constant_values=255)
    _, height, width, _ = cells.shape
    sheet = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    sheet = np.ascontiguousarray(sheet[:-GAP, :-GAP])
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="PNG")
    return content.getvalue()
