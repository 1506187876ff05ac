"""A search of a large model without an accelerator: bounded memory, two kills, and where the seconds of a trial go.

    OMP_NUM_THREADS=1 python benchmarks/large_search.py [--minutes 3] [--checkpoints 8] [--images 16] [--calls 5]
        [--folder FOLDER] [--quick]

The model is the U-Net of Ho et al. 2020 for CIFAR-10 (35.7 M weights, diffusers' format), features are InceptionV3's in
torch-fidelity's file; the weights of both are random, so losses mean nothing. ``lcsc run`` searches with LCSC and with
LCSCGradient in a folder of ``--folder``, which is removed at the end. It is killed (SIGKILL) in the middle of a trial
of each, and run again. What the database held at a kill has to be there at the end, bit for bit: numbers, coefficients,
losses, gradients, seconds and times of the ends; and every number ends once.

``--minutes`` is for the trials, by ``expected.py``, whose rates are measured first: one convolution of the network, a
product in float64, and a read of memory. Measured are the medians of the database's seconds, which are wall-clock: next
to other work on the machine they are longer, all parts alike.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from cifar import IMAGE_SHAPE, inception_weights
from common import RESULTS, machine, markdown, memory, parse
from expected import Work, parameters_and_flops, parts
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.trajectory import Trajectory

OPTIMIZERS = ("LCSC", "LCSCGradient")
STEP = 1000  # training steps between two checkpoints
SPREAD = 0.02  # of a step between two checkpoints, as a share of a tensor's standard deviation
IMAGES_WITH_GRAPH = 8
REFERENCE_IMAGES = 128
FEWEST_TRIALS = 4
CHECK_SHARE = 0.2  # of LCSCGradient's trials, which have no gradient
SECONDS_BETWEEN_LOOKS = 0.5
RESULT = ("loss", "metrics", "cost", "gradient")
URL = "sqlite:///studies.db"

Trials = dict[tuple[str, int], FrozenTrial]
"""Optimizer and number → trial."""


@dataclasses.dataclass
class ProcessRecord:
    """One process of ``lcsc run``.

    Attributes:
        ending: how it ended.
        trials: how many trials had a result when it began and when it ended.
        anonymous: megabytes that it had asked for, at each look.
        mapped: megabytes of pages of files, at each look.
        peak: megabytes of both together, by the system, at the last look.
    """

    ending: str
    trials: tuple[int, int]
    anonymous: list[float]
    mapped: list[float]
    peak: float = 0.0


def main() -> None:
    """Search, and print and write what was seen."""
    place = {"help": "where the folder is made; without it a temporary one", "default": None}
    small = {"checkpoints": 3, "images": 4, "calls": 2, "minutes": 0.2}
    arguments = parse(__doc__, minutes=3.0, checkpoints=8, images=16, calls=5, folder=place, small=small)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = run(Path(folder), arguments)
    text = "\n".join(["# A search of a large model without an accelerator", "", machine(), "", *lines, ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "large_search.md").write_text(text)


def run(folder: Path, arguments: Any) -> list[str]:
    """Make the files, search with two kills, and describe it."""
    model = network(quick=arguments.quick)
    write_files(model, folder, arguments.checkpoints)
    rates = measured_rates()
    weights, flops = parameters_and_flops(model, torch.zeros(1, *IMAGE_SHAPE), torch.zeros(1))
    work = Work(
        arguments.checkpoints,
        weights,
        flops,
        arguments.calls,
        arguments.images,
        min(IMAGES_WITH_GRAPH, arguments.images),
        REFERENCE_IMAGES,
    )
    predicted = {"plain": parts(work, rates), "with gradient": parts(work, rates, gradient=True)}
    evaluations = affordable(60 * arguments.minutes, predicted)
    write_study(folder, work, evaluations)
    print(f"{weights / 1e6:.1f} M weights, {evaluations} trials of each optimizer, {rates}", flush=True)
    begin = time.perf_counter()
    processes, problems = search_with_kills(folder, evaluations)
    seconds = time.perf_counter() - begin
    if problems:
        sys.exit("\n".join(problems))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    trials = read_trials(folder)
    nbytes = packed_bytes(folder)
    return [
        f"{weights / 1e6:.1f} M weights, {work.checkpoints} checkpoints ({nbytes / 1e6:,.0f} MB packed), "
        f"{work.images} images a trial, {work.calls} calls an image ({flops / 1e9:.1f} GFLOP each); "
        f"{len(trials)} trials in {seconds / 60:.1f} minutes and three processes, which took "
        f"{(usage.ru_utime + usage.ru_stime) / 60:.1f} minutes of a processor.",
        f"Load of the machine at the end: {os.getloadavg()[1]:.1f} (mean of 5 minutes).",
        "",
        "After both kills, each trial that the database held was there at the end with the same number, coefficients, "
        "loss, gradient and time of its end; the trial of each kill was evaluated again; every number ended once.",
        "",
        *memory_table(processes),
        "",
        f"Rates: convolution {rates['fp32'] * 1e3:.0f} GFLOP/s, float64 {rates['fp64'] * 1e3:.0f} GFLOP/s, "
        f"memory {rates['bandwidth']:.1f} GB/s.",
        "",
        *parts_table(trials, predicted),
    ]


# files


def network(*, quick: bool) -> nn.Module:
    """The U-Net of Ho et al. 2020 for CIFAR-10, as in diffusers' ``google/ddpm-cifar10-32``, with random weights."""
    allow_mismatched_torchvision()
    from diffusers import UNet2DModel

    widths = [32, 32, 32, 32] if quick else [128, 256, 256, 256]
    model: nn.Module = cast("Any", UNet2DModel)(
        sample_size=IMAGE_SHAPE[-1],
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    return model.eval().requires_grad_(False)


def write_files(model: nn.Module, folder: Path, checkpoints: int) -> None:
    """A training folder of diffusers, the file of InceptionV3, and images to compare with."""
    from diffusers import DDPMPipeline, DDPMScheduler

    training = folder / "training"
    cast("Any", DDPMPipeline)(model, cast("Any", DDPMScheduler)()).save_pretrained(training)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, checkpoints + 1):
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=SPREAD * float(tensor.std()))
        cast("Any", model).save_pretrained(training / f"checkpoint-{STEP * number}" / "unet")
    torch.save(inception_weights(), folder / "inception.pth")
    coarse = torch.rand(REFERENCE_IMAGES, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, IMAGE_SHAPE[1:], mode="bilinear")
    pixels = (255 * smooth).permute(0, 2, 3, 1).byte()
    np.savez(folder / "images.npz", arr_0=pixels.numpy())


