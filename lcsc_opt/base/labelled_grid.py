"""A picture with a row of images for each model and a column for each prompt, class or noise, all labelled.

The PNG says where its rows are, so that a page can lay one over another.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydantic
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from lcsc_opt.base.contact_sheet import rgb_levels

SMALLEST = 96  # pixels of a cell; smaller images are enlarged, each pixel to a square
LARGEST = 320  # pixels of a cell; larger images are made smaller
FONT_SIZE = 15
MARGIN = 8  # pixels around a label
GAP = 3  # pixels of white between cells
MOST_LINES = 4  # of a label, and of the caption
_ROWS = "lcsc_rows"  # the entry of the PNG


class GridRow(NamedTuple):
    """The row of a model: its title, and ``[n, C, H, W]`` images in [-1, 1]."""

    title: str
    images: npt.NDArray[np.float32]


_FRACTIONS = str.maketrans({"¼": "1/4", "½": "1/2", "¾": "3/4"})


class GridBand(NamedTuple):
    """Where a row is in the picture.

    Attributes:
        title: of the row.
        box: left, upper, right and lower edge of its images in pixels.
    """

    title: str
    box: tuple[int, int, int, int]


_BANDS = pydantic.TypeAdapter(tuple[GridBand, ...])


def labelled_grid(rows: Sequence[GridRow], columns: Sequence[str], caption: str = "") -> bytes:
    """A PNG of at least one row of at least one image; ``columns`` are the titles of the columns.

    Images of another size than the first are fitted into its cell. The caption stands below, in at most
    :data:`MOST_LINES` lines. What has neither one nor three channels is shown in
    grey, by the mean of its channels.
    """
    font = ImageFont.load_default(FONT_SIZE)
    cells = [[_cell(image) for image in row.images] for row in rows]
    width, height = cells[0][0].size
    column_labels = [_wrapped(title, font, max(width, SMALLEST) - MARGIN) for title in columns]
    row_labels = [_wrapped(row.title, font, 2 * SMALLEST) for row in rows]
    line = FONT_SIZE + 3
    top = MARGIN + line * max(label.count("\n") + 1 for label in column_labels)
    left = MARGIN * 2 + max(_text_width(label, font) for label in row_labels)
    across = max(width, SMALLEST) + GAP
    down = max(height, line * max(label.count("\n") + 1 for label in row_labels)) + GAP
    size = (left + across * len(columns), top + down * len(rows))
    caption_lines = _wrapped(caption, font, size[0] - 2 * MARGIN)
    caption_height = line * (caption_lines.count("\n") + 1) if caption else 0
    sheet = Image.new("RGB", (size[0], size[1] + caption_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, label in enumerate(column_labels):
        draw.multiline_text((left + across * index, MARGIN / 2), label, fill="black", font=font, spacing=3)
    bands = []
    for number, (label, images) in enumerate(zip(row_labels, cells, strict=True)):
        upper = top + down * number
        draw.multiline_text((MARGIN, upper), label, fill="black", font=font, spacing=3)
        for index, image in enumerate(images):
            fitting = image if image.size == (width, height) else ImageOps.pad(image, (width, height), color="white")
            sheet.paste(fitting, (left + across * index, upper))
        box = (left, upper, left + across * len(images) - GAP, upper + height)
        bands.append(GridBand(rows[number].title, box))
    draw.multiline_text((MARGIN, size[1]), caption_lines, fill="black", font=font, spacing=3)
    content = io.BytesIO()
    sheet.save(content, format="PNG", pnginfo=_information(bands))
    return content.getvalue()


def bands_of(content: bytes) -> tuple[GridBand, ...]:
    """Where the rows of a :func:`labelled_grid` are; empty for any other PNG."""
    with Image.open(io.BytesIO(content)) as picture:
        text = getattr(picture, "text", {}).get(_ROWS, "[]")
    try:
        return _BANDS.validate_json(text)
    except pydantic.ValidationError:
        return ()


def band(content: bytes, number: int) -> bytes | None:
    """The images of one row of a :func:`labelled_grid` as a PNG; ``None`` if it has no such row."""
    bands = bands_of(content)
    if not 0 <= number < len(bands):
        return None
    cropped = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        picture.crop(bands[number].box).save(cropped, format="PNG")
    return cropped.getvalue()


def _information(bands: Sequence[GridBand]) -> PngImagePlugin.PngInfo:
    information = PngImagePlugin.PngInfo()
    information.add_text(_ROWS, json.dumps(bands))
    return information


def _cell(image: npt.NDArray[np.float32]) -> Image.Image:
    """``[C, H, W]`` in [-1, 1] as a picture of at most :data:`LARGEST` pixels, and of about :data:`SMALLEST`."""
    picture = Image.fromarray(np.ascontiguousarray(rgb_levels(image)))
    longest = max(picture.size)
    if longest > LARGEST:
        return ImageOps.contain(picture, (LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return ImageOps.scale(picture, math.ceil(SMALLEST / longest), Image.Resampling.NEAREST)


def _wrapped(title: str, font: Any, width: int) -> str:
    """A label in lines of at most so many pixels; of a long one, the beginning. The font has no quarters."""
    letter = max(font.getlength("n"), 1.0)
    characters = max(int(width / letter), 6)
    lines = textwrap.wrap(title.translate(_FRACTIONS), characters, max_lines=MOST_LINES, placeholder=" …") or [""]
    return "\n".join(lines)


def _text_width(label: str, font: Any) -> int:
    lengths: list[float] = [font.getlength(line) for line in label.split("\n")]
    return math.ceil(max(lengths))
