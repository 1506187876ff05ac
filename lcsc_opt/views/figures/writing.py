"""Figures as files: pages that work offline, images for papers, and the JSON that plotly reads."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError, one_line
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.views.figures.theme import CONFIG

_SUFFIXES = (".png", ".svg", ".pdf", ".html", ".json")
_WIDTH = 900


def check_suffix(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is computed for it.

    Raises:
        LcscError: it ends in something else than :func:`write_figure` writes.
    """
    if path.suffix not in _SUFFIXES:
        raise LcscError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def write_figure(path: Path, figure: go.Figure) -> None:
    """Write a figure to a file that ends in .html, .json, .png, .svg or .pdf; plotly draws images in a browser.

    Raises:
        LcscError: the file ends in something else or cannot be written, or no browser draws it.
    """
    check_suffix(path)
    content: str | bytes
    if path.suffix == ".json":
        content = str(figure.to_json())
    elif path.suffix == ".html":
        content = str(figure.to_html(include_plotlyjs=True, config=CONFIG))
    else:
        content = _image(path, figure)
    write_atomically(path, content, error=LcscError)


def _image(path: Path, figure: go.Figure) -> bytes:
    import_extra("kaleido")  # which plotly uses
    options = {"width": figure.layout.width or _WIDTH, "height": figure.layout.height or _WIDTH // 2}
    if path.suffix == ".png":
        options["scale"] = 2
    try:
        content: bytes = figure.to_image(format=path.suffix.lstrip("."), **options)
    except Exception as error:  # of many kinds, where there is no browser or it fails
        raise LcscError(f"{path}: not drawn, which needs Chrome or Chromium: {one_line(error)}; try .html") from error
    return content
