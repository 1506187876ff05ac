"""The cost of saving a checkpoint for the training loop, in turns with simpler ways that a user would write.

    python benchmarks/writer.py [--rounds 9] [--threads 1 2] [--quick]

Trains a network of 10 million parameters on the CPU, and saves every 5 steps. A turn is 4 saves, each with the 5 steps
after it, and ends when nothing is left to do in the background. In each round every way to save has a turn, and each
round begins with another way. ``added`` is the time of a save and its steps, less that of the same steps in the turn
that saves nothing: medians of a turn, and the median of the rounds. ``call`` is how long the loop stands still.
``copy`` copies the state dict into existing tensors: no way to save can take less if training continues.
``torch.save`` returns with the bytes in the system's memory, ``torch.save, synced`` with the bytes on the disk, as
``append`` does. On a CPU the background competes with training for the cores. If training uses all cores, all of the
background's work is added, only later.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import machine, parse, write_json
from torch import nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.trajectory import TrajectoryWriter

WIDTH, LAYERS, BATCH = 1600, 4, 64
EVERY, SAVES = 5, 4  # steps between saves, saves in a turn
MOST_CALL = 2.0  # our own target: at most so many times a copy
NOTHING, COPY, TORCH, SYNCED, WAIT, LATER = (
    "nothing",
    "copy",
    "torch.save",
    "torch.save, synced",
    "append, wait=True",
    "append, wait=False",
)


def main() -> None:
    """Measure and print."""
    threads = {"type": int, "nargs": "+", "default": [1, 2], "help": "of training"}
    arguments = parse(__doc__, rounds=9, threads=threads, small={"rounds": 2})
    print(machine())
    rows = [row for threads in arguments.threads for row in measure(threads, arguments.rounds)]
    if not arguments.quick:
        parameters = sum(parameter.numel() for parameter in network().parameters())
        print(write_json("writer", {"parameters": parameters, "rounds": arguments.rounds, "rows": rows}))
    for threads in arguments.threads:
        call = {row["way"]: row["call_ms"] for row in rows if row["threads"] == threads}
        if call[LATER] > MOST_CALL * call[COPY]:
            sys.exit(f"missed: {LATER} within {MOST_CALL:g} copies")


def network() -> nn.Module:
    """Layers of equal width."""
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.SiLU())))


def training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train one step for each ``next``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    while True:
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        yield


class Ways:
    """The ways in which a loop may save. Each is called with the number of the step."""

    def __init__(self, model: nn.Module, folder: Path, stack: ExitStack) -> None:
        self._model, self._folder = model, folder
        self._copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._waiting = stack.enter_context(TrajectoryWriter(folder / "waiting.trajectory"))
        self._going_on = stack.enter_context(TrajectoryWriter(folder / "going_on.trajectory"))
        self.save: dict[str, Callable[[int], object]] = {
            NOTHING: lambda _: None,
            COPY: lambda _: self._copied(),
            TORCH: self._torch,
            SYNCED: lambda step: self._torch(step, sync=True),
            WAIT: lambda step: self._waiting.append(step, model),
            LATER: lambda step: self._going_on.append(step, model, wait=False),
        }

    def finish(self) -> None:
        """Wait for the work in the background."""
        self._going_on.flush()

    def _copied(self) -> None:
        for name, tensor in self._model.state_dict().items():
            self._copy[name].copy_(tensor)

    def _torch(self, step: int, *, sync: bool = False) -> None:
        with (self._folder / f"checkpoint{step:06d}.pt").open("wb") as file:
            torch.save(self._model.state_dict(), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def measure(threads: int, rounds: int, device: torch.device = CPU) -> list[dict[str, Any]]:
    """One row for each way to save."""
    torch.set_num_threads(threads)
    model = network().to(device)
    cycles: dict[str, list[float]] = {}
    calls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=Path()) as folder, ExitStack() as stack:
        ways, steps, step = Ways(model, Path(folder), stack), training(model, device), 0
        names = list(ways.save)
        for turn in range(rounds + 1):  # the first one warms up
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                step += SAVES
                took, stood = _turn(ways, name, steps, step, device)
                if turn:
                    cycles.setdefault(name, []).append(took)
                    calls.setdefault(name, []).extend(stood)
    step_ms = statistics.median(cycles[NOTHING]) / EVERY * 1e3
    print(f"\n{threads} threads train, {step_ms:.0f} ms a step, a save every {EVERY}; milliseconds for each save:")
    return [_row(name, threads, cycles, calls, step_ms) for name in names if name != NOTHING]


def _turn(ways: Ways, name: str, steps: Iterator[None], first: int, device: torch.device) -> tuple[float, list[float]]:
    """The median seconds of a save and its steps, and the seconds of each call."""
    cycles, calls = [], []
    for save in range(SAVES):
        start = time.perf_counter()
        ways.save[name](first + save)
        calls.append(time.perf_counter() - start)
        for _ in range(EVERY):
            next(steps)
        if save == SAVES - 1:
            ways.finish()
        accelerator.synchronize(device)
        cycles.append(time.perf_counter() - start)
    return statistics.median(cycles), calls


def _row(
    name: str, threads: int, cycles: dict[str, list[float]], calls: dict[str, list[float]], step_ms: float
) -> dict[str, Any]:
    added = [(with_it - without) * 1e3 for with_it, without in zip(cycles[name], cycles[NOTHING], strict=True)]
    quarters = statistics.quantiles(added, n=4)
    call = statistics.median(calls[name]) * 1e3
    against = {other: round(call / (statistics.median(calls[other]) * 1e3), 3) for other in (COPY, TORCH, WAIT)}
    print(
        f"{name:20s} the loop stands still {call:6.1f} ({', '.join(f'{r:.2f} of {o!r}' for o, r in against.items())})"
        f"  added {statistics.median(added):6.1f} (half of the rounds {quarters[0]:.1f} to {quarters[2]:.1f})",
        flush=True,
    )
    return {
        "way": name,
        "threads": threads,
        "step_ms": round(step_ms, 1),
        "call_ms": round(call, 2),
        "call_most_ms": round(max(calls[name]) * 1e3, 2),
        "call_ratio": against,
        "added_ms": round(statistics.median(added), 1),
        "added_quarters_ms": [round(quarters[0], 1), round(quarters[2], 1)],
    }


if __name__ == "__main__":
    main()
