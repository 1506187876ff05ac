"""Faults of a cluster: workers and whole nodes of a Ray cluster killed while searches run on it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_nodes import OBJECTIVE, Nodes, nodes, study_file
from stress_search import Row, rows, sqlite_url, verdict

OPTIMIZERS = ("LCSC", "CMA", "LCSCGradient")
LINES = 5  # at least so many lines of the log between two kills, so that workers finish candidates in between


def ray_killed(folder: Path, *, workers: int, whole: int) -> Row:
    """SIGKILL ``workers`` evaluating workers and ``whole`` nodes; another node replaces each killed one."""
    chance, problems, killed, gone, studies = random.Random(0), list[str](), 0, 0, 0
    attempts = 0
    with nodes(2, 2) as cluster:
        for seed in range(workers):  # more seeds than needed
            here = folder / f"ray-{seed}"
            with _searching(here, seed, cluster) as (running, log, url):
                seen = 0
                while running.poll() is None:
                    time.sleep(0.02)
                    now = [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []
                    if len(now) < seen + LINES + chance.randrange(LINES) or killed >= workers:
                        continue
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(now[-1], signal.SIGKILL)
                        killed += 1
                    seen = len(now)
                    if gone < whole and killed * whole >= (gone + 1) * workers:
                        cluster.add(2)
                        cluster.kill_oldest()
                        gone += 1
            local = _local(here, seed)
            for optimizer in OPTIMIZERS:
                name = f"ray/{optimizer}/{seed}"
                found, expected = ([_kept(row) for row in rows(at, name)] for at in (url, local))
                attempts += sum(len(row[5]) for row in rows(url, name))
                studies += 1
                if found != expected:
                    problems.append(f"{name}: {len(found)} trials, rows differ")
            if running.returncode:
                problems.append(f"exit status {running.returncode}")
            if killed >= workers and gone >= whole:
                break
    text, ok = verdict(
        problems, f"{killed} workers and {gone} nodes killed, {attempts} failed attempts, {studies} studies; rows equal"
    )
    return Row(
        "workers of a Ray cluster SIGKILLed while they evaluate, and whole nodes, which others replace",
        f"{workers} workers and {whole} nodes, over {', '.join(OPTIMIZERS)}",
        "each costs the attempts that it had; rows equal those of local workers",
        text,
        ok and killed >= workers and gone >= whole,
    )


def _kept(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of a row that must not depend on deaths: all but the attempts."""
    return row[:5] + row[6:]


@contextlib.contextmanager
def _searching(folder: Path, seed: int, cluster: Nodes) -> Iterator[tuple[subprocess.Popen[bytes], Path, str]]:
    """A search on the cluster in a process of its own; waits for its end."""
    folder.mkdir()
    log, url = folder / "log", sqlite_url(folder, "ray")
    file = study_file(folder, **_study(seed, {"seconds": 0.1, "log": str(log)}))
    with _lcsc(file, "--ray", cluster.address, "--storage", url) as running:
        yield running, log, url


def _local(folder: Path, seed: int) -> str:
    """Run the same search with local workers; gives the database's URL."""
    url = sqlite_url(folder, "local")
    with _lcsc(study_file(folder, **_study(seed, {})), "--storage", url) as running:
        running.wait()
    return url


def _study(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "ray",
        "objective": {"file": OBJECTIVE, "settings": settings},
        "optimizers": list(OPTIMIZERS),
        "seeds": [seed],
        "budget": {"evaluations": 40},
        "workers": 3,
        "failures": {"retries": 20},  # one candidate may lose its worker several times
    }


def _lcsc(file: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from lcsc_opt.cli import main; main()", "run", str(file), *options]
    log = Path(os.environ["STRESS_LOG"]).open("ab")  # noqa: SIM115 - the process keeps it open
    return subprocess.Popen(command, cwd=file.parent, stdout=log, stderr=log)
