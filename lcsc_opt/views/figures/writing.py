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
from lcsc_opt.views.figures.look import CONFIG

_IMAGES = (".png", ".svg", ".pdf")
_SUFFIXES = (*_IMAGES, ".html", ".json")
_WIDTH = 900
_SCALE = 2  # pixels of an image for each of its figure's
_PATIENCE_SECONDS = 600  # a busy machine draws slowly, and a browser's page that has crashed never answers


def write_figures(figures: Mapping[Path, go.Figure]) -> list[Path]:
    """Write figures to files that end in .html, .json, .png, .svg or .pdf; one browser draws all images.

    Raises:
        LcscError: it is another suffix, no browser is found, or a file cannot be written.
    """
    for path in figures:
        if path.suffix not in _SUFFIXES:
            raise LcscError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    images = {path: figure for path, figure in figures.items() if path.suffix in _IMAGES}
    contents = _draw(images) if images else {}
    for path, figure in figures.items():
        if path.suffix == ".json":
            contents[path] = str(figure.to_json()).encode()
        elif path.suffix == ".html":
            contents[path] = str(figure.to_html(include_plotlyjs=True, config=CONFIG)).encode()
    for path in figures:
        write_atomically(path, contents[path], error=LcscError)
    return list(figures)


def _draw(figures: Mapping[Path, go.Figure]) -> dict[Path, bytes]:
    """In a thread of its own, since the caller may run an event loop, as notebooks do."""
    first = next(iter(figures))
    failures = import_extra("kaleido.errors")  # imports slowly
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(_drawn(figures))).result()
    except failures.ChromeNotFoundError as error:
        needed = "needs Chrome or Chromium: install one of them, or let plotly_get_chrome do it"
        raise LcscError(f"{first}: drawing an image {needed}; .html needs neither") from error
    except (
        *(failures.KaleidoError, failures.BrowserFailedError, failures.BrowserClosedError),
        *(TimeoutError, asyncio.TimeoutError),  # the same one from Python 3.11 on
    ) as error:
        cause = str(next(iter(error.args), "")).strip().partition("\n")[0] or type(error).__name__
        raise LcscError(f"{first}: the browser did not draw it: {cause}; try .html") from error


async def _drawn(figures: Mapping[Path, go.Figure]) -> dict[Path, bytes]:
    # MathJax would be loaded from elsewhere
    async with import_extra("kaleido").Kaleido(timeout=_PATIENCE_SECONDS, mathjax=False) as browser:
        return {
            path: await browser.calc_fig(
                figure.to_dict(),
                opts={
                    "format": path.suffix.lstrip("."),
                    "width": figure.layout.width or _WIDTH,
                    "height": figure.layout.height or _WIDTH // 2,
                    "scale": _SCALE if path.suffix == ".png" else 1,
                },
            )
            for path, figure in figures.items()
        }
