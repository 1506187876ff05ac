"""Many small images as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
GAP = 2  # pixels of white between images
SMALLEST = 48  # pixels; smaller images are enlarged, each pixel to a square
SMALLEST_LABELLED = 112  # pixels, so that a label fits above an image
LARGEST_LABELLED = 256  # pixels; larger images are reduced
FONT_SIZE = 13
_LINE = FONT_SIZE + 4  # pixels from one line of text to the next
_MARGIN = 168  # pixels left of the images, for the labels of rows
_TEXT = (40, 40, 40)
_HIGHLIGHT = (0, 110, 50)


def contact_sheet(images: npt.ArrayLike) -> bytes:
    """A PNG of at least one image, row by row; ``images`` are ``[n, C, H, W]`` in [-1, 1] with C = 1 or 3."""
    pixels = _pixels(np.asarray(images, dtype=np.float64), SMALLEST)
    count, height, width, _ = pixels.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    missing_images = rows * columns - count
    white = ((0, missing_images), (0, GAP), (0, GAP), (0, 0))
    cells = np.pad(pixels, white, constant_values=255).reshape(rows, columns, height + GAP, width + GAP, 3)
    sheet = cells.swapaxes(1, 2).reshape(rows * (height + GAP), columns * (width + GAP), 3)
    return _png(Image.fromarray(np.ascontiguousarray(sheet[:-GAP, :-GAP])))


def thumbnails(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """``[n, C, H, W]`` in [-1, 1] → ``[n, H', W', 3]`` pixels in the size of :func:`labelled_sheet`."""
    pixels = _pixels(np.asarray(images, dtype=np.float64), SMALLEST_LABELLED)
    height, width = pixels.shape[1:3]
    factor = LARGEST_LABELLED / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    reduced = [Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS) for image in pixels]
    return np.stack([np.asarray(image) for image in reduced])


def labelled_sheet(
    cells: npt.NDArray[np.uint8],
    *,
    rows: Sequence[str],
    columns: Sequence[Sequence[str]],
    highlighted: int | None = None,
) -> bytes:
    """A PNG of a table of images.

    Args:
        cells: ``[R, C, H, W, 3]``, as :func:`thumbnails` makes them.
        rows: a label for each row; it is wrapped to the height of its images.
        columns: lines of text for each column.
        highlighted: the column whose text stands out.
    """
    row_count, column_count, height, width, _ = cells.shape
    font = ImageFont.load_default(FONT_SIZE)
    header = _LINE * max(len(lines) for lines in columns) + GAP
    step = (width + GAP, height + GAP)
    size = (_MARGIN + column_count * step[0] - GAP, header + row_count * step[1] - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(columns):
        colour = _TEXT
        if column == highlighted:
            colour = _HIGHLIGHT
        for line, text in enumerate(lines):
            draw.text((_MARGIN + column * step[0] + 1, line * _LINE), text, fill=colour, font=font)
    for row, label in enumerate(rows):
        top = header + row * step[1]
        for line, text in enumerate(_wrapped(label, font, most=max(1, height // _LINE))):
            draw.text((GAP, top + line * _LINE), text, fill=_TEXT, font=font)
        for column in range(column_count):
            sheet.paste(Image.fromarray(cells[row, column]), (_MARGIN + column * step[0], top))
    return _png(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, most: int) -> list[str]:
    """The text in at most so many lines that fit the margin."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _MARGIN - 3 * GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    lines = [_cut(line, font) for line in lines]
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(f"{lines[most - 1]} …", font)]
    return lines


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The line, without the end that does not fit the margin."""
    if font.getlength(line) <= _MARGIN - 3 * GAP:
        return line
    while len(line) > 1 and font.getlength(f"{line}…") > _MARGIN - 3 * GAP:
        line = line[:-1]
    return f"{line}…"


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def _pixels(images: npt.NDArray[np.float64], smallest: int) -> npt.NDArray[np.uint8]:
    """``[n, C, H, W]`` in [-1, 1] → ``[n, H', W', 3]`` in [0, 255], at least ``smallest`` pixels wide or high."""
    levels = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
    factor = max(1, -(-smallest // max(levels.shape[2:])))
    pixels = levels.transpose(0, 2, 3, 1).repeat(factor, axis=1).repeat(factor, axis=2)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))  # gray → three equal colours
