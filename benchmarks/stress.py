"""Injects kills, coordinators, endings and accidents; exits with 1 if something is not as it would be without them.

    python benchmarks/stress.py [--quick] [--only WORD]

Writes ``results/stress.md``, but not with ``--only`` or ``--quick``.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from common import RESULTS, machine, parse
from stress_accidents import grown_folder, two_terminals
from stress_coordinators import commit_points, eight_coordinators, random_kills, stopped_coordinator
from stress_search import Clean, Found, Work, search
from stress_training import endings, rewound_training
from stress_workers import coordinator_of_workers_killed, ray_node_killed, workers_killed

sys.path.insert(0, str(Path(__file__).parents[1]))  # other packages install a folder `tests`, too

from tests.database_servers import find_binaries, postgresql


def main() -> None:
    """Inject, print, write."""
    quick = {"action": "store_true", "help": "each fault a few times only; about two minutes"}
    arguments = parse(__doc__, quick=quick, only={"default": "", "help": "only faults whose name contains this"})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no server behind
    began, lines, ok = time.perf_counter(), ["| fault | found | ok |", "|---|---|---|"], True
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # commits wait for no disk
    with tempfile.TemporaryDirectory(prefix="lcsc-stress-", dir=memory) as folder:
        os.environ["STRESS_LOG"] = str(Path(folder) / "children.log")
        for name, title, found in inject(Path(folder), quick=arguments.quick, only=arguments.only):
            ok = ok and not found.problems
            answer = f"{len(found.problems)} **wrong**: {'; '.join(found.problems[:3])}" if found.problems else "ok"
            lines.append(f"| {title} | {found.seen} | {answer} |".replace("\n", " "))
            print(f"{time.perf_counter() - began:6.1f} s  {name}: {found.seen}; {answer}", flush=True)
        if not ok:
            print(Path(os.environ["STRESS_LOG"]).read_text()[-4000:], file=sys.stderr)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    head = f"""# Every fault injected

`make stress`, {today}, {time.perf_counter() - began:.0f} seconds. Required:
no trial lost or doubled, and all trials, bit for bit, those of an undisturbed search; nothing lost that a
trajectory had taken.

{machine()}
"""
    print("\n".join(["", *lines]))
    if not arguments.quick and not arguments.only:
        (RESULTS / "stress.md").write_text("\n".join([head, *lines, ""]))
    sys.exit(not ok)


def inject(folder: Path, *, quick: bool, only: str) -> Iterator[tuple[str, str, Found]]:
    """Inject one fault after the other: its name, what it is, and what was found."""
    torch.set_num_threads(1)  # a forked process would wait forever for its parent's OpenMP threads

    def sqlite() -> str:
        return f"sqlite:///{tempfile.mkdtemp(dir=folder)}/studies.db"

    search(sqlite(), Work(evaluations=3))  # late imports and compilations happen before the forks
    gc.collect()
    gc.freeze()  # forked processes need not scan, and so copy, existing objects
    clean = Clean(sqlite)

    def times(full: int, few: int) -> int:
        return few if quick else full

    faults: dict[str, Callable[[], Found]] = {
        "random_kills_1": functools.partial(random_kills, sqlite, clean, workers=1, kills=times(200, 10)),
        "random_kills_4": functools.partial(random_kills, sqlite, clean, workers=4, kills=times(100, 10)),
        "commit_points": functools.partial(commit_points, sqlite, clean, every=times(1, 24)),
        "workers_killed": functools.partial(workers_killed, sqlite, clean, folder, evaluations=times(200, 40)),
        "coordinator_of_workers_killed": functools.partial(coordinator_of_workers_killed, sqlite, clean, folder),
        "eight_coordinators": functools.partial(eight_coordinators, sqlite, repeats=times(20, 2)),
        "stopped_coordinator": functools.partial(stopped_coordinator, sqlite, clean, times=times(10, 2)),
        "endings": functools.partial(endings, folder, number=times(504, 42)),
        "rewound_training": functools.partial(rewound_training, folder, kills=times(50, 6)),
        "grown_folder": functools.partial(grown_folder, folder, kills=times(30, 3)),
        "two_terminals": functools.partial(two_terminals, folder, kills=times(30, 3)),
    }
    faults |= {"ray_node_killed": functools.partial(ray_node_killed, folder)} if find_spec("ray") else {}
    with contextlib.ExitStack() as stack:
        if find_binaries() is not None and only in "postgresql":
            server = stack.enter_context(postgresql())
            new = server.new_database
            faults |= {
                "postgresql_kills": functools.partial(random_kills, new, clean, workers=1, kills=times(30, 5)),
                "postgresql_eight": functools.partial(eight_coordinators, new, repeats=times(20, 2)),
                "postgresql_stopped": functools.partial(stopped_coordinator, new, clean, times=times(10, 2)),
            }
        for name, fault in faults.items():
            if only in name:
                title = str(fault.func.__doc__).partition("\n")[0]  # type: ignore[attr-defined]
                try:
                    found = fault()
                except Exception as error:  # one that cannot even be injected
                    found = Found("", [f"{type(error).__name__}: {error}"])
                yield name, title + (" (PostgreSQL)" if name.startswith("postgresql") else ""), found


if __name__ == "__main__":
    main()
