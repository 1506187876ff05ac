from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base import contact_sheet as module
from lcsc_opt.base.contact_sheet import GAP, contact_sheet


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
