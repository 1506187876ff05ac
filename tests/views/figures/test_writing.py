from __future__ import annotations

import asyncio
import functools
import io
import json
import shutil
from pathlib import Path

import kaleido
import plotly.graph_objects as go
import pytest
from PIL import Image

from lcsc_opt.base.errors import LcscError
from lcsc_opt.views.figures.writing import write_figures

needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")),
    reason="draws with Chrome or Chromium",
)


@pytest.fixture
def figure() -> go.Figure:
    return go.Figure(go.Scatter(x=[1, 2], y=[3, 1]), layout={"height": 300})


def test_json_is_what_plotly_reads_and_a_page_needs_nothing_else(figure: go.Figure, tmp_path: Path) -> None:
    folder = tmp_path / "new folder"
    json_file, page = write_figures({folder / "figure.json": figure, folder / "figure.html": figure})
    assert go.Figure(json.loads(json_file.read_text())) == figure
    text = page.read_text()
    assert len(text) > 1_000_000
    assert [part in text for part in ('src="http', '"showSendToCloud": false')] == [False, True]


@needs_browser
def test_images_are_drawn_in_their_format_and_size_even_beside_an_event_loop(
    figure: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaleido, "Kaleido", functools.partial(kaleido.Kaleido, timeout=0.001))  # not used

    async def draw() -> list[Path]:  # as in a notebook
        return write_figures({tmp_path / f"figure.{kind}": figure for kind in ("png", "svg", "pdf")})

    png, svg, pdf = asyncio.run(draw())
    assert Image.open(io.BytesIO(png.read_bytes())).size == (1800, 600)
    assert svg.read_text().startswith("<svg")
    assert pdf.read_bytes().startswith(b"%PDF")


def test_without_a_browser_the_error_says_what_to_install(
    figure: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    message = r"figure\.png: drawing an image needs Chrome or Chromium: install one of them"
    with pytest.raises(LcscError, match=message):
        write_figures({tmp_path / "figure.png": figure, tmp_path / "figure.json": figure})
    assert list(tmp_path.iterdir()) == [], "nothing is written when one of them cannot be drawn"


def test_other_files_are_refused(figure: go.Figure, tmp_path: Path) -> None:
    with pytest.raises(LcscError, match=r"figure\.gif: expected a file that ends in \.png, \.svg"):
        write_figures({tmp_path / "figure.gif": figure})
    (tmp_path / "file").touch()
    with pytest.raises(LcscError, match="cannot be written"):
        write_figures({tmp_path / "file" / "figure.json": figure})
