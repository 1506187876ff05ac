"""The share of a machine that a search gets beside other work: evaluations and training steps per second, in turns.

    python benchmarks/fair_share.py [--seconds 8] [--rounds 3]

By default, OpenMP's threads spin while they wait for each other. Beside other work they then wait for a thread that has
no core. ``lcsc`` lets them sleep instead (``lcsc_opt.base.waiting``). Training with one thread gives other bits, so it
is the user's choice; its share is relative to all threads alone. Each rate is measured in a process of its own: alone,
and beside as many busy processes as there are cores. There the fair share is half of the rate alone. Medians are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from common import RESULTS, machine

from lcsc_opt.base.waiting import WAITING
from lcsc_opt.evaluation.devices import cores

SETTINGS = {"images": 500, "training_steps": 40, "checkpoint_every": 2}
MOST_BELOW_FAIR, MOST_LOST = 1.3, 0.05
BUSY = "while True: pass"
SEARCH = """
import sys, time
import numpy as np
from lcsc_opt import load_objective
objective = load_objective({"name": "fair", "objective": {"file": "digits.py", "settings": %r},
                            "optimizers": ["LCSC"], "budget": {"evaluations": 1}})
coefficients = np.full(len(objective.steps), 1 / len(objective.steps))
objective(coefficients)
print("ready", flush=True)
sys.stdin.readline()
start = done = 0
start = time.perf_counter()
while time.perf_counter() - start < %f:
    objective(coefficients)
    done += 1
print(done / (time.perf_counter() - start))
"""
TRAINING = """
import sys, time
import torch
from lcsc_opt.training.networks import small_unet
network = small_unet((1, 8, 8), (16, 32))
optimizer = torch.optim.Adam(network.parameters(), 1e-3)
torch.set_num_threads(%d or torch.get_num_threads())
images, times = torch.randn(64, 1, 8, 8), torch.rand(64)

def step():
    optimizer.zero_grad()
    network(images, times).sample.square().mean().backward()
    optimizer.step()

step()
print("ready", flush=True)
sys.stdin.readline()
start, done = time.perf_counter(), 0
while time.perf_counter() - start < %f:
    step()
    done += 1
print(done / (time.perf_counter() - start))
"""


def rate(code: str, *, waiting: bool, beside: int) -> float:
    """The rate of a process whose waiting threads sleep or spin, beside ``beside`` busy processes."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= WAITING if waiting else {}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environment) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(beside)]
        try:
            time.sleep(0.5)
            return float(run.communicate("go\n")[0])
        finally:
            for other in others:
                other.kill()
                other.wait()


def main() -> None:
    """Measure in turns, print, and complain if a target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    kinds = {"search": SEARCH % (SETTINGS, asked.seconds), "training": TRAINING % (0, asked.seconds)}
    kinds["training, one thread"] = TRAINING % (1, asked.seconds)
    lines = ["| | alone, spinning | alone, sleeping | beside, spinning | beside, sleeping | fair share / ours |"]
    lines.append("|---|---|---|---|---|---|")
    missed = []
    fair = 0.0
    for name, code in kinds.items():
        measured: dict[tuple[bool, int], list[float]] = {}
        for _ in range(asked.rounds):
            for beside in (0, cores()):
                for waiting in (False, True):
                    measured.setdefault((waiting, beside), []).append(rate(code, waiting=waiting, beside=beside))
        found = {key: statistics.median(values) for key, values in measured.items()}
        spinning, sleeping = found[False, 0], found[True, 0]
        chosen = name.endswith("one thread")
        fair = fair if chosen else spinning / 2
        below = fair / found[True, cores()]
        cells = [spinning, sleeping, found[False, cores()], found[True, cores()]]
        lines.append(f"| {name}, a second | {' | '.join(f'{cell:.1f}' for cell in cells)} | {below:.2f} |")
        if below > MOST_BELOW_FAIR:
            missed.append(f"{name}: {below:.2f} below the fair share, asked for {MOST_BELOW_FAIR}")
        if not chosen and sleeping < (1 - MOST_LOST) * spinning:
            missed.append(f"{name}: {1 - sleeping / spinning:.0%} lost when alone, asked for {MOST_LOST:.0%}")
    text = "\n".join([*lines, "", *(missed or ["All figures are reached."])])
    sys.stdout.write(text + "\n")
    RESULTS.joinpath("fair_share.md").write_text(f"# A fair share of the cores\n\n{machine()}\n\n{text}\n")


if __name__ == "__main__":
    main()
