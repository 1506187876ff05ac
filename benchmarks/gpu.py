"""The first quarter of an hour on a GPU: a search to its end, what a trial takes, and the tests that need a device.

    python benchmarks/gpu.py [--minutes 10] [--checkpoints 64] [--images 5000] [--page FILE] [--quick]

``make gpu`` runs this. Every figure is printed and written to the page as soon as it is known, the most important ones
first, and whatever is not done after ``--minutes`` is cut: the page says what. It needs up to 25 GB in the current
folder, and nothing beyond ``pip install '.[images]'`` and pytest.

First comes README's search, on the device and then on the CPU, whose numbers should agree. The trial is of
``cifar.py``, next to what an H100 should need by ``expected.py``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cifar
import fid
import numpy as np
import torch
from common import RESULTS, ROOT, machine, parse
from diffusers import DPMSolverMultistepScheduler
from expected import FEATURES, expected
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.records import Candidate
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.trajectory import Trajectory

TESTS = ROOT / "tests/accelerators"
ROOM = 4e8  # bytes of the device for each checkpoint of 0.11 GB: what samples and their gradient need is more
SECONDS_OF_TESTS = 150  # of one of the processes in which they run
TEST_PROCESSES = 4

Figures = Iterator[tuple[str, str]]
"""What was measured, and its value."""


class Page:
    """A page that is written anew after each line."""

    def __init__(self, path: Path, title: str, minutes: float) -> None:
        self._path = path
        self._ends = time.monotonic() + 60 * minutes
        self._lines = [f"# {title}", ""]

    @property
    def seconds_left(self) -> float:
        """Until whatever is not done is cut."""
        return self._ends - time.monotonic()

    def add(self, *lines: str) -> None:
        """Print lines and write them."""
        print(*lines, sep="\n", flush=True)
        self._lines += lines
        self._path.write_text("\n".join(self._lines) + "\n")

    def measure(self, title: str, figures: Figures) -> None:
        """A table of figures, each written when it is known; one that fails ends its table."""
        if self.seconds_left <= 0:
            self.add("", f"{title}: cut, no time was left")
            return
        self.add("", f"| {title} | |", "| --- | --- |")
        start = time.monotonic()
        try:
            for what, value in figures:
                self.add(f"| {what} | {value} |")
                if self.seconds_left <= 0:
                    self.add("| … | cut, no time was left |")
                    return
        except Exception as error:
            self.add(f"| … | failed: {error!r} |")
        self.add(f"| took | {time.monotonic() - start:.0f} s |")


def main() -> None:
    """Measure, the most important first."""
    arguments = parse(
        __doc__,
        dtype={"choices": ("fp32", "bf16"), "default": "bf16"},
        minutes=10.0,
        checkpoints=64,
        images=5_000,
        trials=12,
        device="auto",
        page=str(RESULTS / "gpu.md"),
        small={"checkpoints": 4, "images": 16, "trials": 5},
    )
    device = accelerator.find(arguments.device)
    if device == CPU and not arguments.quick:
        print("no accelerator: torch.accelerator.is_available() is false on this machine", file=sys.stderr)
        sys.exit(2)
    if device != CPU:
        arguments.checkpoints = min(arguments.checkpoints, int(accelerator.free_bytes(device) // ROOM))
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: device.type)(device)
    page = Page(Path(arguments.page), str(name), arguments.minutes)
    page.add(f"{machine()}. {arguments.checkpoints} checkpoints, {arguments.images} images, {arguments.dtype}.")
    page.measure("README's search", searches(device, quick=arguments.quick))
    should = expected(arguments.checkpoints, arguments.images, quick=arguments.quick)
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        page.measure("seconds; by `expected.py` on an H100", trials(arguments, device, Path(folder), should))
    page.measure("FID: seconds; by `expected.py` on an H100", fids(device, should, quick=arguments.quick))
    page.measure("tests on the device", tests(page))


def eight_steps(net: nn.Module, noise: Tensor) -> Tensor:
    """README's sampler."""
    scheduler_class: Any = DPMSolverMultistepScheduler
    scheduler = scheduler_class()
    scheduler.set_timesteps(8)
    for step in scheduler.timesteps:
        noise = scheduler.step(net(noise, step), step, noise).prev_sample
    return noise


