"""How long a training loop stands still while a checkpoint is saved, in turns with simpler ways to save.

    python benchmarks/writer.py [--rounds 9] [--threads 1] [--quick]

Trains a network of 10 million parameters on the CPU, and saves every 5 steps. A turn is 4 saves, each with the 5 steps
after it, and ends when nothing is left to do in the background. In each round every way to save has a turn, and each
round begins with another way. ``copy`` copies the state dict into existing tensors: no way to save can take less if
training continues. ``torch.save`` returns with the bytes in the system's memory; ``append`` puts them on the disk, with
``wait=False`` in the background, which competes with training for the cores.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, parse, write_json
from torch import nn

from lcsc_opt.trajectory import TrajectoryWriter

WIDTH, LAYERS, BATCH = 1600, 4, 64
EVERY, SAVES = 5, 4  # steps between saves, saves in a turn
MOST_CALL = 2.0  # our own target: at most so many times a copy
COPY, TORCH, LATER = "copy", "torch.save", "append, wait=False"


def main() -> None:
    """Measure, print, and compare with the target."""
    arguments = parse(__doc__, rounds=9, threads=1, small={"rounds": 2})
    print(machine())
    torch.set_num_threads(arguments.threads)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.SiLU())))
    rows: list[dict[str, Any]] = []
    for way, seconds in measure(model, arguments.rounds).items():
        call, most = 1e3 * statistics.median(seconds), 1e3 * max(seconds)
        print(f"{way:20s} the loop stands still {call:6.1f} ms, at most {most:.1f}", flush=True)
        rows.append({"way": way, "call_ms": round(call, 2), "call_most_ms": round(most, 2)})
    if not arguments.quick:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        head = {"parameters": parameters, "rounds": arguments.rounds, "threads": arguments.threads}
        print(write_json("writer", {**head, "rows": rows}))
    call_ms = {row["way"]: row["call_ms"] for row in rows}
    if call_ms[LATER] > MOST_CALL * call_ms[COPY]:
        sys.exit(f"missed: {LATER} within {MOST_CALL:g} copies")


def training(model: nn.Module) -> Iterator[None]:
    """Train one step for each ``next``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    while True:
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        yield


def measure(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Way to save → the seconds of each call."""
    copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def copy(_: int) -> None:
        for name, tensor in model.state_dict().items():
            copied[name].copy_(tensor)

    with tempfile.TemporaryDirectory(dir=Path()) as name:
        folder = Path(name)
        with TrajectoryWriter(folder / "run.trajectory") as writer:
            ways: dict[str, Callable[[int], object]] = {
                COPY: copy,
                TORCH: lambda step: torch.save(model.state_dict(), folder / f"checkpoint{step:06d}.pt"),
                LATER: lambda step: writer.append(step, model, wait=False),
            }
            names = list(ways)
            calls: dict[str, list[float]] = {way: [] for way in names}
            steps, step = training(model), 0
            for turn in range(rounds + 1):  # the first one warms up
                first = turn % len(names)
                for way in (*names[first:], *names[:first]):
                    for _ in range(SAVES):
                        step += 1
                        start = time.perf_counter()
                        ways[way](step)
                        if turn:
                            calls[way].append(time.perf_counter() - start)
                        for _ in range(EVERY):
                            next(steps)
                    writer.flush()
    return calls


if __name__ == "__main__":
    main()
