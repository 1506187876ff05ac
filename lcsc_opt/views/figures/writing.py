"""Figures as files: pages that work offline, images for papers, and the JSON that plotly reads."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.views.figures.theme import CONFIG

_IMAGES = (".png", ".svg", ".pdf")
_SUFFIXES = (*_IMAGES, ".html", ".json")
_WIDTH = 900
_PNG_SCALE = 2  # pixels of an image for each of its figure's
_TIMEOUT_SECONDS = 600  # a busy machine draws slowly, and a browser's page that has crashed never answers


def check_suffix(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is computed for it.

    Raises:
        LcscError: it ends in something else than :func:`write_figures` writes.
    """
    if path.suffix not in _SUFFIXES:
        raise LcscError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")


def write_figures(figures: Mapping[Path, go.Figure]) -> list[Path]:
    """Write figures to files that end in .html, .json, .png, .svg or .pdf; one browser draws all images.

    Raises:
        LcscError: a file ends in something else or cannot be written, or no browser is found.
    """
    for path in figures:
        check_suffix(path)
    images = {path: figure for path, figure in figures.items() if path.suffix in _IMAGES}
    contents: dict[Path, str | bytes] = {}
    if images:
        contents.update(_draw(images))
    for path, figure in figures.items():
        if path.suffix == ".json":
            contents[path] = str(figure.to_json())
        elif path.suffix == ".html":
            contents[path] = str(figure.to_html(include_plotlyjs=True, config=CONFIG))
    for path in figures:
        write_atomically(path, contents[path], error=LcscError)
    return list(figures)


def _draw(figures: Mapping[Path, go.Figure]) -> dict[Path, bytes]:
    """The content of each image. Drawn in another thread, since the caller may run an event loop, as notebooks do."""
    first = next(iter(figures))
    failures = import_extra("kaleido.errors")  # imports slowly
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(_draw_in_browser(figures))).result()
    except failures.ChromeNotFoundError as error:
        needed = "needs Chrome or Chromium: install one of them, or let plotly_get_chrome do it"
        raise LcscError(f"{first}: drawing an image {needed}; .html needs neither") from error
    except (
        failures.KaleidoError,
        failures.BrowserFailedError,
        failures.BrowserClosedError,
        TimeoutError,
        asyncio.TimeoutError,  # another class before Python 3.11
    ) as error:
        message = str(error.args[0]) if error.args else ""
        cause = message.strip().partition("\n")[0] or type(error).__name__
        raise LcscError(f"{first}: the browser did not draw it: {cause}; try .html") from error


async def _draw_in_browser(figures: Mapping[Path, go.Figure]) -> dict[Path, bytes]:
    contents = {}
    # MathJax would be loaded from elsewhere
    async with import_extra("kaleido").Kaleido(timeout=_TIMEOUT_SECONDS, mathjax=False) as browser:
        for path, figure in figures.items():
            options = {
                "format": path.suffix.lstrip("."),
                "width": figure.layout.width or _WIDTH,
                "height": figure.layout.height or _WIDTH // 2,
                "scale": 1,
            }
            if path.suffix == ".png":
                options["scale"] = _PNG_SCALE
            contents[path] = await browser.calc_fig(figure.to_dict(), opts=options)
    return contents
