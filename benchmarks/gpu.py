"""The first day on a GPU: the tests that need one, and what the paper's sizes take, next to what an H100 should need.

    python benchmarks/gpu.py [--checkpoints 200] [--images 10000] [--page benchmarks/results/gpu.md] [--quick]

``make gpu`` runs this: eight minutes, and 25 GB in the current folder. It writes one page. The trial is of
``cifar.py``, the training loop that saves of ``writer.py``, the two processes on one device of ``workers.py``.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cifar
import fid
import numpy as np
import torch
import workers
import writer
from common import RESULTS, machine, markdown, parse
from expected import FEATURES, expected

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.records import Candidate
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.trajectory import Trajectory

TESTS = Path(__file__).parents[1] / "tests/accelerators"
ROOM = 4e8  # bytes of the device for each checkpoint of 0.11 GB: what samples and their gradient need is more


def main() -> None:
    """Test, measure, write the page."""
    arguments = parse(
        __doc__,
        dtype={"choices": ("fp32", "bf16"), "default": "bf16"},
        checkpoints=200,
        images=10_000,
        batch_size=1000,
        trials=12,
        page=str(RESULTS / "gpu.md"),
        small={"checkpoints": 4, "images": 16, "batch_size": 16, "trials": 5},
    )
    start, device = time.perf_counter(), accelerator.find("auto")
    if device == CPU:
        print("no accelerator: torch.accelerator.is_available() is false on this machine", file=sys.stderr)
        sys.exit(2)
    arguments.checkpoints = min(arguments.checkpoints, int(accelerator.free_bytes(device) // ROOM))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(TESTS)]
    tested = subprocess.run(command, check=False).returncode
    found = {**fids(device, arguments.quick), **trials(arguments, device)}
    loop = {row["way"]: row for row in writer.measure(os.cpu_count() or 1, 2 if arguments.quick else 5, device)}
    rates, _ = workers.digits(*((2, 1) if arguments.quick else (60, 3)), "--steps=200", output="digits-200-steps")
    should = expected(arguments.checkpoints, arguments.images, quick=arguments.quick)
    tables: list[list[tuple[str, ...]]] = [
        [("what", "seconds", "an H100 SXM, expected", "bound by")],
        [("saving 10 M weights while training", "the loop stands still, ms", "a save adds, ms")],
        [("the demo, on one device", "trials a second")],
    ]
    tables[0] += [(n, f"{s:.4f}", f"{should[n][0]:.4f}", should[n][1]) for n, s in found.items()]
    tables[1] += [(way, f"{row['call_ms']:.2f}", f"{row['added_ms']:.1f}") for way, row in loop.items()]
    tables[2] += [(way, f"{statistics.median(some):.2f}") for way, some in rates.items()]
    took, size = time.perf_counter() - start, f"{arguments.checkpoints} checkpoints, {arguments.images} images"
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: device.type)(device)
    lines = [f"# {name}", "", f"{machine()}. `make gpu` took {took:.0f} s: {size}.", ""]
    lines += [f"Tests on the device: {'failed' if tested else 'passed'}"]
    lines += [line for table in tables for line in ("", *markdown(table))]
    Path(arguments.page).write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


def seconds(task: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The median of some calls, each to the end of the device's work, after one that does not count."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        task()
        accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def fids(device: torch.device, quick: bool) -> dict[str, float]:
    """Of features that lie on the device, and of their moments."""
    images, dimension = (600, 128) if quick else (10_000, FEATURES)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0]
    real, samples = (fid.features(images, basis, seed=seed) for seed in (1, 2))
    ways = fid.tasks(real, samples, device)
    return {f"FID from {part}": seconds(ways["ours", part], device) for part in ("statistics", "features")}


def trials(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Merges, and trials of ``cifar.py`` with and without the gradient."""
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        objective = cifar.build(arguments, Path(folder), device)
        trajectory, origin = objective.trajectory, default_origin(objective.steps)
        assert isinstance(trajectory, Trajectory)
        found = {}
        for how in ("resident", "streamed"):
            merge = functools.partial(trajectory.on(device, how=how).merge, origin)
            found[f"merge, {how}"] = seconds(merge, device)
        del merge  # and its rows on the device
        between, parts = cifar.search(objective, Path(folder), arguments.trials)
        found |= {f"sample, `{arguments.dtype}`": parts["sample"], "features by InceptionV3": parts["features"]}
        gradient = functools.partial(objective.evaluate, Candidate(origin, gradient=True))
        found |= {"trial": statistics.median(between), "trial with its gradient": seconds(gradient, device, 1)}
    return found


if __name__ == "__main__":
    main()
