"""Injects kills, coordinators, endings and accidents, and prints the results; exits with 1 if one is not as required.

    python benchmarks/stress.py [--quick] [--only WORD]

Writes ``results/stress.md``, but not with ``--only`` or ``--quick``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import RESULTS, machine
from stress_accidents import (
    file_of_studies,
    grown_folder,
    rewound_training,
    smaller_budget,
)
from stress_databases import eight_coordinators, paused_coordinator
from stress_endings import endings
from stress_kills import commit_points, kills_postgres, random_kills, workers_killed, workers_orphaned
from stress_postgres import postgres_server
from stress_search import Clean, Row, Work, search, sqlite_url

ON_A_SERVER = ("random_kills_postgres", "eight_coordinators_postgres", "paused_postgres")
TABLE = "| fault | injected | required | found | ok |"


def main() -> None:
    """Inject, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each fault a few times only; about two minutes")
    parser.add_argument("--only", default="", help="only faults whose function's name contains this")
    arguments = parser.parse_args()
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no server and no file system behind
    with tempfile.TemporaryDirectory(prefix="lcsc-stress-", dir=_memory()) as folder:
        os.environ["STRESS_LOG"] = str(Path(folder) / "children.log")
        rows = list(inject(Path(folder), quick=arguments.quick, only=arguments.only))
        if not all(row.ok is not False for row in rows):
            print(f"\nlast lines of the processes' log:\n{_tail(Path(os.environ['STRESS_LOG']))}", file=sys.stderr)
    text = _markdown(rows, time.perf_counter() - start, quick=arguments.quick)
    print(f"\n{text}")
    page = RESULTS / "stress.md"
    if not arguments.quick and not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        page.write_text(text)
    sys.exit(any(row.ok is False for row in rows))


def _memory() -> str | None:
    """A folder in memory, if possible: killed processes leave the same files there, and commits wait for no disk."""
    memory = Path("/dev/shm")
    return str(memory) if os.access(memory, os.W_OK) else None


def inject(folder: Path, *, quick: bool, only: str) -> Iterator[Row]:
    """Inject one fault after the other."""
    torch.set_num_threads(1)  # a forked process would wait forever for its parent's OpenMP threads
    search(sqlite_url(folder, "warm"), Work(evaluations=3))  # late imports and compilations happen before the forks
    gc.collect()
    gc.freeze()  # forked processes need not scan, and so copy, existing objects
    clean = Clean(folder)
    with postgres_server() if any(only in name for name in ON_A_SERVER) else contextlib.nullcontext() as server:
        faults: list[tuple[str, Callable[[], Row]]] = [
            ("random_kills_1", lambda: random_kills(folder, clean, workers=1, kills=10 if quick else 200)),
            ("random_kills_4", lambda: random_kills(folder, clean, workers=4, kills=10 if quick else 100)),
            ("random_kills_postgres", lambda: kills_postgres(folder, server, clean, kills=10 if quick else 30)),
            ("commit_points", lambda: commit_points(folder, clean, every=20 if quick else 1)),
            ("workers_killed", lambda: workers_killed(folder, clean, kills=1 if quick else 3)),
            ("workers_orphaned", lambda: workers_orphaned(folder, clean)),
            ("eight_coordinators_sqlite", lambda: eight_coordinators(folder, None, repeats=2 if quick else 20)),
            ("eight_coordinators_postgres", lambda: eight_coordinators(folder, server, repeats=2 if quick else 20)),
            ("paused_sqlite", lambda: paused_coordinator(folder, None, clean, times=2 if quick else 10)),
            ("paused_postgres", lambda: paused_coordinator(folder, server, clean, times=2 if quick else 10)),
            ("endings", lambda: endings(folder, number=42 if quick else 504)),
            ("rewound_training", lambda: rewound_training(folder, kills=6 if quick else 50)),
            ("grown_folder", lambda: grown_folder(folder, kills=3 if quick else 30)),
            ("smaller_budget", lambda: smaller_budget(folder, kills=3 if quick else 30)),
            ("file_of_studies", lambda: file_of_studies(folder, kills=3 if quick else 30)),
        ]
        for name, fault in faults:
            if only not in name:
                continue
            start = time.perf_counter()
            row = _injected(name, fault)
            print(f"{_answer(row):7s} {time.perf_counter() - start:6.1f} s  {row.fault}: {row.found}", flush=True)
            yield row


def _injected(name: str, fault: Callable[[], Row]) -> Row:
    """The fault's row. A fault that cannot even be injected gives a failed row."""
    try:
        return fault()
    except Exception as error:
        return Row(name, "-", "-", f"{type(error).__name__}: {error}", ok=False)


def _answer(row: Row) -> str:
    return {True: "ok", False: "**NOT**", None: "skipped"}[row.ok]


def _markdown(rows: list[Row], seconds: float, *, quick: bool) -> str:
    called = "make stress" if not quick else "python benchmarks/stress.py --quick"
    head = ["# Every fault injected", "", f"`{called}`, {_today()}, {seconds:.0f} seconds.", "", machine(), ""]
    lines = [TABLE, "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.fault, row.injected, row.required, row.found, _answer(row))
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*head, *lines, ""])


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:]) if log.exists() else ""


if __name__ == "__main__":
    main()
