"""What adding checkpoints to a mean costs the training loop: ``writer.step`` at every tenth step, in turns with none.

    python benchmarks/means_step.py [--rounds 20]

Trains the network of ``writer.py``, 10 million parameters, on one thread of the CPU. A turn is ten steps. ``mean`` then
adds the weights to the open mean, ``copy`` copies them into existing tensors, and ``nothing`` does neither. In each
round every way has a turn, and each round begins with another way. Times are those of the thread that trains, so that
other processes do not count. ``share`` is the median time of the call, divided by that of ten steps. ``written`` is
that of calls in which a mean was complete, and was copied for the background, which writes it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, parse, write_json
from writer import network, training

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.trajectory import TrajectoryWriter

STEPS = 10
MOST_SHARE = 0.02
NOTHING, COPY, MEAN = "nothing", "copy", "mean"


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, rounds=20)
    print(machine())
    torch.set_num_threads(1)
    model = network()
    copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        writer = TrajectoryWriter(Path(folder) / "means.trajectory", means=2)
        found = measure(model, copied, writer, arguments.rounds)
        writer.close()
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(write_json("means_step", found))
    print(found)


def measure(
    model: torch.nn.Module, copied: dict[str, torch.Tensor], writer: TrajectoryWriter, rounds: int
) -> dict[str, Any]:
    """The medians of turns and calls, in milliseconds."""

    def copy(_: int) -> None:
        for name, tensor in model.state_dict().items():
            copied[name].copy_(tensor)

    ways: dict[str, Callable[[int], object]] = {
        NOTHING: lambda _: None,
        COPY: copy,
        MEAN: lambda step: writer.step(step, model),
    }
    names = list(ways)
    steps = training(model, CPU)
    turns: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, list[float]] = {name: [] for name in names}
    written: list[float] = []
    for number in range(rounds + 1):  # the first one warms up
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            start = time.thread_time()
            for _ in range(STEPS):
                next(steps)
            trained = time.thread_time()
            ways[name](number + 1)
            ended = time.thread_time()
            if number == 0:
                continue
            turns[name].append(trained - start)
            is_complete = name == MEAN and number & (number - 1) == 0  # 1, 2, 4 …: a window has been filled
            (written if is_complete else calls[name]).append(ended - trained)
        writer.flush()  # the background's work is not a part of the next turn
    medians = {name: statistics.median(calls[name]) * 1e3 for name in (COPY, MEAN)}
    ten_steps = statistics.median(turns[NOTHING]) * 1e3
    return {
        "ten_steps_ms": round(ten_steps, 1),
        "copy_ms": round(medians[COPY], 2),
        "mean_ms": round(medians[MEAN], 2),
        "written_ms": round(statistics.median(written) * 1e3, 2),
        "share": round(medians[MEAN] / ten_steps, 4),
        "within": medians[MEAN] <= MOST_SHARE * ten_steps,
    }


if __name__ == "__main__":
    main()
