from __future__ import annotations

import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest
from PIL import Image

from lcsc_opt.base.errors import LcscError
from lcsc_opt.views.figures.writing import write_figure

needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")),
    reason="draws with Chrome or Chromium",
)


@pytest.fixture
def figure() -> go.Figure:
    return go.Figure(go.Scatter(x=[1, 2], y=[3, 1]), layout={"height": 300})


def test_json_is_what_plotly_reads_and_a_page_needs_nothing_else(figure: go.Figure, tmp_path: Path) -> None:
    folder = tmp_path / "new folder"
    for name in ("figure.json", "figure.html"):
        write_figure(folder / name, figure)
    assert go.Figure(json.loads((folder / "figure.json").read_text())) == figure
    text = (folder / "figure.html").read_text()
    assert len(text) > 1_000_000
    assert [part in text for part in ('src="http', '"showSendToCloud": false')] == [False, True]


@needs_browser
def test_images_are_drawn_in_their_size(figure: go.Figure, tmp_path: Path) -> None:
    write_figure(tmp_path / "figure.png", figure)
    with Image.open(tmp_path / "figure.png") as drawn:
        assert drawn.size == (1800, 600)


def test_without_a_browser_the_error_says_what_to_install(
    figure: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    with pytest.raises(LcscError, match=r"figure\.png: not drawn, which needs Chrome or Chromium: .*; try \.html"):
        write_figure(tmp_path / "figure.png", figure)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(figure: go.Figure, tmp_path: Path) -> None:
    with pytest.raises(LcscError, match=r"figure\.gif: expected a file that ends in \.png, \.svg"):
        write_figure(tmp_path / "figure.gif", figure)
    (tmp_path / "file").touch()
    with pytest.raises(LcscError, match="cannot be written"):
        write_figure(tmp_path / "file" / "figure.json", figure)
