"""Training scripts that end in many ways while their trajectory is written, and what a reader then finds.

    python benchmarks/stress_endings.py NUMBER FOLDER

Without arguments it is the server that the scripts are forked from, so that torch is imported once. It reads lines of
JSON, forks a process for each, and prints "ended" or "hangs" for it. The process is a training script that never closes
its writer.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from stress_search import Row

from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

KILLS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}  # after these, only flushed checkpoints must be there
KINDS = ("end of the script", "sys.exit", "an exception", "SIGINT in an append", "a fork meanwhile", *KILLS)
SIZES = (1_000, 100_000, 3_000_000)  # numbers of weights in float32
STEPS = 8
HANGS = 120.0  # seconds; a script that takes longer to end hangs


@dataclasses.dataclass
class Endings:
    """The findings after some endings."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unreadable: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    hanging: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was unreadable or lost, and nothing hung."""
        return not self.unreadable and not self.lost and not self.hanging

    def __str__(self) -> str:
        total = sum(self.counts.values())
        examples = "; ".join([*self.unreadable, *self.lost][:2])
        return (
            f"{total} endings: {len(self.unreadable)} unreadable, {len(self.lost)} lost, {self.hanging} hang {examples}"
        )


def endings(folder: Path, *, number: int, busy: int = 2) -> Row:
    """The row for ``number`` scripts that end beside ``busy`` processes, each of which keeps a core busy."""
    found = end_scripts(folder, number=number, busy=busy)
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.counts.items())
    return Row(
        "training scripts that never close their writer",
        f"{number} endings beside {busy} busy processes, {', '.join(f'{size:,}' for size in SIZES)} weights: {kinds}",
        "whole checkpoints; nothing lost, after a kill nothing that was flushed",
        str(found),
        ok=found.ok,
    )


def end_scripts(folder: Path, *, number: int, busy: int = 2) -> Endings:
    """End ``number`` scripts; kinds and sizes take turns."""
    found, generator = Endings(), random.Random(0)
    with busy_processes(busy), _server() as server:
        cells = itertools.cycle(itertools.product(KINDS, SIZES))
        for index, (kind, size) in zip(range(number), cells, strict=False):
            path = folder / f"ending{index}"
            job = {"path": str(path), "kind": kind, "size": size, "seed": generator.randrange(2**32)}
            if not _ended(server, job):
                found.hanging += 1
            found.counts[kind] += 1
            _look(path, kind, f"{kind}, {size} weights, seed {job['seed']}", found)
    return found


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Processes that each keep a core busy while this is open."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@contextmanager
def _server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _ended(server: subprocess.Popen[str], job: dict[str, object]) -> bool:
    """Run the script on the server. Whether it ended without hanging."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return server.stdout.readline().strip() == "ended"


def _look(path: Path, kind: str, name: str, found: Endings) -> None:
    """Compare the trajectory with the script's notes."""
    noted = [line.split() for line in _log(path).read_text().splitlines()]
    taken = [int(step) for what, step in noted if what == "taken"]
    flushed = [int(step) for what, step in noted if what == "flushed"]
    promised = range(1, max(flushed, default=0) + 1) if kind in KILLS else taken
    if not promised and not (path / "manifest.json").exists():
        return
    try:
        trajectory = Trajectory.open(path)
        with redirect_stderr(io.StringIO()):  # hide the progress bar
            trajectory.verify()
    except Exception as error:
        found.unreadable.append(f"{name}: {error}")
        return
    whole = all((trajectory.checkpoint(i)["w"] == step).all() for i, step in enumerate(trajectory.steps))
    if not whole or not set(promised) <= set(trajectory.steps):
        found.lost.append(f"{name}: {trajectory.steps} of {list(promised)}")


def _log(path: Path) -> Path:
    return path.with_suffix(".log")


def serve() -> dict[str, object] | None:
    """Fork a process for each line. Returns the job in a forked process, and in the server ``None`` at the end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return dict(json.loads(line))
        print(_outcome(child), flush=True)
    return None


def _outcome(child: int) -> str:
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ended"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def train(path: Path, kind: str, size: int, seed: int) -> None:
    """A training script that never closes its writer, and notes which checkpoints were taken and flushed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it in background processes
    generator = random.Random(seed)
    log = os.open(_log(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = TrajectoryWriter(path)
    weights = {"w": torch.empty(size), "count": torch.zeros(3)}
    if kind in KILLS or kind == "SIGINT in an append":
        _signal_soon(KILLS.get(kind, signal.SIGINT), generator.uniform(0, 0.03 + 1e-7 * size))
    fork_at = generator.randint(1, STEPS) if kind == "a fork meanwhile" else 0
    for step in itertools.count(1) if kind in {*KILLS, "SIGINT in an append"} else range(1, STEPS + 1):
        weights["w"].fill_(step)
        writer.append(step, weights, wait=generator.random() < 0.2)
        os.write(log, f"taken {step}\n".encode())
        if step == fork_at and os.fork() == 0:
            return  # like a worker of a data loader: it has a copy of the writer, and ends like its parent
        if generator.random() < 0.2:
            writer.flush()
            os.write(log, f"flushed {step}\n".encode())
    if kind == "sys.exit":
        sys.exit(3)
    if kind == "an exception":
        raise ZeroDivisionError


def _signal_soon(number: int, seconds: float) -> None:
    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def main() -> None:
    """Run the server; with a number, end so many scripts and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", type=int, help="so many endings; left out: the server")
    parser.add_argument("folder", nargs="?", type=Path, help="where their trajectories go")
    arguments = parser.parse_args()
    if arguments.number is not None:
        if arguments.folder is None:
            parser.error("NUMBER needs a FOLDER, where the trajectories go")
        arguments.folder.mkdir(exist_ok=True)
        print(end_scripts(arguments.folder, number=arguments.number))
    elif (job := serve()) is not None:
        train(Path(str(job["path"])), str(job["kind"]), int(str(job["size"])), int(str(job["seed"])))


if __name__ == "__main__":
    main()
