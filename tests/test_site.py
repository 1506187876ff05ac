"""The site that ``make docs`` built, in a browser."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Watched, chromium, watched

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
PAGES = sorted(path.name for path in SITE.glob("*.html"))
PHONE = {"width": 390, "height": 844}
pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        """Nothing."""


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def view(home: str) -> Iterator[Watched]:
    with chromium() as page, watched(page, home) as opened:
        yield opened
        assert opened.problems == []


def test_a_search_finds_a_page(view, home):
    view.page.goto(f"{home}/search.html?q=hinge")
    view.until("document.querySelectorAll('#search-results li a').length > 0")


def test_every_page_fits_a_phone(view, home):
    view.page.set_viewport_size(PHONE)
    wide = {}
    for name in PAGES:
        view.page.goto(f"{home}/{name}")
        if (width := view.page.evaluate("document.scrollingElement.scrollWidth")) > PHONE["width"]:
            wide[name] = width
    assert wide == {}
