"""A headless Chromium for tests and screenshots, and a dashboard for it to open."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
from optuna.storages import RDBStorage

from lcsc_opt.database.connection import open_storage
from lcsc_opt.views.dashboard import server

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
COMPLAINTS = ("error", "warning", "trace")  # plotly.js warns with console.trace
SECONDS = 60_000.0  # milliseconds; a shared machine may be slow


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The page of a browser of playwright's with an empty profile; skips where none is installed, and fails in CI.

    What was compiled of a script is kept: an address that it was at before opens in a third of the time.
    """
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
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(profile, executable_path=program, args=list(FLAGS))
        yield browser.pages[0]
        browser.close()


def opened(url: str) -> RDBStorage:
    """A database to read, which may be empty."""
    open_storage(url, write=True).engine.dispose()
    return open_storage(url, write=False)


def served(url: str) -> str:
    """The address of a dashboard over a database, with its path; it ends with the tests."""
    addresses: queue.Queue[str] = queue.Queue()
    options: dict[str, Any] = {"port": 0, "ready": addresses.put}
    threading.Thread(target=server.serve, args=(opened(url),), kwargs=options, daemon=True).start()
    return addresses.get(timeout=60)


class Switched:
    """A dashboard that shows one database after the other at the same address, whose scripts are in the profile.

    Attributes:
        home: the address, without its path.
    """

    def __init__(self, url: str) -> None:
        with mock.patch.object(server, "application", return_value=self):
            self.home = served(url).partition("/lcsc/")[0]
        self.show(url)

    def show(self, url: str) -> str:
        """From now on this database, which may be empty; gives the address."""
        self._shown = server.application(opened(url))
        return self.home

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request."""
        return self._shown(environ, start_response)


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
            self.page.wait_for_timeout(15)
        return found

    def figure(self, name: str) -> dict[str, Any]:
        """What plotly shows there now."""
        script = (
            "name => { const f = document.querySelector(`#${name} .js-plotly-plot`), x = f.layout.xaxis;"
            "const whole = f._fullLayout;"
            "return {range: x.range, type: x.type, y_type: whole.yaxis.type, paper: whole.paper_bgcolor}; }"
        )
        found: dict[str, Any] = self.page.evaluate(script, name)
        return found

    def drawn(self, name: str) -> None:
        """Wait for a figure."""
        self.until(f"document.querySelector('#{name} .js-plotly-plot')?.layout?.uirevision")


@contextlib.contextmanager
def watched(page: Any, home: str) -> Iterator[Watched]:
    """A page that loads from ``home`` only: every complaint, bad answer and request to elsewhere is kept.

    Who watches it next finds neither cookies nor what was put into ``localStorage``, only compiled scripts.
    """
    problems, ours = list[str](), (home, "data:", "blob:")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    page.set_default_timeout(SECONDS)
    listeners = {
        "console": lambda message: problems.append(message.text) if message.type in COMPLAINTS else None,
        "pageerror": lambda error: problems.append(str(error)),
        "dialog": lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        "response": lambda got: problems.append(f"{got.status} {got.url}") if got.status >= 400 else None,
        "request": lambda asked: None if asked.url.startswith(ours) else problems.append(f"asked {asked.url}"),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        yield Watched(page, problems)
        if page.url.startswith(home):
            page.evaluate("localStorage.clear()")
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        if page.url.startswith(home):
            page.goto(f"{home}/lcsc/_static/lcsc.css" if home.startswith("http") else "about:blank")
        page.context.clear_cookies()