def write_study(folder: Path, work: Work, evaluations: int) -> None:
    """The study file, as a user would write it."""
    settings = {
        "checkpoints": "training",
        "model": "training",
        "sampler": {"name": "ddim", "steps": work.calls},
        "reference": "images.npz",
        "weights": {"inception": "inception.pth"},
        "images": work.images,
        "batch_size": work.images_with_graph,
        "device": "cpu",
    }
    study = {
        "name": "large",
        "objective": {"file": "diffusers_unconditional.py", "settings": settings},
        "optimizers": list(OPTIMIZERS),
        "budget": {"evaluations": evaluations},
        "storage": URL,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


# rates


def measured_rates() -> dict[str, float]:
    """What :func:`expected.parts` needs to know of this processor, each the best of several rounds."""
    images = torch.randn(IMAGES_WITH_GRAPH, 256, 16, 16)
    kernel = torch.randn(256, 256, 3, 3)
    convolution_flops = 2 * images.numel() * 256 * 9
    convolution = best_seconds(lambda: torch.nn.functional.conv2d(images, kernel, padding=1))
    square = torch.randn(1024, 1024, dtype=torch.float64)
    product = best_seconds(lambda: square @ square)
    large = torch.ones(2**27)
    read = best_seconds(large.sum)
    return {
        "fp32": convolution_flops / convolution / 1e12,
        "fp64": 2 * 1024**3 / product / 1e12,
        "bandwidth": 4 * large.numel() / read / 1e9,
    }


def best_seconds(run: Callable[[], object]) -> float:
    """The least seconds of ten calls."""
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def affordable(seconds: float, predicted: Mapping[str, Mapping[str, float]]) -> int:
    """How many trials each optimizer may make."""
    plain = sum(predicted["plain"].values())
    with_gradient = sum(predicted["with gradient"].values())
    both = (1 + CHECK_SHARE) * plain + (1 - CHECK_SHARE) * with_gradient
    return max(FEWEST_TRIALS, round(seconds / both))


# the search


def search_with_kills(folder: Path, evaluations: int) -> tuple[list[ProcessRecord], list[str]]:
    """Three processes of ``lcsc run``: two are killed in a trial, in the middle of each search. And what was wrong."""
    processes = []
    problems: list[str] = []
    at_kills: list[Trials] = []
    for stop_after in (evaluations // 2, evaluations + evaluations // 2, None):
        processes.append(run_until(folder, stop_after))
        if stop_after is not None:
            at_kills.append(read_trials(folder))
    last_trials = read_trials(folder)
    if processes[-1].ending != "ended":
        problems.append(f"the last process {processes[-1].ending}: {(folder / 'log').read_text()[-2000:]}")
    for trials in at_kills:
        problems += differences(trials, last_trials)
    expected_keys = {(optimizer, number) for optimizer in OPTIMIZERS for number in range(evaluations)}
    if set(last_trials) != expected_keys:
        problems.append(f"expected {len(expected_keys)} trials, got {sorted(last_trials)}")
    problems += [f"{key}: {trial.state.name}" for key, trial in last_trials.items() if not is_done(trial)]
    return processes, problems


def run_until(folder: Path, stop_after: int | None) -> ProcessRecord:
    """Run the search; kill it half a trial after so many results are in the database, or let it end (``None``)."""
    command = [str(Path(sys.executable).with_name("lcsc")), "run", "study.yaml"]
    first = results(folder)
    record = ProcessRecord("ended", (first, first), [], [])
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            for count in looks(process, folder, record):
                if stop_after is not None and count >= stop_after:
                    time.sleep(half_a_trial(folder))
                    process.send_signal(signal.SIGKILL)
                    break
        finally:
            if process.poll() is None and record.ending == "ended":
                process.kill()
            status = process.wait()
    if status == -signal.SIGKILL:
        record.ending = "killed"
    elif status != 0:
        record.ending = f"failed with status {status}"
    record.trials = (first, results(folder))
    return record


def looks(process: subprocess.Popen[bytes], folder: Path, record: ProcessRecord) -> Iterator[int]:
    """Look at the process until it ends: note its memory, give the number of results."""
    while process.poll() is None:
        now = memory(process.pid)
        if now:
            record.anonymous.append(now["anonymous"])
            record.mapped.append(now["mapped"])
            record.peak = max(record.peak, peak_memory(process.pid))
        yield results(folder)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def peak_memory(process: int) -> float:
    """``VmHWM``, in megabytes; 0 of a process that has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def half_a_trial(folder: Path) -> float:
    """Half the seconds of the last trial that has a result."""
    done = [trial for trial in read_trials(folder).values() if is_done(trial)]
    last = max(done, key=lambda trial: str(trial.datetime_complete))
    return float(last.user_attrs["cost"]["seconds"]) / 2


def read_trials(folder: Path) -> Trials:
    """All trials of both studies; none before there is a database."""
    trials: Trials = {}
    if not (folder / "studies.db").exists():
        return trials
    for optimizer in OPTIMIZERS:
        try:
            storage = open_storage(f"sqlite:///{folder / 'studies.db'}", write=False)
            study = StoredStudy.open(storage, f"large/{optimizer}/0")
        except StudyStoreError:
            continue  # not begun
        trials |= {(optimizer, trial.number): trial for trial in study.trials()}
    return trials


def is_done(trial: FrozenTrial) -> bool:
    """Whether it has a result; that of a gradient does not compare, so its trial is pruned."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def results(folder: Path) -> int:
    """The number of trials with a result."""
    return sum(map(is_done, read_trials(folder).values()))


def differences(before: Trials, after: Trials) -> list[str]:
    """What a trial of ``before`` had that it does not have in ``after``."""
    problems = []
    for key, trial in before.items():
        later = after.get(key)
        if later is None:
            problems.append(f"{key}: lost")
        elif later.user_attrs["coefficients"] != trial.user_attrs["coefficients"]:
            problems.append(f"{key}: other coefficients")
        elif is_done(trial) and result_of(later) != result_of(trial):
            problems.append(f"{key}: another result")
    if all(map(is_done, before.values())):
        problems.append("the kill was in no trial")
    return problems


def result_of(trial: FrozenTrial) -> list[Any]:
    """All that its evaluation left in the database."""
    return [trial.value, trial.datetime_complete, *(trial.user_attrs.get(name) for name in RESULT)]


def packed_bytes(folder: Path) -> int:
    """The bytes of the packed checkpoints."""
    [path] = folder.glob("*.files/*.trajectory")
    trajectory = Trajectory.open(path)
    return sum(file.stat().st_size for file in trajectory.path.rglob("*") if file.is_file())


# tables


def memory_table(processes: Sequence[ProcessRecord]) -> list[str]:
    """The peaks of each process, in megabytes."""
    rows = [
        ("process", "trials", "own memory, first half of its time", "second half", "pages of files", "peak of both")
    ]
    for number, record in enumerate(processes, 1):
        first, last = record.trials
        middle = len(record.anonymous) // 2
        rows.append(
            (
                f"{number}, {record.ending}",
                f"{first} to {last}",
                f"{max(record.anonymous[:middle], default=0):,.0f} MB",
                f"{max(record.anonymous[middle:], default=0):,.0f} MB",
                f"{max(record.mapped, default=0):,.0f} MB",
                f"{record.peak:,.0f} MB",
            )
        )
    return markdown(rows)


def parts_table(trials: Trials, predicted: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Seconds and shares of the parts of a trial, next to the prediction."""
    costs: dict[str, list[Mapping[str, float]]] = {"plain": [], "with gradient": []}
    for trial in trials.values():
        kind = "with gradient" if "gradient" in trial.user_attrs else "plain"
        costs[kind].append(trial.user_attrs["cost"])
    rows: list[tuple[str, ...]] = [("trial", "part", "seconds", "expected", "share", "expected share")]
    for kind, trials_of_kind in costs.items():
        if not trials_of_kind:
            continue
        expected = predicted[kind]
        medians = {part: statistics.median(cost[f"{part}_seconds"] for cost in trials_of_kind) for part in expected}
        for part, seconds in medians.items():
            shares = (seconds / sum(medians.values()), expected[part] / sum(expected.values()))
            heading = f"{kind}, {len(trials_of_kind)} trials"
            numbers = (f"{seconds:.2f}", f"{expected[part]:.2f}", *(f"{share:.1%}" for share in shares))
            rows.append((heading, part, *numbers))
        total = statistics.median(cost["seconds"] for cost in trials_of_kind)
        rows.append((kind, "all, with the rest", f"{total:.2f}", f"{sum(expected.values()):.2f}", "", ""))
    return markdown(rows)


if __name__ == "__main__":
    main()