def searches(device: torch.device, *, quick: bool) -> Figures:
    """README's search on the device, and on the CPU: their numbers should agree."""
    build = load_file(ROOT / "objectives" / "mnist.py").network
    for where in dict.fromkeys([str(device), "cpu"]):
        start = time.perf_counter()
        result = lcsc_opt.search(
            str(ROOT / "objectives" / "weights" / "mnist.trajectory"),
            build=build,
            sample=eight_steps,
            image_shape=(1, 16, 16),
            reference="mnist",
            loss="fdr@mnist",
            images=500,
            budget=3 if quick else 40,
            held_out=100 if quick else 2000,
            storage=None,
            settings={"device": where},
        )
        whole = time.perf_counter() - start
        of_searches = sum(trial["seconds"] or 0.0 for study in result.studies for trial in study.trials)
        yield f"{where}: the whole call, its searches", f"{whole:.1f} s, {of_searches:.1f} s"
        for study in result.studies:
            yield f"{where}: {study.name}, searched, held out", f"{study.searched:.4f}, {study.held_out:.4f}"
        yield f"{where}: the answer", repr(result).splitlines()[0]


def tests(page: Page) -> Figures:
    """The tests that need a device, some at a time, each process with a limit of its own."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", str(TESTS)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    parts = [part for part in (names[index::TEST_PROCESSES] for index in range(TEST_PROCESSES)) if part]
    for number, part in enumerate(parts, start=1):
        limit = min(SECONDS_OF_TESTS, max(page.seconds_left, 1.0))
        yield f"part {number} of {len(parts)}, {len(part)} tests", _tested(part, limit)


def _tested(names: Sequence[str], limit: float) -> str:
    """How some tests end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"cut after {limit:.0f} s"
    return done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else f"exit {done.returncode}"


def seconds(task: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The median of some calls, each to the end of the device's work, after one that does not count."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        task()
        accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def beside(value: float, name: str, should: dict[str, tuple[float, str]]) -> str:
    """A number of seconds next to what an H100 should need."""
    if name not in should:
        return f"{value:.4f}"
    return f"{value:.4f}; {should[name][0]:.4f} ({value / should[name][0]:.1f} times; bound by {should[name][1]})"


def fids(device: torch.device, should: dict[str, tuple[float, str]], *, quick: bool) -> Figures:
    """Of features that lie on the device, and of their moments."""
    images, dimension = (600, 128) if quick else (10_000, FEATURES)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0]
    real, samples = (fid.features(images, basis, seed=seed) for seed in (1, 2))
    ways = fid.tasks(real, samples, device)
    for part in ("statistics", "features"):
        name = f"FID from {part}"
        yield name, beside(seconds(ways["ours", part], device), name, should)


def trials(
    arguments: argparse.Namespace, device: torch.device, folder: Path, should: dict[str, tuple[float, str]]
) -> Figures:
    """Trials of ``cifar.py`` with and without the gradient, and merges."""
    objective = cifar.build(arguments, folder, device)
    trajectory, origin = objective.trajectory, default_origin(objective.steps)
    assert isinstance(trajectory, Trajectory)
    between, parts = cifar.search(objective, folder, arguments.trials)
    yield "trial", beside(statistics.median(between), "trial", should)
    name = f"sample, `{arguments.dtype}`"
    yield name, beside(parts["sample"], name, should)
    yield "features by InceptionV3", beside(parts["features"], "features by InceptionV3", should)
    gradient = functools.partial(objective.evaluate, Candidate(origin, gradient=True))
    yield "trial with its gradient", beside(seconds(gradient, device, 1), "trial with its gradient", should)
    for how in ("resident", "streamed"):
        name = f"merge, {how}"
        merge = functools.partial(trajectory.on(device, how=how).merge, origin)
        yield name, beside(seconds(merge, device), name, should)


if __name__ == "__main__":
    main()
