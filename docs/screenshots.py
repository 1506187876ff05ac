"""Makes the pictures of the dashboard in docs/images: the demo's searches, and its landscape to the last point.

    python docs/screenshots.py [--storage sqlite:///studies.db]

Runs what the database does not have yet, in minutes; after an interruption the same command continues. Needs Chromium,
and playwright of the development tools.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.views.dashboard.server import serve

IMAGES = Path(__file__).parent / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
EXPERIMENT = "demo"
RUNS: tuple[tuple[str, ...], ...] = (  # the commands of `make demo`, and the landscape
    (),
    ("optimizers=[LCSC]", "space=affine", "budget.evaluations=60"),
    ("optimizers=[Landscape]", "budget.evaluations=441", "failures.in_a_row=null"),
)
SHOTS = (  # page, and what is drawn on it last
    ("compare", "#curves .trace"),
    ("study", "#coefficients .trace"),
    ("landscape", "#plane .plotly"),
)


def main() -> None:
    """Run what is missing, serve the database, and take one picture after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite:///studies.db")
    arguments = parser.parse_args()
    for changes in RUNS:
        if lcsc(["run", EXPERIMENT, *changes, "--storage", arguments.storage]) != 0:
            sys.exit("a search did not end")
    addresses: queue.Queue[str] = queue.Queue()
    options = {"port": 0, "ready": addresses.put}
    storage = open_storage(arguments.storage, write=False)
    threading.Thread(target=serve, args=(storage,), kwargs=options, daemon=True).start()
    home = addresses.get(timeout=60)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for name, drawn in SHOTS:
            page = browser.new_page(color_scheme="light", viewport={"width": 1280, "height": 900})
            page.goto(f"{home}{name}?experiment={EXPERIMENT}")
            page.wait_for_selector(drawn, state="attached", timeout=60_000)
            page.wait_for_timeout(1000)  # fonts and the last layout
            page.screenshot(path=IMAGES / f"dashboard_{name}.png", full_page=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
