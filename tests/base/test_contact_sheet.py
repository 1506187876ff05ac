from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base import contact_sheet as module
from lcsc_opt.base.contact_sheet import GAP, contact_sheet, labelled_sheet, thumbnails


def opened(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as sheet:
        return np.asarray(sheet)


def test_each_image_has_its_place_and_its_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", 3)
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((1, 3, 64, 50))
    sheet = opened(contact_sheet(images))
    assert sheet.shape == (2 * 64 + GAP, 3 * 50 + 2 * GAP, 3)
    tops, lefts = (0, 64 + GAP), (0, 50 + GAP, 2 * (50 + GAP))
    for i, level in enumerate((0, 64, 128, 191, 255)):
        place = sheet[tops[i // 3] : tops[i // 3] + 64, lefts[i % 3] : lefts[i % 3] + 50]
        assert (place == level).all()
    assert (sheet[64 : 64 + GAP] == 255).all()
    assert (sheet[64 + GAP :, 2 * (50 + GAP) :] == 255).all()  # no sixth image


def test_a_labelled_sheet_has_each_image_below_its_column_and_beside_its_row() -> None:
    cells = np.zeros((2, 3, 112, 120, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(3):
            cells[row, column] = 40 * (3 * row + column)
    columns = [["one", "fid 3"], ["two"], ["three"]]
    sheet = opened(labelled_sheet(cells, rows=["a cat", "a " * 500], columns=columns))
    assert sheet.shape[1] > 3 * 120 + 2 * GAP
    left = sheet.shape[1] - 3 * 120 - 2 * GAP
    top = sheet.shape[0] - 2 * 112 - GAP
    for row in range(2):
        for column in range(3):
            y = top + row * (112 + GAP)
            x = left + column * (120 + GAP)
            assert (sheet[y : y + 112, x : x + 120] == cells[row, column]).all()
    assert (sheet[:top, left:] < 255).any(), "the columns have labels"
    assert (sheet[top:, :left] < 255).any(), "the rows have labels"
    assert (sheet[:top, :left] == 255).all()
    coloured = opened(labelled_sheet(cells, rows=["a cat", "b"], columns=columns, highlighted=1))
    header = coloured[:top, left + 120 : left + 240].astype(int)
    assert (header[..., 1] - header[..., 0]).max() > 50, "the highlighted label is green"


def test_thumbnails_are_large_enough_for_a_label_and_small_enough_for_a_sheet() -> None:
    assert thumbnails(np.ones((1, 1, 8, 8))).shape == (1, 112, 112, 3)
    small = thumbnails(np.linspace(-1, 1, 4).reshape(1, 1, 2, 2))
    assert (small[0, :56, :56] == 0).all()
    assert (small[0, 56:, 56:] == 255).all()
    reduced = thumbnails(np.ones((2, 3, 512, 1024)))
    assert reduced.shape == (2, 128, 256, 3)
    assert (reduced == 255).all()
