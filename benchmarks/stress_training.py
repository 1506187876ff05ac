"""Training scripts that end in many ways while they write a trajectory, or that go back to an earlier step.

Torch is used only in forked processes: its threads do not survive a fork.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from stress_search import FORK, Child, Found

from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

KILLS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}  # after these, only flushed checkpoints must be there
SIGNALS = {"SIGINT in an append": signal.SIGINT, **KILLS}
KINDS = ("end of the script", "sys.exit", "an exception", "a fork meanwhile", *SIGNALS)
SIZES = (1_000, 100_000, 3_000_000)  # numbers of weights in float32
STEPS = 8
HANGS = 120.0  # seconds; a script that takes longer to end hangs


def endings(folder: Path, *, number: int) -> Found:
    """Training scripts that never close their writer end in many ways while two processes keep the cores busy."""
    problems, counts, chance = list[str](), collections.Counter[str](), random.Random(0)
    busy = [FORK.Process(target=_keep_busy, daemon=True) for _ in range(2)]
    for process in busy:
        process.start()
    for index, (kind, size) in zip(range(number), itertools.cycle(itertools.product(KINDS, SIZES)), strict=False):
        path, seed = folder / f"ending{index}", chance.randrange(2**32)
        script = FORK.Process(target=_train_and_end, args=(path, kind, size, seed))
        script.start()
        script.join(HANGS)
        found = _lost(path, kind) if script.exitcode is not None else ["hangs"]
        script.kill()
        problems += [f"{kind}, {size} weights, seed {seed}: {problem}" for problem in found]
        counts[kind] += 1
        shutil.rmtree(path, ignore_errors=True)
    for process in busy:
        process.kill()
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    return Found(f"{number} endings: {kinds}; {', '.join(f'{size:,}' for size in SIZES)} weights", problems)


def _keep_busy() -> None:
    while True:
        pass


def _lost(path: Path, kind: str) -> list[str]:
    """What the trajectory lacks of what the script's notes promise."""
    noted = [line.split() for line in path.with_suffix(".log").read_text().splitlines()]
    taken, flushed = ([int(step) for what, step in noted if what == wanted] for wanted in ("taken", "flushed"))
    promised = range(1, max(flushed, default=0) + 1) if kind in KILLS else taken
    if not promised and not (path / "manifest.json").exists():
        return []
    try:
        trajectory = _whole(path)
    except Exception as error:
        return [f"unreadable: {error}"]
    whole = all((trajectory.checkpoint(i)["w"] == step).all() for i, step in enumerate(trajectory.steps))
    lost = not whole or not set(promised) <= set(trajectory.steps)
    return [f"{trajectory.steps} of {list(promised)}"] * lost


def _whole(path: Path) -> Trajectory:
    """A trajectory whose bytes were compared with its manifest."""
    trajectory = Trajectory.open(path)
    with contextlib.redirect_stderr(io.StringIO()):  # hide the progress bar
        trajectory.verify()
    return trajectory


def _train_and_end(path: Path, kind: str, size: int, seed: int) -> None:
    """A training script that never closes its writer, and notes which checkpoints were taken and flushed."""
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it in background processes
    chance = random.Random(seed)
    writer = TrajectoryWriter(path)
    weights = {"w": torch.empty(size), "count": torch.zeros(3)}
    if kind in SIGNALS:
        seconds, process = chance.uniform(0, 0.03 + 1e-7 * size), os.getpid()
        timer = threading.Timer(seconds, lambda: os.kill(process, SIGNALS[kind]))
        timer.daemon = True
        timer.start()
    fork_at = chance.randint(1, STEPS) if kind == "a fork meanwhile" else 0
    for step in itertools.count(1) if kind in SIGNALS else range(1, STEPS + 1):
        weights["w"].fill_(step)
        writer.append(step, weights, wait=chance.random() < 0.2)
        os.write(log, f"taken {step}\n".encode())
        if step == fork_at and os.fork() == 0:
            return  # like a worker of a data loader: it has a copy of the writer, and ends like its parent
        if chance.random() < 0.2:
            writer.flush()
            os.write(log, f"flushed {step}\n".encode())
    if kind == "sys.exit":
        sys.exit(3)
    if kind == "an exception":
        raise ZeroDivisionError


def rewound_training(folder: Path, *, kills: int) -> Found:
    """Training restarts from step 15 of 20, and is killed twice while its writer goes back."""
    chance, problems, done = random.Random(1), list[str](), 0
    begun = folder / "rewound"
    Child(functools.partial(_train, begun, None, range(1, 21), 0)).value()
    shutil.copytree(begun, folder / "timed")
    start = time.perf_counter()
    Child(functools.partial(_train, folder / "timed", 15, range(16, 21), 1000)).value()
    seconds = time.perf_counter() - start
    while done < kills:
        path = folder / f"rewound{done}"
        shutil.copytree(begun, path)
        again = functools.partial(_train, path, 15, range(16, 21), 1000)
        for _ in range(2):
            child = Child(again)
            child.wait(chance.uniform(0, seconds))
            child.kill()
            done += child.was_killed
            problems += Child(functools.partial(_other_weights, path, ended=False)).value()
        Child(again).value()
        problems += Child(functools.partial(_other_weights, path, ended=True)).value()
        shutil.rmtree(path)
    return Found(f"{done} kills", problems)


def _train(path: Path, resume: int | None, steps: Sequence[int], offset: int) -> None:
    with TrajectoryWriter(path, resume=resume) as writer:
        for step in steps:
            writer.append(step, {"w": torch.full((50_000,), float(step + offset))}, wait=True)


def _other_weights(path: Path, *, ended: bool) -> list[str]:
    """Problems: weights that the trajectory should not hold. ``ended``: training has come to its end."""
    try:
        trajectory = _whole(path)
    except Exception as error:
        return [f"unreadable: {error}"]
    weights = [int(trajectory.checkpoint(i)["w"][0]) for i in range(len(trajectory.steps))]
    first = list(range(1, 21))
    second = first[:15] + [step + 1000 for step in range(16, 21)]
    allowed = [second] if ended else [first, *(second[:n] for n in range(15, 21))]
    return [] if weights in allowed else [f"holds {weights[14:]}"]
