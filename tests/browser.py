"""A headless Chromium for tests and screenshots, and a dashboard for it to open."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lcsc_opt.database.connection import open_even_empty
from lcsc_opt.views.dashboard.server import serve

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
SECONDS = 60_000.0  # milliseconds; a shared machine may be slow


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; skips where none is installed, and fails in CI."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    missing = "Chromium is not installed: apt-get install chromium" if program is None else None
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "playwright is not installed: pip install playwright"
    if missing is not None:
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


def served(url: str, **options: Any) -> str:
    """The address of a dashboard over a database, without its path; it ends with the tests."""
    addresses: queue.Queue[str] = queue.Queue()
    options = {"port": 0, "ready": addresses.put, **options}
    threading.Thread(target=serve, args=(open_even_empty(url),), kwargs=options, daemon=True).start()
    return addresses.get(timeout=60).partition("/lcsc/")[0]


@dataclasses.dataclass
class Watched:
    """A page, and everything that a browser complained about while it was open."""

    page: Any
    problems: list[str]

    def until(self, script: str) -> Any:
        """Wait until a script gives something true; playwright's own waiting evaluates strings, which pages forbid."""
        deadline = time.monotonic() + SECONDS / 1000
        while not (found := self.page.evaluate(script)):
            if time.monotonic() > deadline:
                message = f"waited for: {script}"
                raise TimeoutError(message)
            self.page.wait_for_timeout(50)
        return found

    def figure(self, name: str) -> dict[str, Any]:
        """What plotly shows there now."""
        script = (
            "name => { const f = document.querySelector(`#${name} .js-plotly-plot`), x = f.layout.xaxis;"
            "return {range: x.range, axis: x.title.text, type: x.type, paper: f._fullLayout.paper_bgcolor}; }"
        )
        found: dict[str, Any] = self.page.evaluate(script, name)
        return found

    def drawn(self, name: str) -> None:
        """Wait for a figure."""
        self.until(f"document.querySelector('#{name} .js-plotly-plot')?.layout?.uirevision")


@contextlib.contextmanager
def watched(browser: Any, home: str, **options: Any) -> Iterator[Watched]:
    """A page that loads from ``home`` only: every complaint, bad answer and request to elsewhere is kept."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options})
    page, problems = context.new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((home, "data:", "blob:")) else problems.append(f"asked {asked.url}"),
    )
    yield Watched(page, problems)
    context.close()
