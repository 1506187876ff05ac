"""How long the pages take: seconds of each callback on the server, bytes that it sends, and painting in a browser.

    python benchmarks/dashboard_pages.py [--studies 10] [--trials 2000] [--checkpoints 500] [--rounds 5]

Makes the database of ``benchmarks/dashboard.py`` in the current folder. Then measures, as medians: the callback that
draws a page for the first time, a refresh without news, and a refresh after every study has one more result. All pass
through the whole server, but no network. If Chromium and playwright are installed, also the time in the browser, with
an empty cache: from opening the address to the first paint, and until the winner is named and the curves are drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import machine, write_csv
from dashboard import EXPERIMENT, add_result, make_database
from optuna.storages import RDBStorage
from werkzeug.test import Client

from lcsc_opt.database.connection import open_storage
from lcsc_opt.views.dashboard.server import application, serve

FIRST_MS, REFRESH_MS = 2000, 300  # our own targets
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "compare": ("curves-new.data", {"experiment": EXPERIMENT, "axis": "images", "scale": ["y"]}),
    "study": ("times-new.data", {"study": f"{EXPERIMENT}/CMA/0"}),
}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
DRAWN = "document.querySelector('#curves .js-plotly-plot .scatterlayer .trace') && document.querySelector('.ag-row')"


def main() -> None:
    """Measure and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        url = f"sqlite:///{Path(folder) / 'large.db'}"
        storage = open_storage(url, write=True)
        names = make_database(storage, arguments.studies, arguments.trials, arguments.checkpoints)
        found = callbacks(url, storage, names, arguments)
        found |= in_browser(url, arguments.rounds)
    rows = [show(name, *values) for name, values in found.items()]
    print(write_csv("dashboard_pages", ("what", "milliseconds", "least", "most", "kilobytes", "limit"), rows))
    if missed := [row[0] for row in rows if row[1] > row[5]]:
        sys.exit(f"missed: {', '.join(missed)}")


def show(name: str, seconds: list[float], size: float) -> tuple[Any, ...]:
    """Print one line; gives the row of the results."""
    median, least, most = (1e3 * f(seconds) for f in (statistics.median, min, max))
    limit = REFRESH_MS if "refresh" in name else FIRST_MS
    print(f"{name:44s} {median:8.1f} ({least:.1f} to {most:.1f}) ms, {size:7.1f} kB, limit {limit} ms", flush=True)
    return name, round(median, 1), round(least, 1), round(most, 1), round(size, 1), limit


def callbacks(
    url: str, storage: RDBStorage, names: list[str], arguments: argparse.Namespace
) -> dict[str, tuple[list[float], float]]:
    """Kind of request → the seconds of each round, and the size of the last answer."""
    found: dict[str, tuple[list[float], float]] = {}

    def timed(name: str, client: Client, page: str, seen: Any) -> Any:
        start = time.perf_counter()
        text = ask(client, page, seen)
        times = [*found.get(name, ([], 0.0))[0], time.perf_counter() - start]
        found[name] = times, len(text) / 1e3
        return json.loads(text)["response"].get("seen", {}).get("data", seen)

    for _ in range(arguments.rounds):
        for page in PAGES:
            client = Client(application(open_storage(url, write=False)))
            seen = timed(f"{page}: first callback", client, page, None)
            seen = timed(f"{page}: refresh, nothing new", client, page, seen)
            for name in names:
                add_result(storage, name, arguments.checkpoints)
            timed(f"{page}: refresh, a result each", client, page, seen)
    return found


def ask(client: Client, page: str, seen: Any) -> str:
    """The answer of a page's callback to a request like a browser's."""
    output, values = PAGES[page]
    home, headers = f"/lcsc/{page}", {"Host": "127.0.0.1"}
    known = json.loads(client.get(f"{home}/_dash-dependencies", headers=headers).text)
    wanted = next(one for one in known if output in one["output"] and one["clientside_function"] is None)
    given = {**values, "theme": "light", "seen": seen}
    names = [part.rsplit(".", 1) for part in wanted["output"].strip(".").split("...")]
    body = {
        "output": wanted["output"],
        "outputs": [{"id": name, "property": value} for name, value in names],
        "inputs": [{**one, "value": given.get(one["id"])} for one in wanted["inputs"]],
        "state": [{**one, "value": given.get(one["id"])} for one in wanted["state"]],
        "changedPropIds": [] if seen is None else ["tick.n_intervals"],
    }
    answer = client.post(f"{home}/_dash-update-component", json=body, headers=headers)
    if answer.status_code != 200:
        message = f"{page}: {answer.status}: {answer.text[:200]}"
        raise SystemExit(message)
    return answer.text


def in_browser(url: str, rounds: int) -> dict[str, tuple[list[float], float]]:
    """First paint and drawn page in Chromium, from opening the address; empty if it is not installed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None or importlib.util.find_spec("playwright") is None:
        print("Chromium or playwright is not installed: nothing measured in a browser")
        return {}
    from playwright.sync_api import sync_playwright

    addresses: queue.Queue[str] = queue.Queue()
    options = {"port": 0, "ready": addresses.put}
    threading.Thread(target=serve, args=(open_storage(url, write=False),), kwargs=options, daemon=True).start()
    home, paints, drawn = addresses.get(timeout=60), [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for _ in range(rounds):
            page = browser.new_context().new_page()
            page.goto(f"{home}compare?experiment={EXPERIMENT}", wait_until="commit")
            while not page.evaluate(DRAWN):
                time.sleep(0.02)
            drawn.append(page.evaluate("performance.now()") / 1e3)
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
            page.context.close()
        browser.close()
    return {"compare: first paint in Chromium": (paints, 0.0), "compare: curves and table in Chromium": (drawn, 0.0)}


if __name__ == "__main__":
    main()
