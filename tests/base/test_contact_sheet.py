from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lcsc_opt.base.contact_sheet import COLUMNS, GAP, contact_sheet


def opened(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as sheet:
        return np.asarray(sheet)


def test_each_image_has_its_place_and_its_levels() -> None:
    count = 2 * COLUMNS - 1
    images = np.linspace(-1, 1, count)[:, None, None, None] * np.ones((1, 3, 64, 50))
    sheet = opened(contact_sheet(images))
    assert sheet.shape == (2 * 64 + GAP, COLUMNS * (50 + GAP) - GAP, 3)
    for i, level in enumerate(np.rint(np.linspace(0, 255, count))):
        top, left = (64 + GAP) * (i // COLUMNS), (50 + GAP) * (i % COLUMNS)
        assert (sheet[top : top + 64, left : left + 50] == level).all()
    assert (sheet[64 : 64 + GAP] == 255).all()
    assert (sheet[64 + GAP :, -50:] == 255).all()  # no last image


def test_two_or_five_channels_are_shown_in_grey_by_their_mean() -> None:
    for channels in (2, 5):
        images = np.linspace(-1, 1, channels)[None, :, None, None] * np.ones((3, 1, 64, 64))
        assert (opened(contact_sheet(images))[:64, :64] == 128).all()
